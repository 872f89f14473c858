"""SGD with momentum, in the manner of torch.optim."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from knltrain.ops.optimizers import sgd_step
from knltrain.optim.base import MasterOptimizer


class SGD(MasterOptimizer):
    """torch.optim.SGD's update (:func:`knltrain.ops.optimizers.sgd_step`), for working copies too.

    Args:
        params: parameters or groups. A group may set every number below for itself.
        lr: learning rate.
        momentum: fraction of the buffer that stays.
        weight_decay: L2 coefficient.
        nesterov: look ahead along the buffer.

    Raises:
        ValueError: a number out of its range.
    """

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
