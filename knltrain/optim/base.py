"""Base of LARS, LAMB and SGD: float32 parameters, of which the network may use bf16 working copies."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class _Mark(NamedTuple):
    """An option by which another optimizer's saved state is known, and what its buffers hold."""

    option: str
    whose: str
    holds: str


_MARKS = (
    _Mark("trust_coefficient", "knltrain's LARS", "steps with their learning rates"),
    _Mark("trust_coeff", "timm's Lars", "scaled gradients without their learning rates"),
    _Mark("betas", "Adam's family", "moments of gradients"),
    _Mark("dampening", "torch.optim.SGD, or of apex's LARC around it", "gradients without their learning rates"),
)


class MasterOptimizer(torch.optim.Optimizer):
    """An optimizer of float32 parameters, some of which have a bf16 working copy that the network computes with.

    Such a parameter uses its copy's gradient, and each step writes both. :meth:`accumulate_fp32` sums the gradients of
    several micro-batches in float32.

    Attributes:
        carries_norms: LARS keeps the norms of weights from the update that wrote them, which saves a pass over the
            weights. For a loop in which nobody else writes to them: a write through ``.data`` or NumPy is not seen.
    """

    carries_norms = False
    # Names of a parameter's state tensors, which have its shape and start at zero.
    _buffers: tuple[str, ...] = ("momentum_buffer",)
    # Options that are younger than some saved states, and what those states mean.
    _later_options: Mapping[str, Any] = {}
    # Options of other optimizers with which a state means the same here, and their only values.
    _equal_options: Mapping[str, Any] = {}

    # PyTorch wraps these to exclude them from compilation; the first call imports torch._dynamo, 1 s of start-up.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    _load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    _zero_parameters_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        self.working_copies: dict[Tensor, nn.Parameter] = {}
        self.accumulated: dict[Tensor, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "working_copies": self.working_copies, "accumulated": self.accumulated}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for option, value in self._later_options.items():
                group.setdefault(option, value)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues a state that :meth:`state_dict` gave, for the same parameters in the same groups.

        What parameters are called here, and the kind of each group, stays. Buffers are copied.

        Raises:
            ValueError: the state is of another optimizer or of other parameters; nothing has changed.
        """
        groups = list(state_dict["param_groups"])
        state = {
            index: {name: value for name, value in entries.items() if value is not None}
            for index, entries in state_dict["state"].items()
        }
        lengths, saved = ([len(group["params"]) for group in some] for some in (self.param_groups, groups))
        if lengths == saved:  # else torch says what is wrong
            for place, (group, live) in enumerate(zip(groups, self.param_groups, strict=True)):
                self._refuse_another_optimizers(group)
                groups[place] = {**group, **{key: live[key] for key in ("names", "kind") if key in live}}
                for index, parameter in zip(group["params"], live["params"], strict=True):
                    for name in state.get(index, {}).keys() & {*self._buffers}:
                        state[index][name] = _copy_of_buffer(name, state[index][name], parameter)
        self._load_state_dict({"state": state, "param_groups": groups})

    def _refuse_another_optimizers(self, group: Mapping[str, Any]) -> None:
        """Raises ValueError if a saved group is of an optimizer whose state means something else."""
        own = type(self).__name__
        options = self.defaults.keys() - {"differentiable"}  # torch adds it to an optimizer that was copied
        missing = sorted(options - group.keys() - self._later_options.keys())
        foreign = [mark for mark in _MARKS if mark.option in group and mark.option not in options]
        foreign = [mark for mark in foreign if mark.option not in self._equal_options]
        if missing or foreign:
            what = f"{foreign[0].whose}; its buffers hold {foreign[0].holds}" if foreign else "another optimizer"
            lacks = f" and it lacks {', '.join(missing)}" if missing else ""
            raise ValueError(f"{own} cannot continue this state: it is of {what}{lacks}. Load the weights alone, and "
                             f"begin {own} without a state")  # fmt: skip
        for option, value in self._equal_options.items():
            if group.get(option, value) != value:
                raise ValueError(f"{own} cannot continue this state: it was made with {option} {group[option]}, which "
                                 f"{own} does not have")  # fmt: skip

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


def _copy_of_buffer(name: str, buffer: Tensor, parameter: Tensor) -> Tensor:
    """A buffer in the parameter's memory format, in which the update reads both."""
    if buffer.shape != parameter.shape:
        raise ValueError(f"the state is of other parameters: a {name} has shape {tuple(buffer.shape)}, and its "
                         f"parameter {tuple(parameter.shape)}")  # fmt: skip
    return torch.empty_like(parameter, requires_grad=False).copy_(buffer)
