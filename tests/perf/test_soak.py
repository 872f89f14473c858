"""The script that watches a long run."""

import json
import subprocess
import sys
from pathlib import Path

PERF = Path(__file__).parents[2] / "perf"


def soak(tmp_path, *arguments):
    return subprocess.run(
        [sys.executable, PERF / "soak.py", "--out", tmp_path / "out", "--json", *map(str, arguments)],
        capture_output=True, text=True, timeout=240, cwd=tmp_path,
    )  # fmt: skip


def test_a_run_is_watched_and_asked_to_end(image_folder, tmp_path):
    run = ["--recipe", "cifar-256", "--data", image_folder, "--image-size", 32, "--augment.resize", 32,
           "--global-batch", 16, "--epochs", 10000]  # fmt: skip
    result = soak(tmp_path, "--minutes", 0.4, "--", *run)
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout.splitlines()[-1])
    assert json.loads((tmp_path / "out" / "soak.json").read_text()) == seen
    assert (tmp_path / "out" / "soak.png").read_bytes().startswith(b"\x89PNG")
    assert seen["steps"] >= 4
    assert len(seen["step_s_quarters"]) == 4
    assert seen["rss_mib_last"] > 50
    assert 1 <= seen["threads_range"][0] <= seen["threads_range"][1]
    assert "stopped by a signal" in (tmp_path / "out" / "said.txt").read_text()


def test_a_run_that_fails_is_one_line(tmp_path):
    result = soak(tmp_path, "--minutes", 0.5, "--", "--recipe", "cifar-256", "--data", "/nowhere")
    assert result.returncode == 1
    assert "the run ended with 1: knltrain: /nowhere" in result.stderr
    assert "Traceback" not in result.stderr
