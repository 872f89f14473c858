"""Max pooling, with the ReLU that follows it where there is one, forward and backward.

The backward pass needs one byte an output: the index of its element in the window.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from knltrain.ops.library import operator, register_fake
from knltrain.ops.native import address, check, kernels, tasks_for

_FLOATS = (torch.bfloat16, torch.float32)
_MAX_ELEMENTS = 255
_NO_WINNER = 255  # in the place of an index: the ReLU stops the gradient


def max_pool2d(
    x: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    *,
    ceil_mode: bool = False,
    relu: bool = False,
) -> Tensor:
    """torch.nn.functional.max_pool2d of a channels-last image, and then ReLU if asked for.

    The first of equal elements gets the gradient; NaN counts as the largest. ReLU after pooling gives the same as
    before it, with less work.

    Args:
        x: N x C x H x W, channels-last in memory, bf16 or float32.
        kernel_size: of the window, pixels; at most 255 in all.
        stride: from window to window, pixels; the kernel's size if None.
        padding: around x, pixels; at most half the window.
        ceil_mode: windows may reach over the lower and right border.
        relu: whether there is a ReLU.

    Returns:
        N x C x H' x W', of the type and layout of ``x``.

    Raises:
        ValueError: a wrong type, layout, shape or device, or a window that does not fit.
    """
    kernel = _pair(kernel_size)
    y, _ = torch.ops.knltrain.max_pool2d(
        x, kernel, kernel if stride is None else _pair(stride), _pair(padding), ceil_mode, relu
    )
    result: Tensor = y
    return result


def takes_window(
    x: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None,
    padding: int | tuple[int, int],
    *,
    ceil_mode: bool,
) -> bool:
    """Whether :func:`max_pool2d` takes such windows of an image."""
    kernel, padded = _pair(kernel_size), _pair(padding)
    steps = kernel if stride is None else _pair(stride)
    return _fits(kernel, steps, padded) and min(_sizes(x, kernel, steps, padded, ceil_mode)) > 0


def _fits(kernel: list[int], stride: list[int], padding: list[int]) -> bool:
    """Whether the kernel computes such windows, of any image that has room for one."""
    few = min(kernel) > 0 and kernel[0] * kernel[1] <= _MAX_ELEMENTS and min(stride) > 0
    return few and all(0 <= pad <= length // 2 for pad, length in zip(padding, kernel, strict=True))


def _pair(value: int | tuple[int, int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


@operator("max_pool2d")
def _forward(
    x: Tensor, kernel: list[int], stride: list[int], padding: list[int], ceil_mode: bool, relu: bool
) -> tuple[Tensor, Tensor]:
    """The result, and the index of each output in its window: N x C x H' x W', uint8, channels-last."""
    shape = _output_shape(x, kernel, stride, padding, ceil_mode)
    module = kernels()
    y, winner = _empty(x, shape)
    if module is None or x.numel() == 0:
        return _forward_in_torch(x, y, winner, kernel, stride, padding, ceil_mode, relu)
    module.max_pool_forward(
        x=address(x),
        y=address(y),
        winner=address(winner),
        x_shape=list(x.shape),
        y_shape=shape,
        kernel=kernel,
        stride=stride,
        padding=padding,
        is_bf16=x.dtype == torch.bfloat16,
        relu=relu,
        tasks=tasks_for(x.numel()),
    )
    return y, winner


@register_fake("max_pool2d")
def _(
    x: Tensor, kernel: list[int], stride: list[int], padding: list[int], ceil_mode: bool, relu: bool
) -> tuple[Tensor, Tensor]:
    return _empty(x, [*x.shape[:2], *_sizes(x, kernel, stride, padding, ceil_mode)])


@operator("max_pool2d_backward")
def _backward(
    dy: Tensor, winner: Tensor, in_h: int, in_w: int, kernel: list[int], stride: list[int], padding: list[int]
) -> Tensor:
    """The gradient of x, of height ``in_h`` and width ``in_w``."""
    dy = dy.contiguous(memory_format=torch.channels_last)
    _check_image("dy", dy, _FLOATS)
    _check_image("winner", winner, (torch.uint8,), tuple(dy.shape))
    dx = _empty_gradient(dy, in_h, in_w)
    module = kernels()
    if module is None or dy.numel() == 0:
        return _backward_in_torch(dy, winner, dx, kernel, stride, padding)
    module.max_pool_backward(
        dy=address(dy),
        winner=address(winner),
        dx=address(dx),
        x_shape=list(dx.shape),
        dy_shape=list(dy.shape),
        kernel=kernel,
        stride=stride,
        padding=padding,
        is_bf16=dy.dtype == torch.bfloat16,
        tasks=tasks_for(dx.numel()),
    )
    return dx


@register_fake("max_pool2d_backward")
def _(
    dy: Tensor, winner: Tensor, in_h: int, in_w: int, kernel: list[int], stride: list[int], padding: list[int]
) -> Tensor:
    return _empty_gradient(dy, in_h, in_w)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, kernel, stride, padding, _, _ = inputs
    _, winner = output
    ctx.mark_non_differentiable(winner)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(winner)
    ctx.geometry = (x.shape[2], x.shape[3], kernel, stride, padding)


def _differentiate(ctx: Any, dy: Tensor | None, _winner: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 6
    (winner,) = ctx.saved_tensors
    if torch.is_grad_enabled():  # operations that PyTorch differentiates again
        in_h, in_w, kernel, stride, padding = ctx.geometry
        dx = _backward_in_torch(dy, winner, _empty_gradient(dy, in_h, in_w), kernel, stride, padding)
        return dx, *(None,) * 5
    return torch.ops.knltrain.max_pool2d_backward(dy, winner, *ctx.geometry), None, None, None, None, None


torch.library.register_autograd("knltrain::max_pool2d", _differentiate, setup_context=_save)


def _empty(x: Tensor, shape: list[int]) -> tuple[Tensor, Tensor]:
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return y, torch.empty_like(y, dtype=torch.uint8)


def _empty_gradient(dy: Tensor, in_h: int, in_w: int) -> Tensor:
    shape = (*dy.shape[:2], in_h, in_w)
    return torch.empty(shape, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)


def _sizes(x: Tensor, kernel: list[int], stride: list[int], padding: list[int], ceil_mode: bool) -> list[int]:
    """Height and width of the result."""
    sizes = []
    for size, length, step, pad in zip(x.shape[2:], kernel, stride, padding, strict=True):
        room = size + 2 * pad - length
        windows = (-(-room // step) if ceil_mode else room // step) + 1
        # A window that would begin beyond the image and its left padding is left out.
        sizes.append(windows - 1 if ceil_mode and (windows - 1) * step >= size + pad else windows)
    return sizes


def _output_shape(x: Tensor, kernel: list[int], stride: list[int], padding: list[int], ceil_mode: bool) -> list[int]:
    """The result's shape, after checking everything that the kernel relies on."""
    _check_image("x", x, _FLOATS)
    if not _fits(kernel, stride, padding):
        raise ValueError(f"kernel size {kernel} and stride {stride} must be positive, padding {padding} between 0 and "
                         f"half the kernel size, and the window have at most {_MAX_ELEMENTS} pixels")  # fmt: skip
    sizes = _sizes(x, kernel, stride, padding, ceil_mode)
    if min(sizes) < 1:
        raise ValueError(f"x of {x.shape[2]} x {x.shape[3]} pixels has no room for a window of {kernel}")
    return [*x.shape[:2], *sizes]


