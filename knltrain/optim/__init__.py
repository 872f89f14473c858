"""Optimizers, and building one from a configuration."""

from __future__ import annotations

from torch import nn

from knltrain.config import WEIGHTS_ONLY, OptimConfig
from knltrain.optim.base import MasterOptimizer
from knltrain.optim.groups import parameter_groups
from knltrain.optim.lamb import LAMB
from knltrain.optim.lars import LARS
from knltrain.optim.sgd import SGD

__all__ = ["LAMB", "LARS", "SGD", "MasterOptimizer", "build_optimizer", "parameter_groups"]


def build_optimizer(model: nn.Module, config: OptimConfig) -> MasterOptimizer:
    """Builds a model's optimizer, with parameters grouped by module type.

    SGD keeps the learning rate outside the momentum buffer, so that the momentum correction of Goyal et al. 2017,
    remark 2, for a rate inside the buffer, is not needed.
    """
    if config.name == "sgd":
        return SGD(
            parameter_groups(model, weight_decay=config.weight_decay, decay_on=config.decay_on),
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.variant == "nesterov",
        )
    weights_only = config.variant in WEIGHTS_ONLY
    groups = parameter_groups(
        model,
        weight_decay=config.weight_decay,
        decay_on="weights" if weights_only else config.decay_on,
        adapt_on="weights" if weights_only else "all",
    )
    if config.name == "lamb":
        return LAMB(groups, lr=config.lr, betas=(config.momentum, config.beta2), eps=config.eps)
    return LARS(
        groups,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        trust_coefficient=config.trust_coefficient,
        eps=config.eps,
        clip=config.variant == "larc",
        nesterov=config.variant == "nesterov",
    )
