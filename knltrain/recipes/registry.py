"""The registry of recipes, and their rules for another batch size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from knltrain.config import OptimConfig, RunConfig, ScheduleConfig
from knltrain.errors import ConfigError

IMAGENET_IMAGES = 1_281_167

SOURCES = {
    "ICLR": "Large Batch Training of Convolutional Networks with Layer-wise Adaptive Rate Scaling, submission to ICLR "
    "2018 by the authors of LARS, close to arXiv 1708.03888; the number is that of the table",
    "Paper": "100-epoch ImageNet Training with AlexNet in 24 Minutes, arXiv 1709.05011; its abstracts",
    "Intel": "solvers in intel/caffe at 44d5363, models/intel_optimized_models/multinode",
    "NVCaffe": "solvers of the first author of LARS in borisgin/nvcaffe-0.16 at 8896d33, models/",
    "Goyal": "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour, arXiv 1706.02677",
    "FFCV": "configurations rn50_*_epochs.yaml and train_imagenet.py in libffcv/ffcv-imagenet at 5bab20e and 606c584, "
    "accuracies of its README at 4dd291a",
    "LAMB": "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes, arXiv 1904.00962",
    "Codreanu": "Codreanu, Podareanu and Saletore 2017, Scale out for large minibatch SGD: Residual network training "
    "on ImageNet-1K with improved accuracy and reduced time to train",
    "MLPerf": "reference convergence points in mlcommons/logging at 7bbf792, training_3.1.0/rcps_resnet.json",
    "NUS": "NUS-HPC-AI-Lab/LARS-ImageNet-PyTorch at a8222c6, by the group of [Paper]'s first author",
    "He": "Deep Residual Learning for Image Recognition, arXiv 1512.03385, section 4.2",
}

# A function of the batch that returns a method's optimizer and learning-rate schedule.
Method = Callable[[int], tuple[OptimConfig, ScheduleConfig]]


@dataclass(frozen=True)
class Recipe:
    """A named configuration, with published and measured accuracies.

    Attributes:
        published: top-1 that a source reports for these settings, with the source.
        measured: top-1 of this project's own run, with its results, or "not run".
        methods: rules of other optimizers for the same training, by name.
    """

    name: str
    build: Callable[[], RunConfig]
    published: str
    measured: str
    methods: Mapping[str, Method]

    def config(self) -> RunConfig:
        """Returns the recipe's configuration, with its name."""
        return replace(self.build(), recipe=self.name)


RECIPES: dict[str, Recipe] = {}


def recipe(
    *, published: str, measured: str = "not run", methods: Mapping[str, Method] = MappingProxyType({})
) -> Callable[[Callable[[], RunConfig]], Callable[[], RunConfig]]:
    """Registers the decorated function under its name, with dashes for underscores."""

    def register(build: Callable[[], RunConfig]) -> Callable[[], RunConfig]:
        name = build.__name__.replace("_", "-")
        RECIPES[name] = Recipe(name, build, published, measured, methods)
        return build

    return register


def at_batch(name: str, optimizer: str, batch: int) -> RunConfig:
    """Returns a recipe at another batch size, with its own optimizer or another method; other settings are unchanged.

    With its own optimizer, the method's rule is used if it reproduces the recipe at the recipe's batch. Otherwise the
    learning rate follows :func:`scaled`, and the warm-up keeps its epochs. Batches of a batch-size warm-up are scaled
    in proportion.

    Args:
        name: a key of ``RECIPES``.
        optimizer: the recipe's own, or one of its ``methods``.
        batch: images per step.

    Raises:
        ConfigError: there is no rule for this optimizer.
    """
    recipe, config = RECIPES[name], RECIPES[name].config()
    rule, own = recipe.methods.get(optimizer), optimizer == config.optim.name
    if rule and (not own or rule(config.global_batch) == (config.optim, config.schedule)):
        optim, schedule = rule(batch)
    elif own:
        optim, schedule = scaled(config.optim, config.global_batch, batch), config.schedule
    else:
        there = ", ".join(dict.fromkeys((config.optim.name, *recipe.methods)))
        raise ConfigError(f"{name} has no rule for the optimizer {optimizer!r}; it has one for {there}")
    smaller = tuple(max(1, round(before * batch / config.global_batch)) for before in schedule.batches)
    return replace(config, global_batch=batch, optim=optim, schedule=replace(schedule, batches=smaller))


def scaled(optim: OptimConfig, before: int, after: int) -> OptimConfig:
    """Scales the learning rate to another batch: linearly for SGD [Goyal], with the square root for others [NUS]."""
    if optim.lr_scaling == "linear":
        return optim
    ratio = after / before
    return replace(optim, lr=optim.lr * (ratio if optim.name == "sgd" else math.sqrt(ratio)))
