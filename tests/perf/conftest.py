"""The scripts of perf/, for their tests."""

import importlib
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

PERF = Path(__file__).parents[2] / "perf"


@pytest.fixture
def refusal(monkeypatch):
    """What a script says that does not take its arguments; in this process, for another takes seconds to start."""

    def of(name, *arguments, code=2):
        monkeypatch.syspath_prepend(str(PERF))
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        result = CliRunner().invoke(importlib.import_module(name).main, [*map(str, arguments)])
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.stderr
        return result.stderr

    return of
