"""perf/training_input.py trains from every format, on a few small images."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "perf" / "training_input.py"


@pytest.mark.hand
def test_quick_run_trains_from_every_format(image_folder, tmp_path):
    result = subprocess.run(
        [sys.executable, SCRIPT, str(image_folder), "--quick", "--out", str(tmp_path), "--json"],
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout.splitlines()[-1])
    assert printed == json.loads((tmp_path / "training_input.json").read_text())
    assert (tmp_path / "training_input.png").stat().st_size > 5000
    rows = {row["name"]: row for row in printed["steps"]}
    ours = ("noise", "raw, crop-flip", "tar of 256 px, crop-flip", "folder, rrc", "tar of originals, rrc")
    assert all(rows[name]["images_per_s"] > 0 for name in ours), rows
    assert rows["noise"]["of_noise"] == 1
    assert sum(name.startswith("torchvision, folder") for name in rows) == 1
