"""Networks that train in a moment, and how the tests of resuming train them."""

import importlib.util
import shutil

from knltrain import models
from knltrain.config import RunConfig, override
from knltrain.models.resnet import ResNet
from knltrain.ops.native import why_not

STEPS = 6  # two epochs
# Dropout where there is some, and two micro-batches a step.
NETWORKS = {"alexnet_bn_small": {"dropout": 0.3}, "small_resnet": {}}
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
    """One bottleneck a stage; to be put into ``models.MODELS``."""
    return ResNet((1, 1, 1, 1), num_classes, zero_init_residual=False)


def add_small_networks():
    """Lets a configuration name them."""
    models.MODELS["small_resnet"] = small_resnet


def why_no_engine(engine):
    """What is missing for an engine; nothing where it runs."""
    if engine == "fused" and why_not():
        return f"no native kernels: {why_not()}"
    if engine == "ipex" and importlib.util.find_spec("intel_extension_for_pytorch") is None:
        return "engine ipex is not installed"
    if engine == "compile" and not shutil.which("g++"):
        return "engine compile needs g++"
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
