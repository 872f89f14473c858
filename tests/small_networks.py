"""Networks that train in a moment, and how the tests of resuming train them."""

import pytest
import torch
from torch import nn

from knltrain import models
from knltrain.config import RunConfig, override
from knltrain.errors import ConfigError
from knltrain.models.resnet import ResNet
from knltrain.training.engine import refuse_missing_parts

STEPS = 6  # two epochs
# Everything that a run can change in its course, at once: steps of 8 and of 16 images, of 16 and of 32 pixels, with and
# without augmentation, by an optimizer that counts its steps, and an average of the weights.
CHANGES = {
    "schedule.batches": [8],
    "schedule.batch_epochs": [0.4],
    "schedule.image_sizes": [16],
    "schedule.image_size_epochs": [0.7],
    "augment.name": "rrc",
    "augment.collapse_epochs": 0.5,
    "ema_decay": 0.6,
    "dropout": 0.3,
    "optim.name": "lamb",
    "optim.variant": "mlperf",
    "optim.eps": 1e-6,
    "optim.lr": 0.02,
}
CHANGING_STEPS = 7
# In fp32, IPEX does not give the same bits twice even where nothing is stopped.
PRECISIONS = {"eager": ("fp32", "bf16"), "fused": ("fp32", "bf16"), "compile": ("fp32", "bf16"), "ipex": ("bf16",)}


def small_resnet(*, num_classes, image_size):
    """One bottleneck a stage."""
    return ResNet((1, 1, 1, 1), num_classes, zero_init_residual=False)


class Tiny(nn.Module):
    """What torch.compile is done with in seconds: a convolution, batch norm, ReLU, dropout and a dense layer."""

    def __init__(self, num_classes, dropout):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16)
        self.dropout, self.fc = nn.Dropout(dropout), nn.Linear(16, num_classes)

    def forward(self, x):
        return self.fc(self.dropout(torch.relu(self.norm(self.conv(x))).mean((2, 3))))


def tiny(*, num_classes, image_size, dropout=0.0):
    return Tiny(num_classes, dropout)


SMALL_NETWORKS = {"small_resnet": small_resnet, "tiny": tiny}


def add_small_networks(patch=dict.__setitem__):
    """Lets a configuration name them; ``patch`` as monkeypatch.setitem."""
    for name, network in SMALL_NETWORKS.items():
        patch(models.MODELS, name, network)


def network_of(engine):
    """A network, and its fields, that shows what an engine does without making a test long.

    Of fused it has all that it replaces; of the others, one module of a kind will do.
    """
    return {"model": "small_resnet"} if engine == "fused" else {"model": "tiny", "dropout": 0.3}


def marked(engine, precision):
    """A case of a test, marked where it compiles; what of fp32 compiles is tested by hand."""
    marks = [pytest.mark.compile] if engine == "compile" else []
    return pytest.param(
        engine, precision, marks=[*marks, *([pytest.mark.hand] if marks and precision == "fp32" else [])]
    )


def why_no_engine(engine, precision="fp32"):
    """What is missing for an engine; nothing where it runs."""
    try:
        refuse_missing_parts(engine, precision)
    except ConfigError as error:
        return str(error)
    return ""


def small_run(data, out, **changes):
    """Two epochs of three steps, each of two micro-batches where one rank has it all."""
    fields = {
        "data": str(data),
        "out": str(out),
        "model": "alexnet_bn_small",
        "image_size": 32,
        "global_batch": 16,
        "local_batch": 4,
        "epochs": 2,
        "optim.lr": 2.0,
        "precision": "fp32",
        "engine": "eager",
        "force_bf16": True,
        "workers": 2,
    }
    return override(RunConfig(), {**fields, **changes})


def whole_and_in_parts(run, data, folder, options):
    """Trains without a stop in ``whole``, and with two, after the first step and in the second epoch, in ``parts``.

    What was stopped was evaluated and saved at other steps than the whole: that must not matter.

    Args:
        run: trains as configured.
        data: what on.
        folder: of the two runs.
        options: fields.
    """
    run(small_run(data, folder / "whole", **options))
    for stop in (1, 4, None):
        run(small_run(data, folder / "parts", max_steps=stop, **{"checkpoint.every": 0.4}, **options))
