"""Profile of a training step by layer."""

from __future__ import annotations

import contextlib
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as profiler

from knltrain.bench.step import TrainingStep, spread
from knltrain.config import RunConfig
from knltrain.errors import ConfigError
from knltrain.models.fused import measures
from knltrain.node.memory import peak_resident_mb
from knltrain.runlog.console import Console
from knltrain.runlog.provenance import provenance
from knltrain.runlog.tables import new_table, print_table

# Names of rows without a module path.
_MODEL, _LOSS = "(model)", "(loss)"
_MARK_PREFIX = "layer:"
_NODE_PREFIX = "autograd::engine::evaluate_function"
# A layer's kind is found in the name of its class, so that engines' own layers are recognized.
_KINDS = ("conv", "norm", "linear", "pool", "dropout", "activation")


def profile(config: RunConfig, console: Console, *, steps: int) -> dict[str, Any]:
    """Times each layer's part of a training step on synthetic images.

    A module's forward time is the time between its hooks, minus its children's. Its backward time is that of the
    autograd nodes that it created, matched by sequence numbers. Operations that a module's ``forward`` calls directly,
    such as the addition of a residual block, count for that module, and may be in place.

    Args:
        config: as for :func:`knltrain.bench.bench`, without data.
        console: shows the table.
        steps: steps timed without the profiler, and as many with it.

    Returns:
        ``layers``, in the order in which their gradients become ready: ``layer`` (the module's path, ``(model)``
        for operations of the outermost module, or ``(loss)``), ``kind``, ``forward_s``, ``backward_s`` and
        ``gradient_bytes``. Also ``optimizer_s``, the rest (``other_s``), and their sum, ``profiled_step_s``. All these
        are medians over the steps; ``step_s`` is of the steps without the profiler.

    Raises:
        ConfigError: the engine is compile, or this machine does not support the configuration.
    """
    step = TrainingStep(config)
    if step.engine.name == "compile":
        raise ConfigError("--profile: engine compile merges the layers; use another engine")
    console.line(f"{step}; {step.node.cpu_model}, {step.node.isa}")
    warmup_s = step.warm_up()
    step_s = spread([step().step_s for _ in range(steps)])
    times, profiled = [], []
    with _marked_layers(step.engine.model):
        for _ in range(steps):
            with profiler(activities=[ProfilerActivity.CPU]) as recorded:
                times.append(step().step_s)
            profiled.append(_Attribution(recorded.events() or []))
    layers = _rows(step.engine.model, profiled)
    profiled_step_s = statistics.median(times)
    optimizer_s = statistics.median(one.optimizer_s for one in profiled)
    result = {
        **step.settings,
        "steps": steps,
        "warmup_s": warmup_s,
        "images_per_s": config.global_batch / step_s["median"],
        "step_s": step_s,
        "profiled_step_s": profiled_step_s,
        "layers": layers,
        "optimizer_s": optimizer_s,
        "other_s": profiled_step_s - optimizer_s - sum(row["forward_s"] + row["backward_s"] for row in layers),
        "peak_rss_mb": peak_resident_mb(),
        **provenance(step.node),
    }
    print_table(console, _table(result))
    return result


@contextlib.contextmanager
def _marked_layers(model: nn.Module) -> Iterator[None]:
    """Marks every module's forward pass for the profiler."""
    running: list[record_function] = []
    with contextlib.ExitStack() as hooks:
        for path, module in model.named_modules():

            def begin(module: nn.Module, inputs: Any, mark: str = _MARK_PREFIX + (path or _MODEL)) -> None:
                running.append(record_function(mark))
                running[-1].__enter__()

            def end(module: nn.Module, inputs: Any, output: Any) -> None:
                running.pop().__exit__(None, None, None)

            hooks.callback(module.register_forward_pre_hook(measures(begin)).remove)
            hooks.callback(module.register_forward_hook(measures(end)).remove)
        yield


