"""SGD with momentum, with torch.optim's interface."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from knltrain.ops.optimizers import sgd_step
from knltrain.optim.base import MasterOptimizer


class SGD(MasterOptimizer):
    """SGD with torch.optim.SGD's update (:func:`knltrain.ops.optimizers.sgd_step`) and bf16 working copies.

    It continues a state of torch.optim.SGD without dampening.

    Args:
        params: parameters or groups. A group may override every option below.
        lr: learning rate.
        momentum: momentum factor.
        weight_decay: L2 coefficient.
        nesterov: use Nesterov momentum.

    Raises:
        ValueError: a number out of its range.
    """

    _equal_options: Mapping[str, Any] = {"dampening": 0, "maximize": False}

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not value >= 0.0:
                raise ValueError(f"Invalid {name}: {value}; it must not be negative")
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"Invalid momentum: {momentum}; it must be in [0, 1)")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov})

    def _update(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        copies: list[Tensor],
        groups: list[dict[str, Any]],
    ) -> None:
        sgd_step(
            params,
            grads,
            [self.state[parameter]["momentum_buffer"] for parameter in params],
            copies,
            lr=[float(group["lr"]) for group in groups],
            momentum=[group["momentum"] for group in groups],
            weight_decay=[group["weight_decay"] for group in groups],
            nesterov=[group["nesterov"] for group in groups],
        )
