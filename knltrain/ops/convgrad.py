"""Convolutions, computed by native kernels where these are the faster ones."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from knltrain.node.topology import read_node
from knltrain.ops import bf16, pointwise, winograd
from knltrain.ops.library import operator, register_fake
from knltrain.ops.native import address, check_devices, check_images, isa, kernels, new_images


class Native(NamedTuple):
    """Which of a convolution's three results native kernels compute; the others are PyTorch's.

    Attributes:
        forward: the output.
        input: the gradient of the input.
        weight: the gradient of the weights.
    """

    forward: bool = False
    input: bool = False
    weight: bool = False


NONE = Native()


class Geometry(NamedTuple):
    """How the kernel of a convolution moves.

    Attributes:
        stride: down and across, in pixels.
        padding: zeros around the input, in pixels.
        dilation: distance of the kernel's elements, in pixels.
        groups: of channels, each convolved alone.
    """

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def is_pointwise(self, weight: Tensor) -> bool:
        """Whether :mod:`knltrain.ops.pointwise` computes it."""
        return pointwise.takes(weight.shape, self.stride, self.padding, self.groups)


def native_results(
    channels: int, weight_shape: Sequence[int], geometry: Geometry, dtype: torch.dtype = torch.float32
) -> Native:
    """The results of a convolution that there are kernels for, whether or not they are faster.

    Args:
        channels: of the whole input.
        weight_shape: K, C/groups, R, S.
        geometry: how the kernel moves.
        dtype: of its tensors. In bf16 this is Winograd's algorithm alone; see :func:`kernel_is_faster` for the rest.
    """
    stride, padding, dilation, groups = geometry
    if winograd.takes(channels, weight_shape, *geometry):
        return Native(True, True, True)
    if dtype == torch.bfloat16:
        return NONE
    both = pointwise.takes(weight_shape, stride, padding, groups)
    return Native(both, both, both or (dilation == (1, 1) and _takes_weight(weight_shape, groups)))


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    by: Native = NONE,
) -> Tensor:
    """torch.nn.functional.conv2d of tensors of one type, forward and backward by native kernels or by PyTorch.

    Args:
        x: N x C x H x W, channels-last.
        weight: K x C/groups x R x S, channels-last.
        bias: K, or None.
        stride: down and across, in pixels.
        padding: zeros around x, in pixels.
        dilation: distance of the kernel's elements, in pixels.
        groups: of channels, each convolved alone.
        by: the results that native kernels compute, among those of :func:`native_results`.

    Returns:
        N x K x H' x W', channels-last.
    """
    y: Tensor = _Conv2d.apply(x, weight, bias, Geometry(stride, padding, dilation, groups), by)  # type: ignore[no-untyped-call]
    return y


def conv2d_and_statistics(
    x: Tensor, weight: Tensor, shift: Tensor, geometry: Geometry, by: Native
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`conv2d` without a bias, and the statistics for the batch norm after it, both by a native kernel.

    Args:
        x: N x C x H x W, channels-last.
        weight: K x C/groups x R x S, likewise.
        shift: K, float32, estimates of the result's means.
        geometry: how the kernel moves.
        by: the results that native kernels compute, the forward pass among them.

    Returns:
        The result, N x K x H' x W', and its mean and biased variance over N, H and W, K each, without a gradient.
    """
    results: tuple[Tensor, Tensor, Tensor] = _Conv2dAndStatistics.apply(  # type: ignore[no-untyped-call]
        x, weight, shift, geometry, by
    )
    return results


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, by: Native) -> Tensor:
    """:func:`conv2d` without a gradient."""
    if not by.forward:
        return bf16.conv2d(x, weight, bias, *geometry)
    x, weight = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, weight))
    if geometry.is_pointwise(weight):
        return pointwise.conv2d(x, weight, bias, geometry.stride)
    return winograd.conv2d(x, weight, bias, geometry.padding, geometry.groups)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: list[int] | None,
    geometry: Geometry,
    needs: tuple[bool, bool, bool],
    by: Native,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The needed gradients of :func:`conv2d`'s x, weight and bias; None for the others.

    Args:
        dy: gradient of the output, channels-last.
        x: as it was given.
        weight: likewise.
        bias_sizes: shape of the bias, or None.
        geometry: as it was given.
        needs: which gradients are computed.
        by: as it was given.
    """
    if by != NONE:
        x, weight = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, weight))
    by_products = needs[1] and not by.weight and kernel_is_faster(x, dy, weight, geometry.dilation, geometry.groups)
    ours = by.weight or by_products
    dx = dweight = dbias = None
    theirs = (needs[0] and not by.input, needs[1] and not ours, needs[2] and not ours)
    if any(theirs):
        dx, dweight, dbias = bf16.conv2d_backward(dy, x, weight, bias_sizes, *geometry, theirs)
    if needs[0] and by.input:
        if geometry.is_pointwise(weight):
            dx = pointwise.conv2d_input(dy, weight, x.shape[2:], geometry.stride)
        else:
            dx = winograd.conv2d_input(dy, weight, geometry.padding, geometry.groups)
    if needs[1] and ours:
        shape, (stride, padding, dilation, groups) = list(weight.shape), geometry
        if by.weight and winograd.takes(x.shape[1], shape, stride, padding, dilation, groups):
            dweight, dbias = winograd.conv2d_weight(x, dy, shape, padding, groups, bias=needs[2])
        else:
            dweight = conv_weight_grad(x, dy, shape, stride, padding, groups)
    if needs[2] and dbias is None:
        dbias = dy.sum((0, 2, 3))
    return dx, dweight, dbias


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, by: Native) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.by = geometry, by
        ctx.bias_sizes = None if bias is None else list(bias.shape)
        return forward(x, weight, bias, geometry, by)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs, geometry = ctx.needs_input_grad[:3], cast("Geometry", ctx.geometry)
        dy = dy.contiguous(memory_format=torch.channels_last)
        if torch.is_grad_enabled():  # second derivatives: the kernels have none
            gradients = bf16.conv2d_backward(dy, x, weight, ctx.bias_sizes, *geometry, needs)
        else:
            gradients = backward(dy, x, weight, ctx.bias_sizes, geometry, needs, ctx.by)
        return *gradients, None, None


class _Conv2dAndStatistics(_Conv2d):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, shift: Tensor, geometry: Geometry, by: Native
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.by, ctx.bias_sizes = geometry, by, None
        x, weight = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, weight))
        if geometry.is_pointwise(weight):
            y, mean, var = pointwise.conv2d_and_statistics(x, weight, shift, geometry.stride)
        else:
            y, mean, var = winograd.conv2d_and_statistics(x, weight, shift, geometry.padding, geometry.groups)
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _mean: Tensor, _var: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _Conv2d.backward(ctx, dy)


def kernel_is_faster(x: Tensor, dy: Tensor, weight: Tensor, dilation: tuple[int, int], groups: int) -> bool:
    """Whether :func:`conv_weight_grad` takes these and is known to be faster: in bf16, on AVX512_BF16 without AMX.

    With AMX, oneDNN is faster.
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
    """The gradient of a convolution's weights: the sum over images and output pixels of dy times x.

    Args:
        x: N x C x H x W, float32 or bf16, channels-last.
        dy: N x K x H' x W', likewise.
        weight_shape: K, C/groups, R, S.
        stride: down and across, in pixels.
        padding: zeros around x, in pixels.
        groups: of channels; each has a multiple of 8 out and, where there are several, of 16 in.

    Returns:
        K x C/groups x R x S of x's type, channels-last; summed in float32.

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
        ours = new_images(x, weight_shape)
        if module.conv_weight_grad(
            x=address(x),
            dy=address(dy),
            dw=address(ours),
            x_shape=list(x.shape),
            dy_shape=list(dy.shape),
            kernel=weight_shape[2:],
            stride=stride,
            padding=padding,
            groups=groups,
            is_bf16=x.dtype == torch.bfloat16,
            tasks=torch.get_num_threads(),
        ):
            return ours
    weight = new_images(x, weight_shape)
    _, dw, _ = bf16.conv2d_backward(dy, x, weight, None, stride, padding, (1, 1), groups, (False, True, False))
    assert dw is not None
    return dw.contiguous(memory_format=torch.channels_last)


@register_fake("conv_weight_grad")
def _(x: Tensor, dy: Tensor, weight_shape: list[int], stride: list[int], padding: list[int], groups: int) -> Tensor:
    return new_images(x, weight_shape)


def _takes_weight(weight_shape: Sequence[int], groups: int) -> bool:
    outputs, inputs = weight_shape[:2]
    return outputs % groups == outputs // groups % 8 == 0 and (groups == 1 or inputs % 16 == 0)


def _check(x: Tensor, dy: Tensor, weight_shape: list[int], stride: list[int], padding: list[int], groups: int) -> None:
    check_images((torch.float32, torch.bfloat16), x=x, dy=dy)
    outputs, inputs, *kernel = weight_shape
    if groups < 1 or x.shape[1] != inputs * groups or not _takes_weight(weight_shape, groups):
        raise ValueError(f"weight of shape {tuple(weight_shape)} in {groups} groups does not go with x of "
                         f"{x.shape[1]} channels; groups must have a multiple of 8 out and, where there are several, "
                         "of 16 in")  # fmt: skip
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
