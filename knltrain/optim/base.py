"""Base of LARS, LAMB and SGD: float32 parameters, of which the network may use bf16 working copies."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class MasterOptimizer(torch.optim.Optimizer):
    """An optimizer of float32 parameters, some of which have a bf16 working copy that the network computes with.

    Such a parameter uses its copy's gradient, and each step writes both. :meth:`accumulate_fp32` sums the gradients of
    several micro-batches in float32.
    """

    # Names of a parameter's state tensors, which have its shape and start at zero.
    _buffers: tuple[str, ...] = ("momentum_buffer",)

    # PyTorch wraps these to exclude them from compilation; the first call imports torch._dynamo, 1 s of start-up.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    _zero_parameters_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        self.working_copies: dict[Tensor, nn.Parameter] = {}
        self.accumulated: dict[Tensor, Tensor] = {}

    def use_working_copies(self, copies: Mapping[Tensor, nn.Parameter]) -> None:
        """Sets bf16 copies of parameters, whose gradients :meth:`step` uses and to which it writes new weights."""
        self.working_copies.update(copies)

    def accumulate_fp32(self) -> None:
        """Adds the copies' gradients to float32 sums and clears them, between the micro-batches of a step."""
        for copy in self.working_copies.values():
            if copy.grad is None:
                continue
            if copy in self.accumulated:
                self.accumulated[copy].add_(copy.grad)
            else:
                self.accumulated[copy] = copy.grad.float()
            copy.grad = None

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """Returns the gradient that :meth:`step` uses for a parameter or a copy: the sum over micro-batches, if any."""
        summed = self.accumulated.get(parameter)
        if summed is not None and parameter.grad is not None:
            summed.add_(parameter.grad)
            parameter.grad = None
        return parameter.grad if summed is None else summed

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of parameters and copies."""
        self._zero_parameters_grad(set_to_none)
        self.accumulated.clear()
        for copy in self.working_copies.values():
            copy.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss.

        Raises:
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        params, grads, copies, groups = [], [], [], []
        for group in self.param_groups:
            for parameter in group["params"]:
                copy = self.working_copies.get(parameter)
                grad = self.gradient(parameter if copy is None else copy)
                if grad is None:
                    continue
                if grad.is_sparse:
                    raise RuntimeError(f"{type(self).__name__} does not take sparse gradients")
                state: dict[str, Any] = self.state[parameter]
                for name in self._buffers:
                    if name not in state:
                        state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                params.append(parameter)
                grads.append(grad)
                copies.append(parameter.new_empty(0, dtype=torch.bfloat16) if copy is None else copy.detach())
                groups.append(group)
        if params:
            self._update(params, grads, copies, groups)
        return loss

    def trust_ratios(self, norms: Mapping[str, float]) -> dict[str, dict[str, float | None]]:
        """Returns the trust ratios of the next :meth:`step`; empty if the optimizer has none.

        Args:
            norms: gradient norms by parameter name.

        Returns:
            By kind of parameter group, the ratios by name; None if a norm is zero, where the global rate is used.
        """
        return {}

    def _update(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        copies: list[Tensor],
        groups: list[dict[str, Any]],
    ) -> None:
        """Updates parameters, their state and copies; ``groups`` has each parameter's group."""
        raise NotImplementedError
