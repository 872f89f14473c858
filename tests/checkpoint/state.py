"""A small model with an optimizer that has stepped, and checkpoints of it."""

import torch

from knltrain import checkpoint
from knltrain.checkpoint import Progress
from knltrain.config import OptimConfig, RunConfig
from knltrain.models import model_of
from knltrain.optim import build_optimizer

CONFIG = RunConfig(model="alexnet_bn_small", image_size=32)
META = {"model": "alexnet_bn_small", "image_size": 32, "resize": 32, "dropout": None, "classes": ["a", "b"],
        "images": 48, "config": {"seed": 0}, "made": {"threads": 2}}  # fmt: skip


def stepped(optim=None, seed=0):
    torch.manual_seed(seed)
    model = model_of(CONFIG, 10)
    optimizer = build_optimizer(model, optim or OptimConfig())
    model(torch.randn(8, 3, 32, 32)).square().mean().backward()
    optimizer.step()
    return model, optimizer


def save(out, step, model, optimizer, *, top1=None, statistics=None):
    """Writes a checkpoint, evaluated at its step where there is a ``top1``, and returns its folder."""
    evaluated = 0 if top1 is None else step
    progress = Progress(step, evaluated_step=evaluated, top1=top1, best_top1=50.0, wall_s=1.5)
    snapshot = checkpoint.Snapshot()
    snapshot.take(progress, model.state_dict(), optimizer, meta=META, statistics=statistics)
    folder = checkpoint.folder_of(out, step)
    checkpoint.write(snapshot, folder)
    return folder


def names(out):
    """What lies in a run's folder of checkpoints."""
    return sorted(path.name for path in (out / "checkpoints").iterdir())
