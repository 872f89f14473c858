"""Local response normalisation across channels, with a backward pass that keeps only the input."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# The formula's exponent, 3/4, is part of the code: x^(-3/4) as two reciprocal roots is several times faster than pow.
BETA = 0.75


def local_response_norm(x: Tensor, *, size: int = 5, alpha: float = 1e-4) -> Tensor:
    """Y = x / (1 + alpha/size * sum of x² over the ``size`` channels around)^(3/4).

    Krizhevsky et al. 2012, section 3.3, with Caffe's k = 1. Float32 inside, whatever comes in, because the power of a
    bf16 sum loses its small part.

    Args:
        x: N x C x H x W, best channels-last.
        size: channels that a channel is normalised by, itself in the middle; odd.
        alpha: strength.

    Returns:
        Of the shape and type of ``x``.
    """
    with torch.autocast("cpu", enabled=False):
        y: Tensor = _LocalResponseNorm.apply(x, size, alpha)  # type: ignore[no-untyped-call]
    return y


class _LocalResponseNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, alpha: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.size, ctx.alpha = size, alpha
        wide = x.float()
        return wide.mul(_power(_denominator(wide, size, alpha))).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # With d = 1 + alpha/size * window(x²): dx = g d^-b - 2 alpha b / size * x * window(g x d^-b / d).
        (x,) = ctx.saved_tensors
        wide, grad = x.float(), grad.float()
        denominator = _denominator(wide, ctx.size, ctx.alpha)
        scaled = grad * _power(denominator)
        others = _window(scaled.mul(wide).div_(denominator), ctx.size)
        others.mul_(wide).mul_(2 * ctx.alpha * BETA / ctx.size)
        return scaled.sub_(others).to(x.dtype), None, None


def _denominator(x: Tensor, size: int, alpha: float) -> Tensor:
    return _window(x * x, size).mul_(alpha / size).add_(1)


def _power(denominator: Tensor) -> Tensor:
    """denominator^(-3/4)."""
    root = denominator.rsqrt()
    return root.sqrt().mul_(root)


def _window(x: Tensor, size: int) -> Tensor:
    """The sum over the ``size`` channels around each channel; channels beyond the first and last count as zero."""
    channels = x.shape[1]
    padded = F.pad(x.permute(0, 2, 3, 1), (size // 2, size // 2))
    total = padded[..., :channels].clone()
    for shift in range(1, size):
        total += padded[..., shift : shift + channels]
    return total.permute(0, 3, 1, 2)
