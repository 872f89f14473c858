"""bf16 where PyTorch would sum it in bf16: products and sums in float32, results rounded once."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@functools.cache
def onednn_computes_bf16() -> bool:
    """Whether PyTorch leaves bf16 to oneDNN, which multiplies it and sums in float32.

    It does with AVX-512 BW, DQ and VL, unless ONEDNN_MAX_CPU_ISA hides them. Without, PyTorch's own convolutions sum
    the images' weight gradients, and overlapping data gradients, in bf16: with gradients of one sign the error is 0.7 %
    at 64 images of a micro-batch and 29 % at 512 [perf/results/bf16-without-onednn-2026-11-29]. Their forward passes,
    and dense layers both ways, sum in float32, but emulate each product.
    """
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear of bf16, computed in float32 forward and backward.

    Args:
        x: … x I, bf16.
        weight: O x I, bf16.
        bias: O, bf16, or None.

    Returns:
        … x O, bf16; like the gradients, rounded once.
    """
    with torch.autocast("cpu", enabled=False):
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(torch.bfloat16)


def widen_layer_norms(model: nn.Module) -> None:
    """Makes each LayerNorm of a network compute in float32 and return its input's type.

    PyTorch's own sums the gradients of bf16 weights and biases in bf16, on every processor: with gradients of one sign,
    the bias's is 1 % off at 512 rows and 75 % at 4,096 (torch 2.8 and 2.14). Its other normalisations do not.
    """
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.forward = functools.partial(_in_float32, module.forward)  # type: ignore[method-assign]


def _in_float32(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return forward(x.float()).to(x.dtype)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int] | list[int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """torch.conv2d of tensors of one type; bf16 in float32 where oneDNN does not compute it."""
    if x.dtype != torch.bfloat16 or onednn_computes_bf16():
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
    with torch.autocast("cpu", enabled=False):
        y = torch.conv2d(
            x.float(), weight.float(), None if bias is None else bias.float(), stride, padding, dilation, groups
        )
    return y.to(torch.bfloat16)


def conv2d_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: list[int] | None,
    stride: tuple[int, int] | list[int],
    padding: tuple[int, int] | list[int],
    dilation: tuple[int, int],
    groups: int,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of conv2d's x, weight and bias, in the type of dy; sums are in float32 on every processor."""
    if wanted[1] and list(weight.shape[2:]) == [1, 1] and weight.shape[1] < 8 and max(stride) > 1 and not any(padding):
        # With AVX2, oneDNN 3.7 writes beyond its memory here. So it gets only the pixels that are read, and no stride.
        read = x[:, :, :: stride[0], :: stride[1]].contiguous(memory_format=torch.channels_last)
        geometry, only_x = (stride, padding, dilation, groups), (True, False, False)
        dx = conv2d_backward(dy, x, weight, None, *geometry, only_x)[0] if wanted[0] else None
        rest = (False, True, wanted[2])
        return dx, *conv2d_backward(dy, read, weight, bias_sizes, (1, 1), padding, dilation, groups, rest)[1:]
    widen = dy.dtype == torch.bfloat16 and not onednn_computes_bf16()
    if widen:
        dy, x, weight = dy.float(), x.float(), weight.float()
    gradients: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(
        dy, x, weight, bias_sizes, stride, padding, dilation, False, (0, 0), groups, wanted
    )
    return tuple(one.to(torch.bfloat16) if widen and one is not None else one for one in gradients)
