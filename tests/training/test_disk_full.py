"""A disk that is full: training goes on while it can, what is on disk stays good, and nothing is lost in silence."""

import os
import shlex
import subprocess
import sys

import pytest
from cluster.hosts import need
from cluster.runs import KNLTRAIN, TORCHRUN
from runs import computed

from knltrain import checkpoint

# A checkpoint of this network has 8 MiB.
TRAIN = ["train", "--recipe", "cifar-256", "--global-batch", "16", "--precision", "fp32", "--engine", "eager"]
FULL = "No space left on device"


@pytest.fixture
def on_small_disk(tmp_path):
    """Runs a shell script in a mount namespace where $OUT is a tmpfs; what is left there is then in tmp_path/out."""
    need("unshare", "mount")

    def run(script, mib):
        (tmp_path / "disk").mkdir()
        script = f"""
            mount -t tmpfs -o size={mib}m none "$OUT" || exit 99
            {script}
            code=$?
            cp -r "$OUT" "$KEPT"
            exit $code
        """
        return subprocess.run(
            ["unshare", "--mount", "--propagation", "private", "bash", "-c", script],
            capture_output=True, text=True, timeout=240,
            env={**os.environ, "OUT": str(tmp_path / "disk"), "KEPT": str(tmp_path / "out"), "PYTHON": sys.executable},
        )  # fmt: skip

    return run


def left(out):
    return sorted(path.name for path in (out / "checkpoints").iterdir())


@pytest.mark.slow
def test_a_periodic_checkpoint_that_does_not_fit_is_a_warning(on_small_disk, image_folder, tmp_path):
    """Something else fills the disk for a while."""
    command = shlex.join([*KNLTRAIN, *TRAIN, "--data", str(image_folder), "--epochs", "60", "--checkpoint.keep", "1"])
    script = f"""
        head -c 12M /dev/zero >"$OUT/ballast"
        {command} --out "$OUT/run" >"$OUT/../log" 2>&1 &
        for _ in $(seq 1200); do
            grep -q 'training goes on' "$OUT/../log" && break
            sleep 0.1
        done
        rm "$OUT/ballast"
        wait $!
    """
    result = on_small_disk(script, 30)
    log = (tmp_path / "log").read_text()
    assert result.returncode == 0, log
    assert f"{FULL} for " in log
    assert "MiB free); the checkpoints before it are untouched, training goes on" in log
    run = tmp_path / "out" / "run"
    assert left(run)[-1] == "step-00000180"
    for folder in checkpoint.list_checkpoints(run):
        checkpoint.verify(folder)
    steps = [row["step"] for row in computed(run) if "loss" in row]
    assert steps == list(range(1, 181))


def test_the_last_checkpoint_that_does_not_fit_is_an_error(on_small_disk, image_folder, tmp_path):
    command = shlex.join([*KNLTRAIN, *TRAIN, "--data", str(image_folder), "--epochs", "2"])
    result = on_small_disk(f'{command} --out "$OUT/run"', 14)
    assert result.returncode == 1
    assert f"step-00000006: {FULL}" in result.stderr
    assert "Traceback" not in result.stderr
    assert left(tmp_path / "out" / "run") == ["step-00000003"]
    checkpoint.verify(tmp_path / "out" / "run" / "checkpoints" / "step-00000003")


def test_all_ranks_end_when_the_first_cannot_write(on_small_disk, image_folder, tmp_path):
    command = shlex.join([*TORCHRUN, "knltrain", *TRAIN, "--data", str(image_folder), "--epochs", "2"])
    result = on_small_disk(f'{command} --comm.backend gloo --out "$OUT/run"', 14)
    assert result.returncode == 1
    assert f"rank 0: checkpoint {tmp_path}/disk/run/checkpoints/step-00000006: {FULL}" in result.stderr
    assert "rank 1: the last checkpoint could not be written; rank 0 says why" in result.stderr
    assert left(tmp_path / "out" / "run") == ["step-00000003"]
