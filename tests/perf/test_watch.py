"""perf/watch.py measures what health's checks cost."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "perf" / "watch.py"


def test_the_cost_of_checks(tmp_path):
    command = [sys.executable, SCRIPT, "--quick", "--json", "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout.splitlines()[-1])
    assert printed == json.loads((tmp_path / "watch.json").read_text())
    assert (tmp_path / "watch.png").stat().st_size > 5000
    (row,) = printed["rows"]
    assert all(len(row[key]) == 2 and min(row[key]) > 0 for key in ("step_s", "norm_s", "fingerprint_s"))
