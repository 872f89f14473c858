"""A rank that dies or hangs takes the job down in time, with a line that names it, and nothing is left behind."""

import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster.runs import TORCHRUN, mpiexec

from knltrain.comm import oneccl
from knltrain.runlog.metrics import read_metrics

TIMEOUT_S = 4


def ranks_of(job):
    """The process of each rank: those whose environment has the job's mark, by the rank in it."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environ = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes().split(b"\0")
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if f"KNLTRAIN_TEST={job}".encode() not in environ or b"knltrain" not in command or state == "Z":
            continue
        values = dict(entry.split(b"=", 1) for entry in environ if b"=" in entry)
        rank = values.get(b"RANK", values.get(b"PMI_RANK"))
        if rank is not None:
            found[int(rank)] = int(folder.name)
    return found


def wait_until(condition, seconds, process):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.1)


@pytest.mark.parametrize(
    "sent, launcher, backend",
    [  # every pair of two of the three
        (signal.SIGKILL, "torchrun", "gloo"),
        (signal.SIGKILL, "mpiexec", "ccl"),
        (signal.SIGSTOP, "torchrun", "ccl"),
        (signal.SIGSTOP, "mpiexec", "gloo"),
    ],
)
def test_a_lost_rank_ends_the_job(sent, launcher, backend, image_folder, tmp_path):
    start = TORCHRUN if launcher == "torchrun" else [*mpiexec("-n", 2), sys.executable, "-m"]
    if backend == "ccl":
        try:
            oneccl.find_library()
        except oneccl.UnavailableError as error:
            pytest.skip(str(error))
    job = f"{os.getpid()}-{tmp_path.name}"
    command = [*start, "knltrain", "train", "--recipe", "cifar-256", "--data", str(image_folder),
               "--out", str(tmp_path / "run"), "--global-batch", "16", "--epochs", "1e5", "--checkpoint.every", "1e5",
               "--comm.backend", backend, "--comm.timeout-s", str(TIMEOUT_S), "--precision", "fp32"]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "KNLTRAIN_TEST": job}
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    try:
        wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 3, 120, process)
        os.kill(ranks_of(job)[1], sent)
        # Rank 0 gives up after the time-out; torchrun then gives a rank that is stopped half a minute to end.
        _, errors = process.communicate(timeout=TIMEOUT_S + 90)
    finally:
        process.kill()
        left = ranks_of(job)
        for pid in left.values():
            os.kill(pid, signal.SIGKILL)
    assert process.returncode != 0
    assert not left, "processes are left"
    assert "Traceback" not in errors.split("torch/distributed/elastic")[0].split("elastic_launch")[0]
    if sent == signal.SIGSTOP:
        step = max(row["step"] for row in read_metrics(metrics))
        assert f"all ranks finished step {step}" in errors
        if backend == "ccl":
            assert f"rank 1 on {platform.node()} did not take part within {TIMEOUT_S} s" in errors
