"""perf/convolutions.py times convolutions both ways and compares them with float64."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from knltrain.ops.native import load_error

SCRIPT = Path(__file__).parents[2] / "perf" / "convolutions.py"


@pytest.mark.skipif(bool(load_error()), reason="no native kernels")
def test_gains_and_errors_of_a_small_network(tmp_path):
    command = [sys.executable, SCRIPT, "--quick", "--json", "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout.splitlines()[-1])
    assert printed == json.loads((tmp_path / "convolutions.json").read_text())
    assert (tmp_path / "convolutions.png").stat().st_size > 5000
    assert {path for row in printed["rows"] for path in row["layers"]} >= {"features.conv2", "features.conv5"}
    for row in printed["rows"]:
        results = [name for name in ("forward", "input", "weight") if name in row]
        assert results == (["weight"] if "features.conv1" in row["layers"] else ["forward", "input", "weight"])
        assert (row["batch_norm"] is None) == ("features.conv1" in row["layers"])
        assert all(seconds > 0 for seconds in (row["batch_norm"] or {}).values())
        for name in results:
            one = row[name]
            assert one["gain"] == pytest.approx(one["direct_s"] / one["native_s"])
            assert 1e-8 < one["direct_error"] < 1e-6
            assert 1e-8 < one["native_error"] < 4e-6
