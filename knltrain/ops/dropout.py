"""Dropout, with the ReLU before it where there is one, forward and backward.

The mask is a hash of a key and of an element's position in memory. So it is the same for any number of threads and need
not be kept: the backward pass computes it again from the key, or with a ReLU reads it off the result.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from knltrain.ops.library import operator, register_fake
from knltrain.ops.native import address, check, kernels, tasks_for

_FLOATS = (torch.bfloat16, torch.float32)
_RESOLUTION = 2**24  # of probabilities
_MAX_ELEMENTS = 2**32


def dropout(x: Tensor, p: float = 0.5, *, training: bool = True, relu: bool = False) -> Tensor:
    """In training, zero with probability ``p`` and x / (1 - p) otherwise; else x.

    Srivastava et al. 2014. The key of a call's random numbers is drawn from torch's default generator. A dropped NaN is
    zero.

    Args:
        x: any shape, bf16 or float32, contiguous or channels-last; fewer than 2^32 elements.
        p: probability to be dropped.
        training: whether anything is dropped.
        relu: whether a ReLU comes before.

    Returns:
        A tensor of the shape, type and layout of ``x``.

    Raises:
        ValueError: a wrong type, layout or device, or no probability.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability {p} must be between 0 and 1")
    if not training:
        return F.relu(x) if relu else x
    y: Tensor = torch.ops.knltrain.dropout(x, torch.randint(2**32, (2,)), p, relu)
    return y


@operator("dropout")
def _forward(x: Tensor, key: Tensor, p: float, relu: bool) -> Tensor:
    _check(x, key)
    module = kernels()
    if module is None or p == 1 or x.numel() == 0:
        return _forward_in_torch(x, key, p, relu)
    y = torch.empty_like(x)
    module.dropout_forward(
        x=address(x),
        y=address(y),
        count=x.numel(),
        key=key.tolist(),
        threshold=_threshold(p),
        scale=1 / (1 - p),
        is_bf16=x.dtype == torch.bfloat16,
        relu=relu,
        tasks=tasks_for(x.numel()),
    )
    return y


@register_fake("dropout")
def _(x: Tensor, key: Tensor, p: float, relu: bool) -> Tensor:
    return torch.empty_like(x)


@operator("dropout_backward")
def _backward(dy: Tensor, y: Tensor | None, key: Tensor, p: float) -> Tensor:
    """The gradient of x; ``y`` is the result where there is a ReLU, of dy's layout."""
    _check(dy, key)
    if y is not None:
        check("y", y, (dy.dtype,), tuple(dy.shape))
        if not _layouts(y) & _layouts(dy):
            raise ValueError(f"y has strides {y.stride()}; it must be laid out as dy, which has {dy.stride()}")
    module = kernels()
    if module is None or p == 1 or dy.numel() == 0:
        return _backward_in_torch(dy, y, key, p)
    dx = torch.empty_like(dy)
    module.dropout_backward(
        dy=address(dy),
        y=address(y),
        dx=address(dx),
        count=dy.numel(),
        key=key.tolist(),
        threshold=_threshold(p),
        scale=1 / (1 - p),
        is_bf16=dy.dtype == torch.bfloat16,
        relu=y is not None,
        tasks=tasks_for(dy.numel()),
    )
    return dx


@register_fake("dropout_backward")
def _(dy: Tensor, y: Tensor | None, key: Tensor, p: float) -> Tensor:
    return torch.empty_like(dy)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, float, bool], output: Tensor) -> None:
    _, key, ctx.p, relu = inputs
    ctx.save_for_backward(key, output if relu else None)
    ctx.layout = _layouts(output).pop()


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
    key, y = ctx.saved_tensors
    # The mask depends on positions in memory.
    dy = dy.contiguous(memory_format=ctx.layout)
    if torch.is_grad_enabled():  # operations that PyTorch differentiates again
        return _backward_in_torch(dy, y, key, ctx.p), None, None, None
    return torch.ops.knltrain.dropout_backward(dy, y, key, ctx.p), None, None, None


torch.library.register_autograd("knltrain::dropout", _differentiate, setup_context=_save)


def _check(x: Tensor, key: Tensor) -> None:
    check("x", x, _FLOATS)
    if not _layouts(x):
        raise ValueError(f"x has strides {x.stride()}; it must be contiguous or channels-last")
    if x.numel() >= _MAX_ELEMENTS:
        raise ValueError(f"x has {x.numel()} elements; it must have fewer than 2^32")
    check("key", key, (torch.int64,), (2,))


def _layouts(x: Tensor) -> set[torch.memory_format]:
    """The memory formats that x has; both, where they are the same."""
    formats = (torch.contiguous_format, torch.channels_last) if x.dim() == 4 else (torch.contiguous_format,)
    return {layout for layout in formats if x.is_contiguous(memory_format=layout)}


def _threshold(p: float) -> int:
    return math.ceil(p * _RESOLUTION)


def _forward_in_torch(x: Tensor, key: Tensor, p: float, relu: bool) -> Tensor:
    values = x.relu() if relu else x
    return torch.empty_like(x).copy_(_masked(values.float(), _kept(x, key, p), p))


def _backward_in_torch(dy: Tensor, y: Tensor | None, key: Tensor, p: float) -> Tensor:
    kept = _kept(dy, key, p) if y is None else (y <= 0).logical_not()
    return torch.empty_like(dy).copy_(_masked(dy.float(), kept, p))


def _masked(values: Tensor, kept: Tensor, p: float) -> Tensor:
    return torch.where(kept, values * (1 / (1 - p)) if p < 1 else values, 0.0)


def _kept(x: Tensor, key: Tensor, p: float) -> Tensor:
    """The mask of the elements of x that are kept, as the kernel computes it."""
    first, second = key.tolist()
    position = torch.empty_like(x, dtype=torch.int64)
    position.as_strided((x.numel(),), (1,)).copy_(torch.arange(x.numel()))
    return (_mix((_mix(position ^ first) + second) & 0xFFFFFFFF) >> 8) >= _threshold(p)


def _mix(x: Tensor) -> Tensor:
    """The 32-bit finalizer of MurmurHash3."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)
