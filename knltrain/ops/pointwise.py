"""Float32 convolutions with a kernel of 1 x 1, which are matrix products of pixels and channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from knltrain.ops.library import operator, register_fake
from knltrain.ops.native import address, check, check_images, kernels, new_images

_PANEL = 16  # channels that the kernels compute together


def takes(weight_shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], groups: int) -> bool:
    """Whether the kernels compute such a convolution: 1 x 1 without padding or groups, multiples of 16 channels.

    Args:
        weight_shape: K, C/groups, R, S.
        stride: down and across, in pixels.
        padding: zeros around the input, in pixels.
        groups: of channels, each convolved alone.
    """
    outputs, inputs, *kernel = weight_shape
    return (
        kernel == [1, 1]
        and min(stride) > 0
        and tuple(padding) == (0, 0)
        and groups == 1
        and outputs % _PANEL == inputs % _PANEL == 0
    )


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int]) -> Tensor:
    """torch.conv2d of a kernel of 1 x 1.

    Args:
        x: N x C x H x W, float32, channels-last.
        weight: K x C x 1 x 1; K and C are multiples of 16.
        bias: K, or None.
        stride: down and across, in pixels.

    Returns:
        N x K x H' x W', channels-last.

    Raises:
        ValueError: a wrong type, layout, shape or device.
    """
    y: Tensor = torch.ops.knltrain.pointwise_conv2d(x, weight, bias, stride)
    return y


def conv2d_and_statistics(
    x: Tensor, weight: Tensor, shift: Tensor, stride: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`conv2d` without a bias, and the statistics for a batch norm after it.

    Args:
        x: N x C x H x W, float32, channels-last.
        weight: K x C x 1 x 1; K and C are multiples of 16.
        shift: K, estimates of the means; sums are taken of the differences.
        stride: down and across, in pixels.

    Returns:
        The result, N x K x H' x W', and its mean and biased variance over N, H and W, K each.

    Raises:
        ValueError: a wrong type, layout, shape or device.
    """
    y, mean, var = torch.ops.knltrain.pointwise_conv2d_and_statistics(x, weight, shift, stride)
    return y, mean, var


def conv2d_input(dy: Tensor, weight: Tensor, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    """The gradient of :func:`conv2d`'s input.

    Args:
        dy: gradient of the output, N x K x H' x W', float32, channels-last.
        weight: K x C x 1 x 1.
        size: height and width of the input, in pixels.
        stride: down and across, in pixels.

    Returns:
        N x C x H x W, channels-last.

    Raises:
        ValueError: a wrong type, layout, shape or device.
    """
    dx: Tensor = torch.ops.knltrain.pointwise_conv2d_input(dy, weight, size, stride)
    return dx


@operator("pointwise_conv2d")
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int]) -> Tensor:
    _check("x", x, weight, stride, x.shape[1] == weight.shape[1])
    if bias is not None:
        check("bias", bias, (torch.float32,), (weight.shape[0],))
    y = new_images(x, [x.shape[0], weight.shape[0], *_output_size(x.shape[2:], stride)])
    if y.numel() and _run_kernel(x, weight, y, stride, bias=bias):
        return y
    return torch.conv2d(x, weight, bias, stride)


@operator("pointwise_conv2d_and_statistics")
def _and_statistics(x: Tensor, weight: Tensor, shift: Tensor, stride: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    _check("x", x, weight, stride, x.shape[1] == weight.shape[1])
    check("shift", shift, (torch.float32,), (weight.shape[0],))
    y = new_images(x, [x.shape[0], weight.shape[0], *_output_size(x.shape[2:], stride)])
    mean, var = torch.empty_like(shift), torch.empty_like(shift)
    if y.numel() and _run_kernel(x, weight, y, stride, shift=shift, mean=mean, var=var):
        return y, mean, var
    y = torch.conv2d(x, weight, None, stride)
    var, mean = torch.var_mean(y, dim=(0, 2, 3), correction=0)
    return y, mean, var


@operator("pointwise_conv2d_input")
def _input(dy: Tensor, weight: Tensor, size: list[int], stride: list[int]) -> Tensor:
    _check("dy", dy, weight, stride, dy.shape[1] == weight.shape[0])
    if list(dy.shape[2:]) != _output_size(size, stride):
        raise ValueError(f"dy has shape {tuple(dy.shape)}; of an image of {size[0]} x {size[1]} pixels "
                         f"{' x '.join(map(str, _output_size(size, stride)))} outputs are made")  # fmt: skip
    dx = new_images(dy, [dy.shape[0], weight.shape[1], *size])
    if dy.numel() and _run_kernel(dy, weight, dx, stride, input_grad=True):
        return dx
    gradients = torch.ops.aten.convolution_backward(
        dy, dx, weight, None, stride, [0, 0], [1, 1], False, [0, 0], 1, [True, False, False]
    )
    gradient: Tensor = gradients[0].contiguous(memory_format=torch.channels_last)
    return gradient


@register_fake("pointwise_conv2d")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int]) -> Tensor:
    return new_images(x, [x.shape[0], weight.shape[0], *_output_size(x.shape[2:], stride)])


@register_fake("pointwise_conv2d_and_statistics")
def _(x: Tensor, weight: Tensor, shift: Tensor, stride: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    y = new_images(x, [x.shape[0], weight.shape[0], *_output_size(x.shape[2:], stride)])
    return y, torch.empty_like(shift), torch.empty_like(shift)


@register_fake("pointwise_conv2d_input")
def _(dy: Tensor, weight: Tensor, size: list[int], stride: list[int]) -> Tensor:
    return new_images(dy, [dy.shape[0], weight.shape[1], *size])


def _run_kernel(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    stride: list[int],
    *,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    input_grad: bool = False,
) -> bool:
    """Computes y of x, or with ``input_grad`` dx (here y) of dy (here x). False: the kernel cannot."""
    module = kernels()
    if module is None:
        return False
    done: bool = module.pointwise(
        x=address(x),
        weight=address(weight),
        bias=address(bias),
        shift=address(shift),
        y=address(y),
        mean=address(mean),
        var=address(var),
        x_shape=list(x.shape),
        y_shape=list(y.shape),
        stride=stride,
        input_grad=input_grad,
        tasks=torch.get_num_threads(),
    )
    return done


def _output_size(size: Sequence[int], stride: Sequence[int]) -> list[int]:
    """Height and width of the output."""
    return [(n + step - 1) // step for n, step in zip(size, stride, strict=True)]


def _check(name: str, tensor: Tensor, weight: Tensor, stride: list[int], goes_with: bool) -> None:
    if weight.dim() != 4 or not goes_with or not takes(weight.shape, stride, (0, 0), 1):
        raise ValueError(
            f"weight of shape {tuple(weight.shape)} with stride {tuple(stride)} does not go with {name} of shape "
            f"{tuple(tensor.shape)}; it must be 1 x 1, with multiples of 16 channels in and out"
        )
    check_images((torch.float32,), **{name: tensor}, weight=weight)