class _Attribution:
    """Times of one profiled step.

    Attributes:
        forward_s: by layer; only layers with operations of their own.
        backward_s: by layer, in the order in which they finished.
        optimizer_s: time of the update.
    """

    def __init__(self, events: Sequence[FunctionEvent]) -> None:
        parts = {event.name: event for event in events if event.cpu_parent is None}
        self.optimizer_s = _seconds(parts["optimizer"])
        self.forward_s: dict[str, float] = {}
        self.backward_s: dict[str, float] = {}
        self._layer_of_node: dict[int, str] = {}  # sequence number of an autograd node -> the layer that created it
        self._forward(parts["forward"], _MODEL)
        self._forward(parts["loss"], _LOSS)
        layer = _LOSS
        for node in parts["backward"].cpu_children:
            if node.name.startswith(_NODE_PREFIX):
                # Nodes without a number write to .grad, directly after the one that computed the gradient.
                layer = self._layer_of_node.get(node.sequence_nr, layer)
                # Reinserted, so that layers are in the order of their last nodes.
                self.backward_s[layer] = self.backward_s.pop(layer, 0.0) + _seconds(node)

    def _forward(self, part: FunctionEvent, layer: str) -> None:
        own_s: dict[str, float] = defaultdict(float, {layer: _seconds(part)})
        operations: list[tuple[float, int, str]] = []
        waiting = [(part, layer)]
        while waiting:
            parent, layer = waiting.pop()
            for event in parent.cpu_children:
                inner = layer
                if event.name.startswith(_MARK_PREFIX):
                    inner = event.name.removeprefix(_MARK_PREFIX)
                    own_s[layer] -= _seconds(event)
                    own_s[inner] += _seconds(event)
                else:
                    operations.append((event.time_range.start, event.sequence_nr, layer))
                waiting.append((event, inner))
        computing = {layer for _, _, layer in operations}
        self.forward_s |= {layer: seconds for layer, seconds in own_s.items() if layer in computing}
        # An operation without a node has the number of the next one with a node: the last operation with a number
        # created the node.
        self._layer_of_node |= {number: layer for _, number, layer in sorted(operations) if number >= 0}


def _seconds(event: FunctionEvent) -> float:
    return float(event.time_range.elapsed_us()) / 1e6


def _rows(model: nn.Module, profiled: Sequence[_Attribution]) -> list[dict[str, Any]]:
    """Returns medians over the steps, in the order of the last backward pass, then layers without a backward part."""
    modules = {path or _MODEL: module for path, module in model.named_modules()}
    rows = []
    for layer in dict.fromkeys([*profiled[-1].backward_s, *profiled[-1].forward_s]):
        module = modules.get(layer)
        own = module.parameters(recurse=False) if module else ()
        rows.append(
            {
                "layer": layer,
                "kind": _kind(module) if module else "loss",
                "forward_s": statistics.median(one.forward_s.get(layer, 0.0) for one in profiled),
                "backward_s": statistics.median(one.backward_s.get(layer, 0.0) for one in profiled),
                "gradient_bytes": sum(p.grad.nbytes for p in own if p.grad is not None),
            }
        )
    return rows


def _kind(module: nn.Module) -> str:
    for cls in type(module).__mro__:
        name = cls.__name__ if not cls.__module__.startswith("torch.nn.modules.") else cls.__module__ + cls.__name__
        for kind in _KINDS:
            if kind in name.lower():
                return kind
    return "other"


def _table(result: dict[str, Any]) -> Table:
    total = result["profiled_step_s"]
    title = f"{1e3 * total:.1f} ms a step with the profiler, {1e3 * result['step_s']['median']:.1f} without"
    numbers = ("forward, ms", "backward, ms", "of the step", "gradients, MiB")
    table = new_table(title, names=("layer", "kind"), numbers=numbers)

    def add(name: str, kind: str, parts_s: Sequence[float], num_bytes: int) -> None:
        # The optimizer and the rest have no forward and backward part.
        times = [f"{1e3 * part:.2f}" for part in parts_s] if len(parts_s) == 2 else ["", ""]
        table.add_row(
            name, kind, *times, f"{sum(parts_s) / total:.1%}", f"{num_bytes / 2**20:.2f}" if num_bytes else ""
        )

    rows = result["layers"]
    for row in reversed(rows):  # in forward order
        add(row["layer"], row["kind"], (row["forward_s"], row["backward_s"]), row["gradient_bytes"])
    table.add_section()
    for kind in dict.fromkeys(row["kind"] for row in reversed(rows)):
        of_kind = [row for row in rows if row["kind"] == kind]
        parts_s = [sum(row[part] for row in of_kind) for part in ("forward_s", "backward_s")]
        add("", kind, parts_s, sum(row["gradient_bytes"] for row in of_kind))
    add("", "optimizer", [result["optimizer_s"]], 0)
    add("", "rest", [result["other_s"]], 0)
    return table
