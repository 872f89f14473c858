"""A convolution that is computed by kernels of ours where those are the faster ones."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from knltrain.node.topology import read_node
from knltrain.ops import bf16, winograd
from knltrain.ops.library import operator, register_fake
from knltrain.ops.native import address, check, check_devices, isa, kernels


class Winograd(NamedTuple):
    """Which of a convolution's three results Winograd's algorithm computes; the others are summed directly.

    Attributes:
        forward: the output.
        input: the gradient of the input.
        weight: the gradient of the weights.
    """

    forward: bool = False
    input: bool = False
    weight: bool = False


DIRECT = Winograd()


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    by: Winograd = DIRECT,
) -> Tensor:
    """torch.nn.functional.conv2d of tensors of one type, with faster ways there and back.

    Args:
        x: N x C x H x W, channels-last.
        weight: K x C/groups x R x S, channels-last.
        bias: K, or None.
        stride: down and across, in pixels.
        padding: zeros around x, in pixels.
        dilation: distance of the kernel's elements, in pixels.
        groups: of channels, each convolved alone.
        by: what Winograd's algorithm computes; float32, of what :func:`knltrain.ops.winograd.takes` accepts.

    Returns:
        N x K x H' x W', channels-last.
    """
    y: Tensor = _Conv2d.apply(x, weight, bias, stride, padding, dilation, groups, by)  # type: ignore[no-untyped-call]
    return y


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
        by: Winograd,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = (stride, padding, dilation, groups)
        ctx.by = by
        ctx.bias_sizes = None if bias is None else list(bias.shape)
        if by.forward:
            x, weight = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, weight))
            return winograd.conv2d(x, weight, bias, padding, groups)
        return bf16.conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dy = dy.contiguous(memory_format=torch.channels_last)
        by, ours = ctx.by, needs_weight and kernel_is_faster(x, dy, weight, dilation, groups)
        if torch.is_grad_enabled():  # these gradients are to have gradients, which PyTorch's have and the kernels' not
            by, ours = DIRECT, False
        if by != DIRECT:
            x, weight = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, weight))
        dx = dweight = dbias = None
        theirs = (
            needs_x and not by.input,
            needs_weight and not ours and not by.weight,
            needs_bias and not ours and not by.weight,
        )
        if any(theirs):
            dx, dweight, dbias = bf16.conv2d_backward(
                dy, x, weight, ctx.bias_sizes, stride, padding, dilation, groups, theirs
            )
        if needs_x and by.input:
            dx = winograd.conv2d_input(dy, weight, padding, groups)
        if needs_weight and by.weight:
            dweight = winograd.conv2d_weight(x, dy, list(weight.shape), padding, groups)
        elif ours:
            dweight = conv_weight_grad(x, dy, list(weight.shape), stride, padding, groups)
        if needs_bias and dbias is None:
            dbias = dy.sum((0, 2, 3))
        return dx, dweight, dbias, None, None, None, None, None


def kernel_is_faster(x: Tensor, dy: Tensor, weight: Tensor, dilation: tuple[int, int], groups: int) -> bool:
    """Whether :func:`conv_weight_grad` takes these and is the faster way.

    It is written for AVX512_BF16. Where the processor has AMX, oneDNN uses it and is ahead.
    """
    return (
        x.dtype == dy.dtype == weight.dtype == torch.bfloat16
        and dilation == (1, 1)
        and x.shape[1] // groups % 16 == 0
        and dy.shape[1] // groups % 8 == 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and isa() == "avx512_bf16"
        and not _has_amx()
        and kernels() is not None
    )


@functools.cache
def _has_amx() -> bool:
    return "amx_bf16" in read_node().flags


def conv_weight_grad(
    x: Tensor,
    dy: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    groups: int,
) -> Tensor:
    """The gradient of a convolution's weights: the sum over images and pixels of dy times the x that it met.

    Args:
        x: N x C x H x W, bf16, channels-last.
        dy: N x K x H' x W', likewise.
        weight_shape: K, C/groups, R, S.
        stride: down and across, in pixels.
        padding: zeros around x, in pixels.
        groups: of channels; each has a multiple of 16 in and of 8 out.

    Returns:
        K x C/groups x R x S, bf16, channels-last; summed in float32.

    Raises:
        ValueError: a wrong type, layout, shape or device.
    """
    check_devices(x=x, dy=dy)
    dw: Tensor = torch.ops.knltrain.conv_weight_grad(x, dy, weight_shape, stride, padding, groups)
    return dw


@operator("conv_weight_grad")
def _conv_weight_grad(
    x: Tensor, dy: Tensor, weight_shape: list[int], stride: list[int], padding: list[int], groups: int
) -> Tensor:
    _check(x, dy, weight_shape, stride, padding, groups)
    module = kernels()
    if x.numel() and dy.numel() and module is not None:
        ours = torch.empty(weight_shape, dtype=x.dtype, memory_format=torch.channels_last)
        if module.conv_weight_grad(
            address(x),
            address(dy),
            address(ours),
            list(x.shape),
            list(dy.shape),
            weight_shape[2:],
            stride,
            padding,
            groups,
            True,
            torch.get_num_threads(),
        ):
            return ours
    weight = torch.empty(weight_shape, dtype=x.dtype, memory_format=torch.channels_last)
    _, dw, _ = bf16.conv2d_backward(dy, x, weight, None, stride, padding, (1, 1), groups, (False, True, False))
    assert dw is not None
    return dw.contiguous(memory_format=torch.channels_last)


@register_fake("conv_weight_grad")
def _(x: Tensor, dy: Tensor, weight_shape: list[int], stride: list[int], padding: list[int], groups: int) -> Tensor:
    return torch.empty(weight_shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _check(x: Tensor, dy: Tensor, weight_shape: list[int], stride: list[int], padding: list[int], groups: int) -> None:
    for name, tensor in (("x", x), ("dy", dy)):
        check(name, tensor, (torch.bfloat16,))
        if tensor.dim() != 4 or not tensor.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, strides {tensor.stride()}; "
                             "it must be N x C x H x W, channels-last")  # fmt: skip
    outputs, inputs, *kernel = weight_shape
    if groups < 1 or x.shape[1] != inputs * groups or outputs % groups or inputs % 16 or outputs // groups % 8:
        raise ValueError(f"weight of shape {tuple(weight_shape)} in {groups} groups does not go with x of "
                         f"{x.shape[1]} channels; groups must have a multiple of 16 in and of 8 out")  # fmt: skip
    if min(kernel) < 1:
        raise ValueError(f"weight has shape {tuple(weight_shape)}: a kernel without elements")
    if min(stride) < 1 or min(padding) < 0:
        raise ValueError(f"stride {stride} must be positive and padding {padding} not negative")
    expected = [x.shape[0], outputs] + [
        (size + 2 * pad - length) // step + 1
        for size, pad, length, step in zip(x.shape[2:], padding, kernel, stride, strict=True)
    ]
    if list(dy.shape) != expected:
        raise ValueError(f"dy has shape {tuple(dy.shape)}; this convolution's output has {tuple(expected)}")