def _check_image(
    name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...] | None = None
) -> None:
    check(name, tensor, dtypes, shape)
    if tensor.dim() != 4 or not tensor.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, strides {tensor.stride()}; "
                         "it must be N x C x H x W, channels-last")  # fmt: skip


def _origins(count: int, stride: int, padding: int) -> Tensor:
    """Where along one side the windows begin, in pixels."""
    return torch.arange(count) * stride - padding


def _forward_in_torch(
    x: Tensor,
    y: Tensor,
    winner: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    largest, pixel = F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil_mode, return_indices=True)
    row = pixel // x.shape[3] - _origins(y.shape[2], stride[0], padding[0])[:, None]
    col = pixel % x.shape[3] - _origins(y.shape[3], stride[1], padding[1])
    element = row * kernel[1] + col
    if relu:
        largest = largest.relu()
        element = element.masked_fill(largest <= 0, _NO_WINNER)
    return y.copy_(largest), winner.copy_(element)


def _backward_in_torch(
    dy: Tensor, winner: Tensor, dx: Tensor, kernel: list[int], stride: list[int], padding: list[int]
) -> Tensor:
    n, channels, height, width = dx.shape
    element = winner.long()
    row = element // kernel[1] + _origins(dy.shape[2], stride[0], padding[0])[:, None]
    col = element % kernel[1] + _origins(dy.shape[3], stride[1], padding[1])
    pixel = (row * width + col).masked_fill(winner == _NO_WINNER, 0)
    gradient = dy.float().masked_fill(winner == _NO_WINNER, 0.0)
    sums = torch.zeros(n, channels, height * width)
    sums.scatter_add_(2, pixel.flatten(2), gradient.flatten(2))
    return dx.copy_(sums.view(dx.shape))
