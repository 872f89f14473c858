"""LAMB: Adam's direction, and of each layer a step that is a fraction of its weights' norm."""

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
        params: parameters or groups. A group may set ``adapt`` and every number below for itself.
        lr: global learning rate: the fraction of a layer's norm that a step moves it by.
        betas: fractions of the first and of the second moment that stay.
        weight_decay: decoupled, and part of the step that the trust ratio scales.
        eps: added to the root of the second moment; a parameter whose gradients have all been zero is divided by it.
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
            # A tensor, as torch's Adam has it: what is in checkpoints is tensors.
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
