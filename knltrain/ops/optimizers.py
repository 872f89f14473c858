"""The updates of LARS, LAMB and SGD: a whole parameter list in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from knltrain.ops.library import operator
from knltrain.ops.native import address, check, kernels

_WEIGHTS = (torch.float32, torch.float64)  # kernels are for float32; float64 is for tests of the formulas
_MAX_RATE = torch.finfo(torch.float32).max  # a gradient near zero would ask for more
# With fewer parameters a task than this, starting a thread costs more than it saves.
_MIN_PARAMETERS_PER_TASK = 16384


def lars_step(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    copies: list[Tensor],
    squares: Tensor,
    *,
    lr: list[float],
    momentum: list[float],
    weight_decay: list[float],
    trust_coefficient: list[float],
    eps: list[float],
    adapt: list[bool],
    clip: list[bool],
    nesterov: list[bool],
) -> None:
    """Updates parameters and momentum buffers in place; each tensor is a layer with settings of its own.

    With w a parameter, g its gradient and v its momentum buffer::

        rate = lr * lam          lam = trust_coefficient |w| / (|g| + weight_decay |w| + eps)
        s    = rate (g + weight_decay w)
        v    = momentum v + s
        w    = w - v                     or, with nesterov, w - (s + momentum v)

    which is Algorithm 1 of You, Gitman and Ginsburg (arXiv 1708.03888): learning rate and trust ratio act inside the
    momentum buffer, and weight decay acts in the denominator as well as in the step. With ``clip`` (LARC) the decay is
    left out of the denominator and rate = min(lr, lam). Where |w| or |g| is zero, and where ``adapt`` is false,
    rate = lr.

    Args:
        params: float32.
        grads: float32 or bf16, of the parameters' shapes.
        momentum_buffers: float32, of the parameters' shapes.
        copies: bf16 copies of the parameters, overwritten with the new ones; empty tensors where there is none.
        squares: float64, one element a parameter: its sum of squares after the last update, or NaN where that is not
            known. Overwritten with the new ones.
        lr: learning rate of each parameter; and so on.
        momentum: fraction of the buffer that stays.
        weight_decay: L2 coefficient.
        trust_coefficient: eta.
        eps: added to the denominator.
        adapt: whether the trust ratio is used.
        clip: LARC.
        nesterov: look ahead along the buffer.

    Raises:
        ValueError: a wrong type, shape or device.
    """
    torch.ops.knltrain.lars_step(
        params,
        grads,
        momentum_buffers,
        copies,
        squares,
        lr,
        momentum,
        weight_decay,
        trust_coefficient,
        eps,
        adapt,
        clip,
        nesterov,
    )


def trust_ratio(
    weight_norm: float, grad_norm: float, *, weight_decay: float, trust_coefficient: float, eps: float, clip: bool
) -> float:
    """Returns lam of :func:`lars_step`, for two norms of which neither is zero."""
    decay_norm = 0.0 if clip else weight_decay * weight_norm
    return trust_coefficient * weight_norm / (grad_norm + decay_norm + eps)


def lamb_step(
    params: list[Tensor],
    grads: list[Tensor],
    first_moments: list[Tensor],
    second_moments: list[Tensor],
    copies: list[Tensor],
    *,
    steps: list[int],
    lr: list[float],
    beta1: list[float],
    beta2: list[float],
    weight_decay: list[float],
    eps: list[float],
    adapt: list[bool],
) -> None:
    """Updates parameters and moments in place; each tensor is a layer with settings of its own.

    With w a parameter, g its gradient, m and v its moments, and t its updates, this one included::

        m = beta1 m + (1 - beta1) g
        v = beta2 v + (1 - beta2) g^2
        r = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay w
        w = w - lr |w| / |r| r

    which is Algorithm 2 of You et al. (2019, arXiv 1904.00962) with the identity for its phi. Where |w| or |r| is zero,
    and where ``adapt`` is false, the step is lr r, which is AdamW's.

    Args:
        params: float32.
        grads: float32 or bf16, of the parameters' shapes.
        first_moments: float32, of the parameters' shapes.
        second_moments: likewise.
        copies: bf16 copies of the parameters, overwritten with the new ones; empty tensors where there is none.
        steps: t of each parameter, from 1; and so on.
        lr: learning rate.
        beta1: fraction of the first moment that stays.
        beta2: fraction of the second.
        weight_decay: decoupled, and part of the step that the trust ratio scales.
        eps: added to the root of the second moment.
        adapt: whether the trust ratio is used.

    Raises:
        ValueError: a wrong type, shape or device.
    """
    torch.ops.knltrain.lamb_step(
        params, grads, first_moments, second_moments, copies, steps, lr, beta1, beta2, weight_decay, eps, adapt
    )


def sgd_step(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    copies: list[Tensor],
    *,
    lr: list[float],
    momentum: list[float],
    weight_decay: list[float],
    nesterov: list[bool],
) -> None:
    """Updates parameters and momentum buffers in place.

    With w a parameter, g its gradient and v its momentum buffer::

        g' = g + weight_decay w
        v  = momentum v + g'
        w  = w - lr v                     or, with nesterov, w - lr (g' + momentum v)

    as torch.optim.SGD has it (dampening 0): the learning rate stays outside the buffer.

    Args:
        params: float32.
        grads: float32 or bf16, of the parameters' shapes.
        momentum_buffers: float32, of the parameters' shapes.
        copies: bf16 copies of the parameters, overwritten with the new ones; empty tensors where there is none.
        lr: learning rate of each parameter; and so on.
        momentum: fraction of the buffer that stays.
        weight_decay: L2 coefficient.
        nesterov: look ahead along the buffer.

    Raises:
        ValueError: a wrong type, shape or device.
    """
    torch.ops.knltrain.sgd_step(params, grads, momentum_buffers, copies, lr, momentum, weight_decay, nesterov)


@operator("lars_step", mutates=("params", "momentum_buffers", "copies", "squares"))
def _lars(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    copies: list[Tensor],
    squares: Tensor,
    lr: list[float],
    momentum: list[float],
    weight_decay: list[float],
    trust_coefficient: list[float],
    eps: list[float],
    adapt: list[bool],
    clip: list[bool],
    nesterov: list[bool],
) -> None:
    settings = (lr, momentum, weight_decay, trust_coefficient, eps, adapt, clip, nesterov)
    _check(params, grads, {"momentum_buffers": momentum_buffers}, copies, settings)
    check("squares", squares, (torch.float64,), (len(params),))
    module = kernels()
    if module is not None and _kernel_takes(params, grads, momentum_buffers, copies):
        module.lars_step(
            weights=_addresses(params),
            gradients=_addresses(grads),
            buffers=_addresses(momentum_buffers),
            copies=_addresses(copies),
            squares=address(squares),
            sizes=[param.numel() for param in params],
            gradient_is_bf16=[grad.dtype == torch.bfloat16 for grad in grads],
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            trust_coefficient=trust_coefficient,
            eps=eps,
            adapt=adapt,
            clip=clip,
            nesterov=nesterov,
            tasks=_tasks(params),
        )
        return
    for index, (param, grad, buffer) in enumerate(zip(params, grads, momentum_buffers, strict=True)):
        rate = lr[index]
        if adapt[index]:
            weight_norm = float(torch.linalg.vector_norm(param, dtype=torch.float64))
            grad_norm = float(torch.linalg.vector_norm(grad, dtype=torch.float64))
            if weight_norm != 0 and grad_norm != 0:  # a NaN norm gives a NaN rate
                lam = trust_ratio(
                    weight_norm,
                    grad_norm,
                    weight_decay=weight_decay[index],
                    trust_coefficient=trust_coefficient[index],
                    eps=eps[index],
                    clip=clip[index],
                )
                rate = (rate if lam > rate else lam) if clip[index] else rate * lam
                rate = _MAX_RATE if rate > _MAX_RATE else rate
        full = torch.add(grad, param, alpha=weight_decay[index]) if weight_decay[index] else grad
        buffer.mul_(momentum[index]).add_(full, alpha=rate)
        if nesterov[index]:
            param.sub_(full, alpha=rate).sub_(buffer, alpha=momentum[index])
        else:
            param.sub_(buffer)
    squares.fill_(torch.nan)
    _copy(params, copies)


@operator("lamb_step", mutates=("params", "first_moments", "second_moments", "copies"))
def _lamb(
    params: list[Tensor],
    grads: list[Tensor],
    first_moments: list[Tensor],
    second_moments: list[Tensor],
    copies: list[Tensor],
    steps: list[int],
    lr: list[float],
    beta1: list[float],
    beta2: list[float],
    weight_decay: list[float],
    eps: list[float],
    adapt: list[bool],
) -> None:
    settings = (steps, lr, beta1, beta2, weight_decay, eps, adapt)
    _check(params, grads, {"first_moments": first_moments, "second_moments": second_moments}, copies, settings)
    for index, param in enumerate(params):
        grad, first, second = grads[index].to(param.dtype), first_moments[index], second_moments[index]
        first.lerp_(grad, 1 - beta1[index])
        second.mul_(beta2[index]).addcmul_(grad, grad, value=1 - beta2[index])
        root = second.div(1 - beta2[index] ** steps[index]).sqrt_().add_(eps[index])
        update = first.div(1 - beta1[index] ** steps[index]).div_(root)
        if weight_decay[index]:
            update.add_(param, alpha=weight_decay[index])
        rate = lr[index]
        if adapt[index]:
            weight_norm = float(torch.linalg.vector_norm(param, dtype=torch.float64))
            update_norm = float(torch.linalg.vector_norm(update, dtype=torch.float64))
            if weight_norm != 0 and update_norm != 0:  # a NaN norm gives a NaN rate
                rate = min(rate * weight_norm / update_norm, _MAX_RATE)
        param.sub_(update, alpha=rate)
    _copy(params, copies)


@operator("sgd_step", mutates=("params", "momentum_buffers", "copies"))
def _sgd(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    copies: list[Tensor],
    lr: list[float],
    momentum: list[float],
    weight_decay: list[float],
    nesterov: list[bool],
) -> None:
    settings = (lr, momentum, weight_decay, nesterov)
    _check(params, grads, {"momentum_buffers": momentum_buffers}, copies, settings)
    module = kernels()
    if module is not None and _kernel_takes(params, grads, momentum_buffers, copies):
        module.sgd_step(
            weights=_addresses(params),
            gradients=_addresses(grads),
            buffers=_addresses(momentum_buffers),
            copies=_addresses(copies),
            sizes=[param.numel() for param in params],
            gradient_is_bf16=[grad.dtype == torch.bfloat16 for grad in grads],
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            nesterov=nesterov,
            tasks=_tasks(params),
        )
        return
    for index, (param, grad, buffer) in enumerate(zip(params, grads, momentum_buffers, strict=True)):
        full = torch.add(grad, param, alpha=weight_decay[index]) if weight_decay[index] else grad
        buffer.mul_(momentum[index]).add_(full)
        if nesterov[index]:
            full = torch.add(full, buffer, alpha=momentum[index])
        param.sub_(full if nesterov[index] else buffer, alpha=lr[index])
    _copy(params, copies)


def _copy(params: list[Tensor], copies: list[Tensor]) -> None:
    for param, copy in zip(params, copies, strict=True):
        if copy.numel():
            copy.copy_(param)


def _check(
    params: list[Tensor],
    grads: list[Tensor],
    states: dict[str, list[Tensor]],
    copies: list[Tensor],
    settings: tuple[list[float] | list[int] | list[bool], ...],
) -> None:
    if any(len(entry) != len(params) for entry in (grads, *states.values(), copies, *settings)):
        raise ValueError(f"there are {len(params)} parameters; every other list must be as long")
    for index, param in enumerate(params):
        shape = tuple(param.shape)
        check(f"params[{index}]", param, _WEIGHTS)
        check(f"grads[{index}]", grads[index], (param.dtype, torch.bfloat16), shape)
        for name, tensors in states.items():
            check(f"{name}[{index}]", tensors[index], (param.dtype,), shape)
        if copies[index].numel() or not param.numel():
            check(f"copies[{index}]", copies[index], (torch.bfloat16,), shape)


def _kernel_takes(
    params: list[Tensor], grads: list[Tensor], momentum_buffers: list[Tensor], copies: list[Tensor]
) -> bool:
    """Whether parameters are float32, and each is dense and laid out as its gradient, buffer and copy are."""
    for param, *companions in zip(params, grads, momentum_buffers, copies, strict=True):
        if param.dtype != torch.float32:
            return False
        if not (param.is_contiguous() or param.is_contiguous(memory_format=torch.channels_last)):
            return False
        if any(tensor.numel() and not _alike(param, tensor) for tensor in companions):
            return False
    return True


def _alike(one: Tensor, other: Tensor) -> bool:
    # The stride of a dimension of size one has no meaning.
    return one.stride() == other.stride() or all(
        length == 1 or ours == theirs
        for length, ours, theirs in zip(one.shape, one.stride(), other.stride(), strict=True)
    )


def _addresses(tensors: list[Tensor]) -> list[int]:
    return [tensor.data_ptr() if tensor.numel() else 0 for tensor in tensors]


def _tasks(params: list[Tensor]) -> int:
    return max(1, min(torch.get_num_threads(), sum(param.numel() for param in params) // _MIN_PARAMETERS_PER_TASK))
