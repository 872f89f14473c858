"""Batch norm, the addition of a shortcut, and ReLU as one operation, forward and backward.

The backward pass needs the input, the result (which the next layer keeps too) and two vectors.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from knltrain.ops.library import operator, register_fake
from knltrain.ops.native import address, check, check_devices, kernels, tasks_for

_FLOATS = (torch.bfloat16, torch.float32)


def batch_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    residual: Tensor | None = None,
    relu: bool = True,
    cap: float | None = None,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Y = relu(weight * (x - mean) / sqrt(var + eps) + bias + residual), statistics over N, H and W.

    Ioffe and Szegedy, arXiv 1502.03167. In training, mean and variance are the batch's (biased), and the running ones
    move towards them by ``momentum`` (towards the unbiased variance), as torch.nn.BatchNorm2d does it.

    Args:
        x: N x C x H x W, channels-last in memory, bf16 or float32.
        weight: C, float32.
        bias: C, float32.
        running_mean: C, float32; may be None in training.
        running_var: C, float32; may be None in training.
        residual: added before ReLU; of x's shape, type and layout.
        relu: whether there is a ReLU.
        cap: upper bound of the ReLU, above 0; 6 for torch.nn.ReLU6.
        training: use and follow the batch's statistics.
        momentum: of the running statistics.
        eps: added to the variance.
        statistics: mean and biased variance of x, C each, float32, where they are known already; in training.

    Returns:
        A tensor of the shape, type and layout of ``x``.

    Raises:
        ValueError: a wrong type, layout, shape or device; training with one value per channel; statistics without it; a
            cap without a ReLU, or of 0 or less.
    """
    check_devices(x=x, weight=weight, bias=bias, residual=residual, running_mean=running_mean, running_var=running_var)
    _check(x, running_mean=running_mean, running_var=running_var)
    if cap is not None and not (relu and cap > 0):
        raise ValueError(f"cap is {cap}; " + ("it must be above 0" if relu else "it needs relu=True"))
    if (running_mean is None) != (running_var is None):
        raise ValueError("the running statistics go together: give running_mean and running_var, or neither")
    if training:
        if x.numel() == x.shape[1]:
            raise ValueError(f"one value per channel has no variance: {tuple(x.shape)} cannot be trained on")
        y, mean, var = torch.ops.knltrain.batch_norm_act(
            x, residual, weight, bias, *(statistics or (None, None)), True, relu, eps, cap
        )
        if running_mean is not None and running_var is not None and x.numel():
            count = x.numel() // x.shape[1]
            running_mean.lerp_(mean, momentum)
            running_var.lerp_(var * (count / (count - 1)), momentum)
    else:
        if statistics is not None:
            raise ValueError("without training the running statistics are used, and no others")
        if running_mean is None or running_var is None:
            raise ValueError("without training there must be running statistics")
        y, _, _ = torch.ops.knltrain.batch_norm_act(
            x, residual, weight, bias, running_mean, running_var, False, relu, eps, cap
        )
    result: Tensor = y
    return result


# Normalises by mean and var, or with None by those of x. In training the gradient takes either for those of x.
# Autograd registration needs a functional operator, so mean and var are returned in either case.
@operator("batch_norm_act")
def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    training: bool,
    relu: bool,
    eps: float,
    cap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, weight=weight, bias=bias, mean=mean, var=var, residual=residual)
    module = kernels()
    if module is None or x.numel() == 0:
        return _forward_in_torch(x, residual, weight, bias, mean, var, relu, eps, cap)
    computed = mean is None or var is None
    mean = torch.empty_like(weight) if mean is None else mean.clone()
    var = torch.empty_like(weight) if var is None else var.clone()
    y = torch.empty_like(x)
    module.batch_norm_forward(
        x=address(x),
        residual=address(residual),
        weight=address(weight),
        bias=address(bias),
        mean=address(mean),
        var=address(var),
        y=address(y),
        rows=x.numel() // x.shape[1],
        channels=x.shape[1],
        is_bf16=x.dtype == torch.bfloat16,
        training=computed,
        relu=relu,
        cap=math.inf if cap is None else cap,
        eps=eps,
        tasks=tasks_for(x.numel()),
    )
    return y, mean, var


