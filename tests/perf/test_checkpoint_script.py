"""perf/checkpoint.py writes checkpoints of a small network while it trains."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "perf" / "checkpoint.py"


def test_quick_run_times_steps_beside_a_checkpoint(tmp_path):
    command = [sys.executable, SCRIPT, "--quick", "--json", "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout.splitlines()[-1])
    assert printed == json.loads((tmp_path / "checkpoint.json").read_text())
    assert (tmp_path / "checkpoint.png").stat().st_size > 5000
    (row,) = printed["rounds"]
    assert len(row["without_s"]) == 2
    assert len(row["while_s"]) >= 1
    assert printed["ratio"] == pytest.approx(printed["while_s"] / printed["without_s"])
    # Weights and momentum in float32, of a network with a thousand classes.
    assert 8 < printed["mib"] < 40
    assert 0 < row["copy_s"] < row["write_s"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.json", "checkpoint.png"]
