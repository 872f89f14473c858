"""Small runs that every launcher can start, and what they leave behind."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from knltrain.metrics import read_metrics

KNLTRAIN = [sys.executable, "-m", "knltrain"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
# One rank that accumulates normalises the same micro-batches as two or four ranks: the losses are equal.
# At this rate three steps move the weights but do not blow rounding up.
SMALL = [
    "--recipe", "cifar-256", "--image-size", "32", "--augment.resize", "32", "--global-batch", "64",
    "--local-batch", "16", "--precision", "fp32", "--engine", "eager", "--optim.lr", "0.01",
]  # fmt: skip
GLOO = ["--comm.backend", "gloo"]


def find_mpiexec():
    """Intel MPI's mpiexec, of impi-rt in this environment or in one whose packages this one uses."""
    beside = [Path(folder).parents[2] / "bin" / "mpiexec" for folder in sys.path if folder.endswith("site-packages")]
    found = next((path for path in [Path(sys.executable).parent / "mpiexec", *beside] if path.exists()), None)
    return str(found) if found else None


def mpiexec(ranks):
    """Intel MPI's mpiexec, for so many ranks here."""
    path = find_mpiexec()
    if path is None:
        pytest.skip("no mpiexec of Intel MPI: impi-rt is not in this environment")
    return [path, "-n", str(ranks)]


def start(command, *, timeout=120, **environment):
    """Runs a command line and returns it, finished."""
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=timeout,
        env={**os.environ, **environment},
    )  # fmt: skip


def need_program(name):
    """Skips, aloud, where a program is missing; returns its path."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed; .ci/run names the packages")
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


def assert_equal_within_rounding(got, expected):
    """Tensors of equal names and nearly equal values."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-4 * float(tensor.abs().max()), msg=name)


def assert_same_training(out, expected):
    """What was learnt does not depend on who did it.

    Not compared: batch norm's running statistics, of which every rank has its own between evaluations; and biases,
    which under batch norm move by rounding alone.
    """
    assert losses(out) == pytest.approx(losses(expected), rel=1e-5)
    got, wanted = (
        {name: tensor for name, tensor in weights(run).items() if name.endswith(".weight")} for run in (out, expected)
    )
    assert_equal_within_rounding(got, wanted)