@register_fake("batch_norm_act")
def _(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    training: bool,
    relu: bool,
    eps: float,
    cap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


@operator("batch_norm_act_backward")
def _backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    has_residual: bool,
    training: bool,
    relu: bool,
    eps: float,
    cap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, residual (empty without one), weight and bias; ``y`` is needed with a residual and a ReLU."""
    dy = dy.contiguous(memory_format=torch.channels_last)
    _check(x, weight=weight, bias=bias, mean=mean, var=var, dy=dy, y=y)
    if has_residual and relu and y is None:
        raise ValueError("with a residual and a ReLU, the gradient needs y")
    module = kernels()
    if module is None or x.numel() == 0:
        return _backward_in_torch(dy, x, y, weight, bias, mean, var, has_residual, training, relu, eps, cap)
    dx = torch.empty_like(x)
    dresidual = torch.empty_like(x) if has_residual else x.new_empty(0)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
    module.batch_norm_backward(
        dy=address(dy),
        x=address(x),
        y=address(y),
        weight=address(weight),
        bias=address(bias),
        mean=address(mean),
        var=address(var),
        dx=address(dx),
        dresidual=address(dresidual if has_residual else None),
        dweight=address(dweight),
        dbias=address(dbias),
        rows=x.numel() // x.shape[1],
        channels=x.shape[1],
        is_bf16=x.dtype == torch.bfloat16,
        training=training,
        relu=relu,
        cap=math.inf if cap is None else cap,
        eps=eps,
        tasks=tasks_for(x.numel()),
    )
    return dx, dresidual, dweight, dbias


@register_fake("batch_norm_act_backward")
def _(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    has_residual: bool,
    training: bool,
    relu: bool,
    eps: float,
    cap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dresidual = torch.empty_like(x) if has_residual else x.new_empty(0)
    return torch.empty_like(x), dresidual, torch.empty_like(weight), torch.empty_like(bias)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, residual, weight, bias, _, _, training, relu, eps, cap = inputs
    y, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    ctx.set_materialize_grads(False)
    # Without a residual, the ReLU's mask follows from x.
    ctx.save_for_backward(x, y if relu and residual is not None else None, weight, bias, mean, var)
    ctx.has_residual, ctx.training, ctx.relu, ctx.eps, ctx.cap = residual is not None, training, relu, eps, cap


def _differentiate(ctx: Any, dy: Tensor | None, _mean: None, _var: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 10
    x, y, weight, bias, mean, var = ctx.saved_tensors
    if torch.is_grad_enabled():
        return _differentiate_in_torch(ctx, dy, x, y, weight, bias, mean, var)
    dx, dresidual, dweight, dbias = torch.ops.knltrain.batch_norm_act_backward(
        dy, x, y, weight, bias, mean, var, ctx.has_residual, ctx.training, ctx.relu, ctx.eps, ctx.cap
    )
    return dx, dresidual if ctx.has_residual else None, dweight, dbias, *(None,) * 6


def _differentiate_in_torch(
    ctx: Any, dy: Tensor, x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor
) -> tuple[Tensor | None, ...]:
    """The same gradients, by operations that PyTorch differentiates again: the kernels have no second derivatives."""
    mean_given, var_given = (None, None) if ctx.training else (mean, var)
    z = F.batch_norm(x.float(), mean_given, var_given, weight, bias, ctx.training, momentum=0.0, eps=ctx.eps)
    dz = dy.float()
    if ctx.relu:
        result = z if y is None else y
        dz = dz * ((result > 0) & (result < (math.inf if ctx.cap is None else ctx.cap)))
    inputs = (x, weight, bias)
    needed = [tensor for tensor in inputs if tensor.requires_grad]
    gradients = iter(torch.autograd.grad(z, needed, dz, create_graph=True) if needed else ())
    dx, dweight, dbias = (next(gradients) if tensor.requires_grad else None for tensor in inputs)
    return dx, dz.to(dy.dtype) if ctx.has_residual else None, dweight, dbias, *(None,) * 6


torch.library.register_autograd("knltrain::batch_norm_act", _differentiate, setup_context=_save)


def _check(x: Tensor, **others: Tensor | None) -> None:
    check("x", x, _FLOATS)
    if x.dim() != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be N x C x H x W")
    for name, tensor in {"x": x, **others}.items():
        if tensor is None:
            continue
        if name in ("x", "residual", "dy", "y"):
            check(name, tensor, (x.dtype,), tuple(x.shape))
            if not tensor.is_contiguous(memory_format=torch.channels_last):
                raise ValueError(f"{name} has strides {tensor.stride()}; it must be channels-last")
        else:
            check(name, tensor, (torch.float32,), (x.shape[1],))
            if not tensor.is_contiguous():
                raise ValueError(f"{name} has strides {tensor.stride()}; it must be contiguous")


def _rows(tensor: Tensor) -> Tensor:
    """N x C x H x W, channels-last, as the matrix of its pixels: float32, N H W x C."""
    return tensor.permute(0, 2, 3, 1).reshape(-1, tensor.shape[1]).float()


def _like(rows: Tensor, x: Tensor) -> Tensor:
    """The reverse of :func:`_rows`, in the type of ``x``."""
    n, c, h, w = x.shape
    return rows.view(n, h, w, c).to(x.dtype).permute(0, 3, 1, 2)


def _forward_in_torch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    relu: bool,
    eps: float,
    cap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = _rows(x)
    if mean is not None and var is not None:
        mean, var = mean.clone(), var.clone()
    elif len(rows):
        var, mean = torch.var_mean(rows, dim=0, correction=0)
    else:
        mean, var = torch.zeros_like(weight), torch.ones_like(weight)  # of no images
    rows = (rows - mean) * (weight * (var + eps).rsqrt()) + bias
    if residual is not None:
        rows = rows + _rows(residual)
    return _like(rows.clamp(0, cap) if relu else rows, x), mean, var


def _backward_in_torch(
    dy: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    var: Tensor,
    has_residual: bool,
    training: bool,
    relu: bool,
    eps: float,
    cap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # dx = weight / sqrt(var + eps) * (dz - mean(dz) - xhat mean(dz xhat)), arXiv 1502.03167, section 3.
    inverse = (var + eps).rsqrt()
    normalized = (_rows(x) - mean) * inverse
    dz = _rows(dy).clone()  # what an operator returns may not be a view of what it was given
    if relu:
        z = _rows(y) if y is not None else normalized * weight + bias
        dz = dz.masked_fill(z <= 0, 0.0)
        if cap is not None:
            dz = dz.masked_fill(z >= cap, 0.0)
    dbias, dweight = dz.sum(0), (dz * normalized).sum(0)
    rows = dz
    if training:
        rows = dz - (dbias + normalized * dweight) / dz.shape[0]
    dresidual = _like(dz, x) if has_residual else x.new_empty(0)
    return _like(rows * (weight * inverse), x), dresidual, dweight, dbias
