"""perf/input.py reads every format, on a few small images."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "perf" / "input.py"


@pytest.mark.hand
def test_quick_run_reads_every_format(image_folder, tmp_path):
    result = subprocess.run(
        [sys.executable, SCRIPT, str(image_folder), "--quick", "--image-size", "24", "--out", str(tmp_path), "--json"],
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout.splitlines()[-1])
    assert printed == json.loads((tmp_path / "input.json").read_text())
    assert (tmp_path / "input.png").stat().st_size > 5000
    rates = {row["name"]: row.get("images_per_s") for row in printed["loaders"]}
    ours = ("raw, crop-flip", "raw, rrc", "tar of 256 px, crop-flip", "folder, rrc", "tar of originals, rrc")
    assert all(rates[name] > 0 for name in ours)
    assert set(printed["prepared"]) == {"raw", "tar", "originals"}
    assert all(row["counts"] == {"train": 48, "val": 13} for row in printed["prepared"].values())
    assert all("reason" in row or row["images_per_s"] > 0 for row in printed["loaders"])


def test_a_folder_that_is_none_is_one_line(refusal, tmp_path):
    said = refusal("input", tmp_path, "--out", tmp_path / "out", code=1)
    assert said.strip().splitlines() == [f"input.py: {tmp_path}/train: no such folder"]
