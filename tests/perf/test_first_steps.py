"""perf/first_steps.py trains a few steps with each way of computing convolutions."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from knltrain.ops.native import load_error

SCRIPT = Path(__file__).parents[2] / "perf" / "first_steps.py"


@pytest.mark.skipif(bool(load_error()), reason="no native kernels")
def test_ways_begin_alike(tmp_path):
    command = [sys.executable, SCRIPT, "--quick", "--json", "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout.splitlines()[-1])
    assert printed == json.loads((tmp_path / "first_steps.json").read_text())
    rows = {row["way"]: row for row in printed["rows"]}
    assert len(rows) == 5
    first, *others = rows.values()
    assert len(set(first["losses"])) == 5
    assert first["largest_difference"] == [0] * 5
    assert all(max(row["largest_difference"]) < 1e-3 for row in others)
    assert [rows[f"fused, {conv}"]["native_convolutions"] for conv in ("direct", "Winograd")] == [0, 4]
