"""perf/index.py opens an index of ImageNet's size."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "perf" / "index.py"


def test_an_index_of_imagenets_size(tmp_path):
    command = [sys.executable, SCRIPT, "--quick", "--json", "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout.splitlines()[-1])
    assert printed == json.loads((tmp_path / "index.json").read_text())
    assert (tmp_path / "index.png").stat().st_size > 5000
    (row,) = printed["rounds"]
    assert row["images"] == 1_281_167
    assert 1_281_167 * 8 / 2**20 < row["mib"] < 200  # the labels alone, and what is allowed
    assert row["open_s"] > 0
    assert row["shuffle_s"] > 0
