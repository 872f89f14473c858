"""Convolutions with fewer multiplications: Winograd's minimal filtering, F(4x4, 3x3) and F(4x4, 5x5).

A tile of 4 x 4 outputs takes 36 products a pair of channels where the direct sum takes 144, and with kernels of 5 x 5
64 instead of 400 [Lavin and Gray, arXiv:1509.09308]. Rounding errors are larger: relative to float64, their root mean
square for post-ReLU data is at most 1.5e-6 with 3 x 3 and 4e-6 with 5 x 5, which tests check for the shapes of the
networks. bf16 is computed in float32 too, and results are rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from knltrain.ops import bf16
from knltrain.ops.library import operator, register_fake
from knltrain.ops.native import address, check, check_images, kernels, new_images

_KERNELS = (3, 5)
_PANEL = 16  # channels that the kernels compute together


def takes(
    channels_in: int,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> bool:
    """Whether the kernels compute such a convolution: 3 x 3 or 5 x 5, stride 1, groups of multiples of 16 channels.

    Args:
        channels_in: of the whole input.
        weight_shape: K, C/groups, R, S.
        stride: down and across, in pixels.
        padding: zeros around the input, in pixels.
        dilation: distance of the kernel's elements, in pixels.
        groups: of channels, each convolved alone.
    """
    outputs, inputs, height, width = weight_shape
    return (
        height == width
        and height in _KERNELS
        and tuple(stride) == tuple(dilation) == (1, 1)
        and max(padding) < height
        and channels_in == inputs * groups
        and outputs % groups == inputs % _PANEL == outputs // groups % _PANEL == 0
    )


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int], groups: int) -> Tensor:
    """torch.conv2d of stride 1 without dilation.

    Args:
        x: N x C x H x W, float32 or bf16, channels-last.
        weight: K x C/groups x R x R, likewise, of what :func:`takes` accepts.
        bias: K, or None.
        padding: zeros around x, in pixels.
        groups: of channels, each convolved alone.

    Returns:
        N x K x H' x W', channels-last.

    Raises:
        ValueError: a wrong type, layout, shape or device.
    """
    y: Tensor = torch.ops.knltrain.winograd_conv2d(x, weight, bias, padding, groups)
    return y


def conv2d_and_statistics(
    x: Tensor, weight: Tensor, shift: Tensor, padding: Sequence[int], groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`conv2d` without a bias, and the statistics for a batch norm after it.

    Args:
        x: N x C x H x W, float32 or bf16, channels-last.
        weight: K x C/groups x R x R, likewise, of what :func:`takes` accepts.
        shift: K, estimates of the means; sums are taken of the differences.
        padding: zeros around x, in pixels.
        groups: of channels, each convolved alone.

    Returns:
        The result, N x K x H' x W', and its mean and biased variance over N, H and W, K each.

    Raises:
        ValueError: a wrong type, layout, shape or device.
    """
    y, mean, var = torch.ops.knltrain.winograd_conv2d_and_statistics(x, weight, shift, padding, groups)
    return y, mean, var


def conv2d_input(dy: Tensor, weight: Tensor, padding: Sequence[int], groups: int) -> Tensor:
    """The gradient of :func:`conv2d`'s input.

    Args:
        dy: gradient of the output, N x K x H' x W', float32 or bf16, channels-last.
        weight: K x C/groups x R x R, likewise.
        padding: zeros that were around the input, in pixels.
        groups: of channels, each convolved alone.

    Returns:
        N x C x H x W, channels-last.

    Raises:
        ValueError: a wrong type, layout, shape or device.
    """
    dx: Tensor = torch.ops.knltrain.winograd_conv2d_input(dy, weight, padding, groups)
    return dx


