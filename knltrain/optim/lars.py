"""Layer-wise adaptive rate scaling, in the manner of torch.optim."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from knltrain.ops.lars import lars_step


class LARS(torch.optim.Optimizer):
    """LARS (You, Gitman and Ginsburg, arXiv 1708.03888): every layer's step is a fixed fraction of its weights' norm.

    The formulas are in :func:`knltrain.ops.lars.lars_step`. The published variants are settings of it:

    * ``paper``: every parameter adapted, the default here;
    * ``mlperf``: groups of batch norm and biases get ``adapt=False`` and ``weight_decay=0``
      (see :func:`knltrain.optim.groups.parameter_groups`);
    * ``larc``: ``clip=True``.

    Args:
        params: parameters or groups. A group may set ``adapt``, ``clip`` and every number below for itself.
        lr: global learning rate.
        momentum: of the buffer, which holds steps and not gradients: a change of ``lr`` does not touch what is in it.
        weight_decay: added to the gradient before the trust-scaled step, and part of the trust ratio.
        trust_coefficient: eta, the fraction of a layer's norm that a step of lr 1 moves it by.
        eps: added to the trust ratio's denominator.
        adapt: scale by the trust ratio; without it this is SGD with the learning rate inside the momentum buffer.
        clip: never exceed ``lr`` (LARC).
        maximize: not offered; refused.

    Raises:
        ValueError: a number out of its range, or ``maximize``.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1.0,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        eps: float = 0.0,
        adapt: bool = True,
        clip: bool = False,
        maximize: bool = False,
    ) -> None:
        for name, value in (("lr", lr), ("weight_decay", weight_decay), ("eps", eps)):
            if not value >= 0.0:
                raise ValueError(f"Invalid {name}: {value}; it must not be negative")
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"Invalid momentum: {momentum}; it must be in [0, 1)")
        if not trust_coefficient > 0.0:
            raise ValueError(f"Invalid trust_coefficient: {trust_coefficient}; it must be positive")
        if maximize:
            raise ValueError("LARS does not maximize; negate the loss instead")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "adapt": adapt,
            "clip": clip,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not params:
                continue
            lars_step(
                params,
                [parameter.grad for parameter in params],
                [self._momentum_buffer(parameter) for parameter in params],
                lr=float(group["lr"]),
                momentum=group["momentum"],
                weight_decay=group["weight_decay"],
                trust_coefficient=group["trust_coefficient"],
                eps=group["eps"],
                adapt=group["adapt"],
                clip=group["clip"],
            )
        return loss

    def _momentum_buffer(self, parameter: Tensor) -> Tensor:
        if parameter.grad is not None and parameter.grad.is_sparse:
            raise RuntimeError("LARS does not take sparse gradients")
        state: dict[str, Any] = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        buffer: Tensor = state["momentum_buffer"]
        return buffer
