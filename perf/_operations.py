"""Every operation of a training step, timed on its own arguments and booked on the layer that it belongs to."""

from __future__ import annotations

import bisect
import functools
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from knltrain.models.fused import measures

if TYPE_CHECKING:
    from torch._ops import OpOverload

_REPEATS = 3
# Of what kind an operation is, by its name; the first that fits.
_KINDS = {
    "convolution": r"conv(?!ert)",
    "matrix product": r"(add|b)?mm|linear",
    "batch norm": r"batch_norm",
    "response norm": r"local_response_norm",
    "pooling": r"pool",
    "loss": r"log_softmax|nll_loss",
    "dropout": r"dropout|bernoulli",
    "activation, addition": r"relu|threshold|add|mul",
    "copy, cast": r"copy|clone|cat|pad",
}


def timed(work: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of each run, after one that is not timed."""
    work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return seconds


PRODUCTS = ("convolution", "matrix product")
# Operations of ours that are one gradient of a convolution.
_GRADIENTS = {
    "knltrain::conv_weight_grad": "weight gradient",
    "knltrain::pointwise_conv2d_input": "data gradient",
    "knltrain::winograd_conv2d_input": "data gradient",
    "knltrain::winograd_conv2d_weight": "weight gradient",
}
# Of this argument, a convolution's gradient takes the shape alone.
_UNREAD = {"data gradient": "input", "weight gradient": "weight"}


@dataclass
class Operation:
    """One operation of the step.

    Attributes:
        layer: path of the module, or (loss) or (optimizer).
        kind: a key of ``_KINDS``, or optimizer or other.
        part: forward, backward, data gradient, weight gradient or update.
        name: as PyTorch has it.
        seconds: of the fastest of a few runs.
        flop: two per multiply-add; 0 if it is no product.
        num_bytes: of the operands, each read or written once.
        dtype: that a product is computed in.
    """

    layer: str
    kind: str
    part: str
    name: str
    seconds: float
    flop: float
    num_bytes: float
    dtype: torch.dtype


class InStep(TorchDispatchMode):
    """Adds up the seconds of convolutions and matrix products while the step that they belong to runs.

    Attributes:
        seconds: of all of them.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seconds = 0.0

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        start = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        if kind_of(func) in PRODUCTS:
            self.seconds += time.perf_counter() - start
        return out


class Timing(TorchDispatchMode):
    """Times every operation below autograd again, on the arguments that it was called with.

    Attributes:
        operations: in the order in which they ran.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self._path = [""]
        self._backward_began = False
        self._last_layer = ""
        # From this sequence number of autograd on, nodes are made by this layer.
        self._owners: list[tuple[int, str]] = []
        self._hooks = [hook for path, module in model.named_modules() for hook in self._watch(path, module)]

    def _watch(self, path: str, module: nn.Module) -> Iterator[Any]:
        def enter(*_: Any) -> None:
            self._path.append(path or "(model)")
            self._own()

        def leave(*_: Any) -> None:
            self._path.pop()
            self._own()

        yield module.register_forward_pre_hook(measures(enter))
        yield module.register_forward_hook(measures(leave))

    def _own(self) -> None:
        self._owners.append((torch._C._autograd._get_sequence_nr(), self._path[-1] or "(loss)"))

    def __exit__(self, *exception: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if _computes(func):
            layer, phase = self._where()
            kind = "optimizer" if phase == "update" else kind_of(func)
            for part, inputs, output in _parts(func, phase, args, out):
                call = _on_clones_of_what_is_written(func, inputs, kwargs)
                seconds = min(timed(call, _REPEATS))
                flop, dtype = _arithmetic(func, inputs, output)
                num_bytes = _traffic(func, part, inputs, kwargs, output)
                self.operations.append(Operation(layer, kind, part, func.name(), seconds, flop, num_bytes, dtype))
        return out

    def _where(self) -> tuple[str, str]:
        node: Any = torch._C._current_autograd_node()
        if node is not None:
            self._backward_began = True
            # Nodes that only write to .grad have the largest number; they follow the one that computed the gradient.
            number = node._sequence_nr()
            if number < 2**63:
                at = bisect.bisect_right(self._owners, number, key=lambda owner: owner[0]) - 1
                self._last_layer = self._owners[at][1] if at >= 0 else "(loss)"
            return self._last_layer, "backward"
        if self._backward_began:
            return "(optimizer)", "update"
        return self._path[-1] or "(loss)", "forward"


def _computes(func: OpOverload) -> bool:
    """Not views, allocations and a profiler's marks."""
    views = any(result.alias_info and not result.alias_info.is_write for result in func._schema.returns)
    return not views and func.namespace != "profiler" and "empty" not in func.name()


@functools.cache
def kind_of(func: OpOverload) -> str:
    """Of what kind an operation is: a key of ``_KINDS``, or other."""
    name = func.name().partition("::")[2].lstrip("_")
    return next((kind for kind, pattern in _KINDS.items() if re.search(pattern, name)), "other")


def _parts(func: OpOverload, phase: str, args: Any, out: Any) -> Iterator[tuple[str, Any, Any]]:
    """What is timed apart: a convolution's two gradients, which oneDNN computes one after the other; all else whole."""
    if part := _GRADIENTS.get(func.name()):
        yield part, args, out
        return
    if func is not torch.ops.aten.convolution_backward.default:
        yield phase, args, out
        return
    data, weight, bias = args[-1]
    if data:
        yield "data gradient", (*args[:-1], [True, False, False]), out[0]
    if weight:
        yield "weight gradient", (*args[:-1], [False, True, bias]), out[1:]


def _on_clones_of_what_is_written(func: OpOverload, args: Any, kwargs: Any) -> Callable[[], object]:
    """The call, on clones of those arguments that it changes: running it again must not change the training step."""
    args, kwargs = list(args), dict(kwargs)
    for index, argument in enumerate(func._schema.arguments):
        # The schema of native_batch_norm does not admit that it writes these two.
        if _is_written(argument) or argument.name in ("running_mean", "running_var"):
            place: Any = (args, index) if index < len(args) else (kwargs, argument.name)
            if index < len(args) or argument.name in kwargs:
                place[0][place[1]] = tree_map_only(Tensor, torch.clone, place[0][place[1]])
    return lambda: func(*args, **kwargs)


def _is_written(argument: Any) -> bool:
    return bool(argument.alias_info and argument.alias_info.is_write)


def _arithmetic(func: OpOverload, args: Any, output: Any) -> tuple[float, torch.dtype]:
    """FLOP of a product, two per multiply-add, and the type that it is computed in; 0 for all else.

    Convolutions are counted as direct sums, whatever computes them: Winograd's algorithm may exceed a processor's peak.
    """
    name = func.name().partition("::")[2].partition(".")[0]
    if name in ("convolution", "winograd_conv2d", "pointwise_conv2d"):
        return 2 * output.numel() * args[1][0].numel(), args[1].dtype
    if name in ("convolution_backward", "winograd_conv2d_input", "pointwise_conv2d_input"):
        weight = args[2] if name == "convolution_backward" else args[1]
        return 2 * args[0].numel() * weight[0].numel(), weight.dtype
    if name in ("conv_weight_grad", "winograd_conv2d_weight"):
        gradient = output[0] if name == "winograd_conv2d_weight" else output
        return 2 * args[1].numel() * gradient[0].numel(), gradient.dtype
    if name in ("mm", "bmm", "addmm"):
        a, b = args[-2:]
        return 2 * a.numel() * b.shape[-1], b.dtype
    return 0, torch.float32


def _traffic(func: OpOverload, part: str, args: Any, kwargs: Any, output: Any) -> int:
    """Bytes of all operands, once for each that is read and once for each that is written."""
    num_bytes = 0
    unread = _UNREAD.get(part)
    for index, argument in enumerate(func._schema.arguments):
        if argument.name == unread:
            continue
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        times = 2 if _is_written(argument) else 1
        num_bytes += times * sum(leaf.nbytes for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
    if not any(result.alias_info for result in func._schema.returns):
        num_bytes += sum(leaf.nbytes for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
    return num_bytes
