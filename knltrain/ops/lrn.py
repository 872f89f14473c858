"""Local response normalisation across channels. The backward pass needs only the input."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from knltrain.ops.library import operator, register_fake
from knltrain.ops.native import address, check, kernels, tasks_for

# The formula's exponent, 3/4, is part of the code: x^(-3/4) as two reciprocal roots is several times faster than pow.
BETA = 0.75


def local_response_norm(x: Tensor, *, size: int = 5, alpha: float = 1e-4) -> Tensor:
    """Y = x / (1 + alpha/size * sum of x² over the ``size`` channels around)^(3/4).

    Krizhevsky et al. 2012, section 3.3, with Caffe's k = 1. Computed in float32 for either type: in bf16, a small sum
    would be lost beside the 1.

    Args:
        x: N x C x H x W, bf16 or float32, best channels-last.
        size: channels in a window, the normalised one in the middle; odd.
        alpha: strength.

    Returns:
        A tensor of the shape, type and layout of ``x``.

    Raises:
        ValueError: a wrong type, shape or device, or a window without a middle.
    """
    y: Tensor = torch.ops.knltrain.local_response_norm(x, size, alpha)
    return y


@operator("local_response_norm")
def _forward(x: Tensor, size: int, alpha: float) -> Tensor:
    _check(x, size)
    module = _kernels_for(x)
    if module is None:
        return _forward_in_torch(x, size, alpha)
    y = torch.empty_like(x)
    module.local_response_norm_forward(
        x=address(x),
        y=address(y),
        rows=x.numel() // x.shape[1],
        channels=x.shape[1],
        size=size,
        alpha=alpha,
        is_bf16=x.dtype == torch.bfloat16,
        tasks=tasks_for(x.numel()),
    )
    return y


@register_fake("local_response_norm")
def _(x: Tensor, size: int, alpha: float) -> Tensor:
    return torch.empty_like(x)


@operator("local_response_norm_backward")
def _backward(dy: Tensor, x: Tensor, size: int, alpha: float) -> Tensor:
    _check(x, size)
    check("dy", dy, (x.dtype,), tuple(x.shape))
    module = _kernels_for(x)
    if module is None:
        return _backward_in_torch(dy, x, size, alpha)
    dy = dy.contiguous(memory_format=torch.channels_last)
    dx = torch.empty_like(x)
    module.local_response_norm_backward(
        dy=address(dy),
        x=address(x),
        dx=address(dx),
        rows=x.numel() // x.shape[1],
        channels=x.shape[1],
        size=size,
        alpha=alpha,
        is_bf16=x.dtype == torch.bfloat16,
        tasks=tasks_for(x.numel()),
    )
    return dx


@register_fake("local_response_norm_backward")
def _(dy: Tensor, x: Tensor, size: int, alpha: float) -> Tensor:
    return torch.empty_like(x)


def _save(ctx: Any, inputs: tuple[Tensor, int, float], output: Tensor) -> None:
    x, ctx.size, ctx.alpha = inputs
    ctx.save_for_backward(x)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
    (x,) = ctx.saved_tensors
    if torch.is_grad_enabled():  # operations that PyTorch differentiates again
        wide = x.float()
        y = wide * (_window(wide * wide, ctx.size) * (ctx.alpha / ctx.size) + 1).pow(-BETA)
        (dx,) = torch.autograd.grad(y, x, dy.float(), create_graph=True)
        return dx, None, None
    return torch.ops.knltrain.local_response_norm_backward(dy, x, ctx.size, ctx.alpha), None, None


torch.library.register_autograd("knltrain::local_response_norm", _differentiate, setup_context=_save)


def _check(x: Tensor, size: int) -> None:
    check("x", x, (torch.bfloat16, torch.float32))
    if x.dim() != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be N x C x H x W")
    if size < 1 or size % 2 == 0:
        raise ValueError(f"a window of {size} channels has no middle; size must be odd")


def _kernels_for(x: Tensor) -> Any | None:
    """The native kernels, or None where there are none or x is not laid out for them."""
    return kernels() if x.numel() and x.is_contiguous(memory_format=torch.channels_last) else None


def _forward_in_torch(x: Tensor, size: int, alpha: float) -> Tensor:
    wide = x.float()
    return torch.empty_like(x).copy_(wide.mul(_power(_denominator(wide, size, alpha))))


def _backward_in_torch(dy: Tensor, x: Tensor, size: int, alpha: float) -> Tensor:
    # With d = 1 + alpha/size * window(x²): dx = dy d^-b - 2 alpha b / size * x * window(dy x d^-b / d).
    wide, wide_dy = x.float(), dy.float()
    denominator = _denominator(wide, size, alpha)
    scaled = wide_dy * _power(denominator)
    others = _window(scaled.mul(wide).div_(denominator), size)
    others.mul_(wide).mul_(2 * alpha * BETA / size)
    return torch.empty_like(x).copy_(scaled.sub_(others))


def _denominator(x: Tensor, size: int, alpha: float) -> Tensor:
    return _window(x * x, size).mul_(alpha / size).add_(1)


def _power(denominator: Tensor) -> Tensor:
    """denominator^(-3/4)."""
    root = denominator.rsqrt()
    return root.sqrt().mul_(root)


def _window(x: Tensor, size: int) -> Tensor:
    """The sum over the ``size`` channels around each channel, with zeros before the first and after the last."""
    channels = x.shape[1]
    padded = F.pad(x.permute(0, 2, 3, 1), (size // 2, size // 2))
    total = padded[..., :channels].clone()
    for shift in range(1, size):
        total += padded[..., shift : shift + channels]
    return total.permute(0, 3, 1, 2)
