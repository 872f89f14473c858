"""LAMB: Adam's update, scaled to a fraction of each layer's weight norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from knltrain.ops.optimizers import lamb_step
from knltrain.optim.base import MasterOptimizer


class LAMB(MasterOptimizer):
    """LAMB (You et al. 2019, arXiv 1904.00962); the formulas are in :func:`knltrain.ops.optimizers.lamb_step`.

    Args:
        params: parameters or groups. A group may override every option below.
        lr: global learning rate: the norm of a layer's step relative to the norm of its weights.
        betas: decay of the first and second moment.
        weight_decay: decoupled weight decay, scaled by the trust ratio with the step.
        eps: added to the root of the second moment; it is the divisor while all gradients of a parameter are zero.
        adapt: scale by the trust ratio; without it this is AdamW.

    Raises:
        ValueError: a number out of its range.
    """

    _buffers = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        eps: float = 1e-6,
        adapt: bool = True,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not value >= 0.0:
                raise ValueError(f"Invalid {name}: {value}; it must not be negative")
        for beta in betas:
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid betas: {betas}; they must be in [0, 1)")
        if not eps > 0.0:
            raise ValueError(f"Invalid eps: {eps}; it must be positive")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps, "adapt": adapt})

    def _update(
        self, params: list[Tensor], grads: list[Tensor], copies: list[Tensor], groups: list[dict[str, Any]]
    ) -> None:
        states = [self.state[parameter] for parameter in params]
        for state in states:
            # A tensor, as in torch's Adam: checkpoints hold only tensors.
            state["step"] = state.get("step", torch.zeros(())) + 1
        lamb_step(
            params,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            copies,
            steps=[int(state["step"]) for state in states],
            lr=[float(group["lr"]) for group in groups],
            beta1=[group["betas"][0] for group in groups],
            beta2=[group["betas"][1] for group in groups],
            weight_decay=[group["weight_decay"] for group in groups],
            eps=[group["eps"] for group in groups],
            adapt=[group["adapt"] for group in groups],
        )
