"""Layer-wise adaptive rate scaling, with torch.optim's interface."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from knltrain.ops.optimizers import lars_step, trust_ratio
from knltrain.optim.base import MasterOptimizer


class LARS(MasterOptimizer):
    """LARS (You, Gitman and Ginsburg, arXiv 1708.03888): every layer's step is a fixed fraction of its weights' norm.

    The formulas are in :func:`knltrain.ops.optimizers.lars_step`. The published variants are settings of it:

    * ``paper``: every parameter adapted, the default here;
    * ``mlperf``: groups of batch norm and biases get ``adapt=False`` and ``weight_decay=0``
      (see :func:`knltrain.optim.groups.parameter_groups`);
    * ``larc``: ``clip=True``;
    * ``nesterov``: ``mlperf`` with ``nesterov=True``, which MLPerf's reference and optax offer too.

    Args:
        params: parameters or groups. A group may override every option below but ``maximize``.
        lr: global learning rate.
        momentum: momentum factor. The buffer holds steps, not gradients: a change of ``lr`` does not rescale it.
        weight_decay: added to the gradient before the trust-scaled step, and part of the trust ratio.
        trust_coefficient: eta, the norm of a layer's step relative to the norm of its weights, for lr 1.
        eps: added to the trust ratio's denominator.
        adapt: scale by the trust ratio; without it this is SGD with the learning rate inside the momentum buffer.
        clip: never exceed ``lr`` (LARC).
        nesterov: use Nesterov momentum.
        maximize: not supported; raises.

    Raises:
        ValueError: a number out of its range, or ``maximize``.

    """

    _later_options: Mapping[str, Any] = {"nesterov": False}

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
        nesterov: bool = False,
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
            "nesterov": nesterov,
        }
        super().__init__(params, defaults)
        # By parameter: its version after the last update, and the sum of its squares.
        self._squares: dict[Tensor, tuple[int, float]] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._squares = {}

    def trust_ratios(self, norms: Mapping[str, float]) -> dict[str, dict[str, float | None]]:
        return {
            group["kind"]: {
                name: self._trust_ratio(parameter, norms[name], group)
                for name, parameter in zip(group["names"], group["params"], strict=True)
                if name in norms
            }
            for group in self.param_groups
            if group["adapt"]
        }

    def _trust_ratio(self, parameter: Tensor, grad_norm: float, group: dict[str, Any]) -> float | None:
        square = self._known_square(parameter)
        known = not math.isnan(square)
        weights = parameter.detach()
        weight_norm = math.sqrt(square) if known else float(torch.linalg.vector_norm(weights, dtype=torch.float64))
        if weight_norm == 0 or grad_norm == 0:
            return None
        numbers = {name: group[name] for name in ("weight_decay", "trust_coefficient", "eps", "clip")}
        return trust_ratio(weight_norm, grad_norm, **numbers)

    def _known_square(self, parameter: Tensor) -> float:
        """Returns the sum of squares from the previous update; NaN if it is not kept, or weights were written since."""
        version, square = self._squares.get(parameter, (-1, math.nan))
        return square if version == parameter._version else math.nan

    def _update(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        copies: list[Tensor],
        groups: list[dict[str, Any]],
    ) -> None:
        squares = torch.tensor([self._known_square(parameter) for parameter in params], dtype=torch.float64)
        lars_step(
            params,
            grads,
            [self.state[parameter]["momentum_buffer"] for parameter in params],
            copies,
            squares,
            lr=[float(group["lr"]) for group in groups],
            momentum=[group["momentum"] for group in groups],
            weight_decay=[group["weight_decay"] for group in groups],
            trust_coefficient=[group["trust_coefficient"] for group in groups],
            eps=[group["eps"] for group in groups],
            adapt=[group["adapt"] for group in groups],
            clip=[group["clip"] for group in groups],
            nesterov=[group["nesterov"] for group in groups],
        )
        if self.carries_norms:
            values = zip(params, squares.tolist(), strict=True)
            self._squares = {parameter: (parameter._version, square) for parameter, square in values}
