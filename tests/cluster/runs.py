"""Small runs that every launcher can start, and what they leave behind."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from cluster.hosts import without
from safetensors.torch import load_file

from knltrain.cli.main import main
from knltrain.runlog.metrics import read_metrics

KNLTRAIN = [sys.executable, "-m", "knltrain"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
# One rank that accumulates normalises the same micro-batches as two or four ranks: the losses are equal.
# At this rate three steps move the weights but do not blow rounding up.
SMALL = [
    "--recipe", "cifar-256", "--image-size", "32", "--augment.resize", "32", "--global-batch", "64",
    "--local-batch", "16", "--precision", "fp32", "--engine", "eager", "--optim.lr", "0.01",
]  # fmt: skip
GLOO = ["--comm.backend", "gloo"]


def mpiexec(*arguments):
    """Intel MPI's mpiexec, of impi-rt in this environment or in one whose packages this one uses."""
    folders = [Path(folder).parents[2] / "bin" for folder in sys.path if folder.endswith("site-packages")]
    path = next((folder / "mpiexec" for folder in folders if (folder / "mpiexec").exists()), None)
    if path is None:
        without("no mpiexec of Intel MPI: impi-rt is not in this environment")
    return [str(path), *map(str, arguments)]


def ccl_is_here():
    """Whether ranks choose oneCCL by themselves; in a process of its own, for none of it may be loaded here."""
    code = "from knltrain.comm import oneccl; oneccl.load()"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def start(command, *, timeout=120, **environment):
    """Runs a command line and returns it, finished."""
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=timeout,
        env={**os.environ, **environment},
    )  # fmt: skip


def train_here(*arguments):
    """Runs `knltrain train` in this process, on one rank; what it prints. Another process takes seconds to start."""
    cpus, threads = os.sched_getaffinity(0), torch.get_num_threads()
    try:
        result = CliRunner().invoke(main, ["train", *map(str, arguments)])
    finally:
        os.sched_setaffinity(0, cpus)
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    return result.output


def need_program(name):
    """Skips, aloud, where a program is missing; returns its path."""
    path = shutil.which(name)
    if path is None:
        without(f"{name} is not installed; .ci/run names the packages")
    return path


def losses(out):
    """The loss of each step."""
    return [row["loss"] for row in read_metrics(Path(out, "metrics.jsonl")) if "loss" in row]


def plan(out):
    """Who ran, and how."""
    return json.loads(Path(out, "config.json").read_text())["plan"]


def weights(out):
    """Of the newest checkpoint, by name."""
    return load_file(max(Path(out, "checkpoints").iterdir()) / "model.safetensors")


def assert_same_training(out, expected):
    """What was learnt does not depend on who did it.

    Not compared: batch norm's running statistics, of which every rank has its own between evaluations; and biases,
    which under batch norm move by rounding alone.
    """
    assert losses(out) == pytest.approx(losses(expected), rel=1e-5)
    got, wanted = weights(out), weights(expected)
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if name.endswith(".weight"):
            torch.testing.assert_close(got[name], tensor, rtol=0, atol=2e-4 * float(tensor.abs().max()), msg=name)
