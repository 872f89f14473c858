"""The LARS update of a whole parameter list, vectorised in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def lars_step(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    trust_coefficient: float,
    eps: float,
    adapt: bool,
    clip: bool,
) -> None:
    """Updates parameters and momentum buffers in place; each tensor is a layer of its own.

    With w a parameter, g its gradient and v its momentum buffer, all float32 of the same shape::

        rate = lr * lam          lam = trust_coefficient |w| / (|g| + weight_decay |w| + eps)
        v    = momentum v + rate (g + weight_decay w)
        w    = w - v

    which is Algorithm 1 of You, Gitman and Ginsburg (arXiv 1708.03888): learning rate and trust ratio act inside the
    momentum buffer, and weight decay acts in the denominator as well as in the step. With ``clip`` (LARC) the decay is
    left out of the denominator and rate = min(lr, lam). Where |w| or |g| is zero, and where ``adapt`` is false,
    rate = lr.
    """
    with torch.no_grad():
        rates = [lr] * len(params)
        if adapt:
            weight_norms = torch.stack(torch._foreach_norm(params))
            grad_norms = torch.stack(torch._foreach_norm(grads))
            decay_norms = 0.0 if clip else weight_decay * weight_norms
            lam = trust_coefficient * weight_norms / (grad_norms + decay_norms + eps)
            rate = lam.clamp(max=lr) if clip else lr * lam
            rates = rate.where((weight_norms > 0) & (grad_norms > 0), lr).tolist()
        # A loop and not foreach calls: on CPUs those are loops too, and they would need a temporary of every gradient.
        for param, grad, buffer, rate_of_layer in zip(params, grads, momentum_buffers, rates, strict=True):
            buffer.mul_(momentum).add_(grad, alpha=rate_of_layer)
            if weight_decay:
                buffer.add_(param, alpha=rate_of_layer * weight_decay)
            param.sub_(buffer)
