"""A signal that one rank gets, or all: they end together, after a checkpoint, and the same command goes on."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import pytest
from cluster.runs import GLOO, SMALL, TORCHRUN, mpiexec
from cluster.test_lost_ranks import ranks_of, wait_until

from knltrain.runlog.metrics import read_metrics

STEPS = 1000
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]


@contextlib.contextmanager
def running(launcher, image_folder, out, *options, program=("-m", "knltrain")):
    """Two ranks that train; yields their job's mark and the process that started them."""
    start = TORCHRUN[:-1] if launcher == "torchrun" else [*mpiexec("-n", 2), sys.executable]
    job = f"{os.getpid()}-{out.parent.name}"
    command = [*start, *program, "train", *SMALL, *GLOO, "--max-steps", str(STEPS), "--epochs", "1e5",
               "--checkpoint.every", "1e5", "--data", str(image_folder), "--out", str(out), *options]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "KNLTRAIN_TEST": job}
    )
    try:
        yield job, process
    finally:
        process.kill()
        for pid in ranks_of(job).values():
            os.kill(pid, signal.SIGKILL)


def steps(out):
    path = out / "metrics.jsonl"
    return [row["step"] for row in read_metrics(path) if "loss" in row] if path.exists() else []


@pytest.mark.parametrize(
    "launcher, number, rank",
    [("torchrun", signal.SIGINT, 0), ("torchrun", signal.SIGTERM, 1), ("mpiexec", signal.SIGTERM, 0),
     ("mpiexec", signal.SIGUSR1, 1)],
)  # fmt: skip
def test_a_signal_to_one_rank_ends_both_after_a_checkpoint(launcher, number, rank, image_folder, tmp_path):
    out = tmp_path / "run"
    with running(launcher, image_folder, out) as (job, process):
        wait_until(lambda: len(steps(out)) >= 3, 120, process)
        os.kill(ranks_of(job)[rank], number)
        output, errors = process.communicate(timeout=90)
    last = steps(out)[-1]
    assert last < STEPS
    assert f"stopped by a signal after step {last}; the same command goes on from there" in output
    assert json.loads((out / "summary.json").read_text())["finished"] is False
    assert [path.name for path in (out / "checkpoints").iterdir()] == [f"step-{last:08}"]
    # torchrun ends with a code of its own, and says its ranks'.
    assert process.returncode == (75 if launcher == "mpiexec" else 1)
    assert launcher == "mpiexec" or "exitcode  : 75" in errors
    if (launcher, number) != ("mpiexec", signal.SIGTERM):
        return  # what goes on has nothing to do with how it was stopped
    with running(launcher, image_folder, out, "--max-steps", str(last + 2)) as (_, process):
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert f"resumed from {out}/checkpoints/step-{last:08}" in output
    assert steps(out) == list(range(1, last + 3))


@pytest.mark.parametrize("number", SIGNALS)
def test_mpiexec_passes_a_signal_on(number, image_folder, tmp_path):
    out = tmp_path / "run"
    with running("mpiexec", image_folder, out) as (_, process):
        wait_until(lambda: len(steps(out)) >= 3, 120, process)
        process.send_signal(number)
        output, _ = process.communicate(timeout=90)
    assert process.returncode == 75
    assert f"stopped by a signal after step {steps(out)[-1]};" in output


SENT_LATE = """
import os, signal
from knltrain.cli.main import main
from knltrain.comm.group import Group
close = Group.close
def close_late(self):
    os.kill(os.getpid(), signal.SIGTERM)
    close(self)
Group.close = close_late
main()
"""


def test_what_a_launcher_sends_once_the_first_has_ended_ends_no_rank(image_folder, tmp_path):
    """Its job would end as if by that signal, and Slurm not queue it again."""
    program = tmp_path / "program.py"
    program.write_text(SENT_LATE)
    out = tmp_path / "run"
    with running("mpiexec", image_folder, out, program=[program]) as (_, process):
        wait_until(lambda: len(steps(out)) >= 3, 120, process)
        process.send_signal(signal.SIGUSR1)
        output, _ = process.communicate(timeout=90)
    assert process.returncode == 75
    assert f"stopped by a signal after step {steps(out)[-1]};" in output
