"""What two runs have in common: everything that they computed, bit by bit."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from knltrain.runlog.metrics import read_metrics

# What a step or an evaluation computed, as opposed to how long it took.
_COMPUTED = ("step", "epoch", "loss", "lr", "top1", "top5", "val_loss", "noise_scale")


def newest(out):
    """The newest checkpoint."""
    return max(Path(out, "checkpoints").glob("step-*"))


def state(out):
    """Weights, momentum and running statistics of the newest checkpoint, by file and name."""
    return {
        f"{path.name}: {name}": tensor
        for path in newest(out).glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def computed(out):
    """The rows of metrics.jsonl without times, those of evaluations that only one of two runs made left out."""
    rows = read_metrics(Path(out, "metrics.jsonl"))
    return [{name: row[name] for name in _COMPUTED if name in row} for row in rows]


def assert_same_run(out, expected, *, evaluations=True):
    """Every tensor of the last checkpoint is the same to the last bit, and every number that was computed on the way.

    Args:
        out: a run's folder.
        expected: another's.
        evaluations: whether both were evaluated at the same steps.
    """
    got, wanted = state(out), state(expected)
    assert got.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(got[name], wanted[name])] == []
    ours, theirs = ([row for row in computed(path) if evaluations or "loss" in row] for path in (out, expected))
    assert ours == theirs
    progress = [json.loads((newest(path) / "state.json").read_text()) for path in (out, expected)]
    assert progress[0]["step"] == progress[1]["step"]