def conv2d_weight(
    x: Tensor, dy: Tensor, weight_shape: Sequence[int], padding: Sequence[int], groups: int, *, bias: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The gradients of :func:`conv2d`'s weights and bias.

    Args:
        x: N x C x H x W, float32 or bf16, channels-last.
        dy: gradient of the output, N x K x H' x W', likewise.
        weight_shape: K, C/groups, R, R.
        padding: zeros around x, in pixels.
        groups: of channels, each convolved alone.
        bias: whether there is one.

    Returns:
        K x C/groups x R x R, channels-last; and K, or None without a bias.

    Raises:
        ValueError: a wrong type, layout, shape or device.
    """
    dweight, dbias = torch.ops.knltrain.winograd_conv2d_weight(x, dy, weight_shape, padding, groups, bias)
    return dweight, dbias if bias else None


@operator("winograd_conv2d")
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int], groups: int) -> Tensor:
    _check(x.shape[1], list(weight.shape), padding, groups, x=x, weight=weight)
    if bias is not None:
        check("bias", bias, (x.dtype,), (weight.shape[0],))
    y = new_images(x, _output_size(x.shape, weight.shape, padding))
    if y.numel() and _run_kernel(x, weight, y, padding, groups, bias=bias):
        return y
    return bf16.conv2d(x, weight, bias, (1, 1), padding, (1, 1), groups)


@operator("winograd_conv2d_and_statistics")
def _and_statistics(
    x: Tensor, weight: Tensor, shift: Tensor, padding: list[int], groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x.shape[1], list(weight.shape), padding, groups, x=x, weight=weight)
    check("shift", shift, (torch.float32,), (weight.shape[0],))
    y = new_images(x, _output_size(x.shape, weight.shape, padding))
    mean, var = torch.empty_like(shift), torch.empty_like(shift)
    if y.numel() and _run_kernel(x, weight, y, padding, groups, shift=shift, mean=mean, var=var):
        return y, mean, var
    y = bf16.conv2d(x, weight, None, (1, 1), padding, (1, 1), groups)
    var, mean = torch.var_mean(y.float(), dim=(0, 2, 3), correction=0)
    return y, mean, var


@operator("winograd_conv2d_input")
def _input(dy: Tensor, weight: Tensor, padding: list[int], groups: int) -> Tensor:
    channels = weight.shape[1] * groups
    _check(channels, list(weight.shape), padding, groups, dy=dy, weight=weight)
    size = weight.shape[2]
    padding_of_dy = [size - 1 - pad for pad in padding]
    image = [n + 2 * pad - size + 1 for n, pad in zip(dy.shape[2:], padding_of_dy, strict=True)]
    dx = new_images(dy, [dy.shape[0], channels, *image])
    if dy.numel() and dx.numel() and _run_kernel(dy, weight, dx, padding_of_dy, groups, input_grad=True):
        return dx
    return _backward(dy, dx, weight, padding, groups, 0)


@operator("winograd_conv2d_weight")
def _weight(
    x: Tensor, dy: Tensor, weight_shape: list[int], padding: list[int], groups: int, bias: bool
) -> tuple[Tensor, Tensor]:
    _check(x.shape[1], weight_shape, padding, groups, x=x, dy=dy)
    expected = _output_size(x.shape, weight_shape, padding)
    if list(dy.shape) != expected:
        raise ValueError(f"dy has shape {tuple(dy.shape)}; this convolution's output has {tuple(expected)}")
    dweight, dbias = new_images(x, weight_shape), x.new_empty(weight_shape[0] if bias else 0)
    module = kernels()
    if (
        module is not None
        and x.numel()
        and dy.numel()
        and module.winograd_weight_grad(
            x=address(x),
            dy=address(dy),
            dw=address(dweight),
            dbias=address(dbias if bias else None),
            x_shape=list(x.shape),
            dy_shape=list(dy.shape),
            kernel=weight_shape[2],
            padding=padding,
            groups=groups,
            is_bf16=x.dtype == torch.bfloat16,
            tasks=torch.get_num_threads(),
        )
    ):
        return dweight, dbias
    return _backward(dy, x, dweight, padding, groups, 1), dy.sum((0, 2, 3)) if bias else dbias


@register_fake("winograd_conv2d")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int], groups: int) -> Tensor:
    return new_images(x, _output_size(x.shape, weight.shape, padding))


@register_fake("winograd_conv2d_and_statistics")
def _(x: Tensor, weight: Tensor, shift: Tensor, padding: list[int], groups: int) -> tuple[Tensor, Tensor, Tensor]:
    y = new_images(x, _output_size(x.shape, weight.shape, padding))
    return y, torch.empty_like(shift), torch.empty_like(shift)


@register_fake("winograd_conv2d_input")
def _(dy: Tensor, weight: Tensor, padding: list[int], groups: int) -> Tensor:
    size = [n - 2 * pad + weight.shape[2] - 1 for n, pad in zip(dy.shape[2:], padding, strict=True)]
    return new_images(dy, [dy.shape[0], weight.shape[1] * groups, *size])


@register_fake("winograd_conv2d_weight")
def _(
    x: Tensor, dy: Tensor, weight_shape: list[int], padding: list[int], groups: int, bias: bool
) -> tuple[Tensor, Tensor]:
    return new_images(x, weight_shape), x.new_empty(weight_shape[0] if bias else 0)


def _run_kernel(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    padding: list[int],
    groups: int,
    *,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    input_grad: bool = False,
) -> bool:
    """Computes y of x, or with ``input_grad`` dx (here y) of dy (here x). False: the kernel cannot.

    The padding is that of x, or with ``input_grad`` of dy.
    """
    module = kernels()
    if module is None:
        return False
    done: bool = module.winograd(
        x=address(x),
        weight=address(weight),
        bias=address(bias),
        shift=address(shift),
        y=address(y),
        mean=address(mean),
        var=address(var),
        x_shape=list(x.shape),
        y_shape=list(y.shape),
        kernel=weight.shape[2],
        padding=padding,
        groups=groups,
        input_grad=input_grad,
        is_bf16=x.dtype == torch.bfloat16,
        tasks=torch.get_num_threads(),
    )
    return done


def _output_size(x_shape: Sequence[int], weight_shape: Sequence[int], padding: Sequence[int]) -> list[int]:
    size = [n + 2 * pad - weight_shape[2] + 1 for n, pad in zip(x_shape[2:], padding, strict=True)]
    if min(size) < 1:
        raise ValueError(f"an image of {x_shape[2]} x {x_shape[3]} with its padding is smaller than the kernel")
    return [x_shape[0], weight_shape[0], *size]


def _backward(dy: Tensor, x: Tensor, weight: Tensor, padding: list[int], groups: int, which: int) -> Tensor:
    """PyTorch's gradient, of the input (0) or the weights (1)."""
    wanted = (which == 0, which == 1, False)
    gradient = bf16.conv2d_backward(dy, x, weight, None, (1, 1), padding, (1, 1), groups, wanted)[which]
    assert gradient is not None
    return gradient.contiguous(memory_format=torch.channels_last)


def _check(channels: int, weight_shape: list[int], padding: list[int], groups: int, **tensors: Tensor) -> None:
    if len(weight_shape) != 4 or groups < 1 or min(padding) < 0 or not takes(
        channels, weight_shape, (1, 1), padding, (1, 1), groups
    ):  # fmt: skip
        raise ValueError(
            f"weight of shape {tuple(weight_shape)} with padding {tuple(padding)} in {groups} groups does not go with "
            f"{channels} channels; it must be 3 x 3 or 5 x 5, with multiples of 16 channels in and out of a group"
        )
    check_images((torch.float32, torch.bfloat16), **tensors)
