"""Where a training step's time goes: by op, by kind of work, and as a trace to look at.

    python perf/profile_step.py --model resnet50 --batch 32
    torchrun --nproc-per-node 2 perf/profile_step.py --batch 16

An op's self time (its own, without that of the ops it calls) belongs to one kind of work, so the kinds add up to the
profiled step. The profiler costs time itself, mostly where ops are many and small; the step without it is measured
first, and printed beside.
"""

from __future__ import annotations

import contextlib
import os
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click
from _common import (
    WARMUP_STEPS,
    build_step,
    finish,
    out_folder,
    output_options,
    show,
    step_config,
    step_options,
)
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from knltrain.runlog.console import Console

if TYPE_CHECKING:
    from torch.autograd.profiler_util import FunctionEvent

_SHOWN = 25
KINDS = {
    "convolution": "convolution",
    "linear": "linear layers",
    "norm": "normalisation",
    "activation_pooling": "activation, dropout, pooling, addition",
    "loss": "loss",
    "optimizer": "optimizer",
    "copies": "casts and copies",
    "data": "data",
    "communication": "communication",
    "other": "other: Python, autograd",
}

# What encloses everything that it calls, by the beginning of its name: an addition within the optimizer is optimizer.
_ENCLOSING = {
    "loss": "loss",
    "optimizer": "optimizer",
    "Optimizer.": "optimizer",
    "knltrain::lars_step": "optimizer",
    "knltrain::sgd_step": "optimizer",
    "knltrain::batch_norm_act": "norm",
    "knltrain::local_response_norm": "norm",
    "_LocalResponseNorm": "norm",
    "knltrain::conv_weight_grad": "convolution",
    "knltrain::pointwise_conv2d": "convolution",
    "knltrain::winograd_conv2d": "convolution",
    "knltrain::max_pool": "activation_pooling",
    "knltrain::dropout": "activation_pooling",
    "aten::dropout": "activation_pooling",
    "knltrain::crop_flip_normalize": "data",
    "c10d::": "communication",
    "gloo:": "communication",
}
# What an op is by the beginning of its name, less namespace and leading underscores; the first that fits. Ops without
# an entry (views, allocations) are what the nearest op around them is. lerp_ moves running statistics.
_BY_NAME = {
    "convolution": r"(mkldnn_|thnn_|slow_|ipex)?conv(?!ert)",
    "linear": r"(mkldnn_|ipex_)?linear|addmm|b?mm\b|bmm|matmul",
    "norm": r"(native_|cudnn_|ipex_)?batch_?norm|nativebatchnorm|(native_)?(layer|group)_?norm|lerp",
    "loss": r"nll_?loss|log_?softmax|cross_?entropy",
    "activation_pooling": r"relu|threshold|clamp|dropout|bernoulli|(max|avg|adaptive)\w*pool|mean|add_?\b|mul|div",
    "copies": r"to\b|to_?copy|copy_?|clone|contiguous|fill_|zero_|ones_like",
}
_NAMESPACE = re.compile(r"^(\w+::)*_*")
_ENGINE = "autograd::engine::evaluate_function: "
# What torch.library makes of an op that has a backward pass.
_GENERATED = re.compile(r"^GeneratedBackwardFor_knltrain_")


def kind_of(names: Iterable[str]) -> str:
    """The kind of work that an op does.

    Args:
        names: the op's name, then those of the ops around it, outwards.
    """
    names = [_GENERATED.sub("knltrain::", name.removeprefix(_ENGINE)) for name in names]
    for name in names:
        for beginning, kind in _ENCLOSING.items():
            if name.startswith(beginning):
                return kind
    for name in names:
        bare = _NAMESPACE.sub("", name)
        for kind, pattern in _BY_NAME.items():
            if re.match(pattern, bare, re.IGNORECASE):
                return kind
    return "other"


def by_op(events: Iterable[FunctionEvent], steps: int, *, waited_for_data: float, ranks: int) -> list[dict[str, Any]]:
    """Adds up the self times of ops that run within the training step, on the thread that runs it.

    Args:
        events: of the profiler.
        steps: how many were profiled.
        waited_for_data: seconds for which these steps waited for images.
        ranks: where there are several, what is left of the backward pass after its last op is waiting for gradients.

    Returns:
        Name, kind, calls and self time in seconds of each op, both per step; the most expensive first.
    """
    calls: dict[tuple[str, str], int] = defaultdict(int)
    self_s: dict[tuple[str, str], float] = defaultdict(float)
    for event in events:
        if event.is_async:
            continue
        around = [event]
        while around[-1].cpu_parent is not None:
            around.append(around[-1].cpu_parent)
        if around[-1].name != "step":
            continue
        key = event.name, kind_of(one.name for one in around)
        calls[key] += 1
        self_s[key] += 1e-6 * event.self_cpu_time_total
        if event.name == "backward" and ranks > 1:
            _move(self_s, key, ("waiting for gradients", "communication"), 1e-6 * _idle_at_end(event))
            calls["waiting for gradients", "communication"] += 1
    if waited_for_data:
        _move(self_s, ("step", "other"), ("waiting for images", "data"), waited_for_data)
        calls["waiting for images", "data"] = steps
    rows = [
        {"op": op, "kind": kind, "calls": calls[op, kind] / steps, "self_s": seconds / steps}
        for (op, kind), seconds in self_s.items()
    ]
    return sorted(rows, key=lambda row: -row["self_s"])


def _move(self_s: dict[tuple[str, str], float], source: tuple[str, str], to: tuple[str, str], seconds: float) -> None:
    self_s[source] -= seconds
    self_s[to] += seconds


def _idle_at_end(backward: FunctionEvent) -> float:
    """Microseconds after the last gradient was computed in which no op ran: DistributedDataParallel waits there."""
    spans = [(child.time_range, child.name.startswith("autograd::engine")) for child in backward.cpu_children]
    computed = max((span.end for span, is_gradient in spans if is_gradient), default=backward.time_range.end)
    finishing = sum(span.elapsed_us() for span, _ in spans if span.start >= computed)
    return float(backward.time_range.end - computed - finishing)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--data", metavar="DIR", help="Read images from an ImageFolder; default one batch of noise.")
@step_options
@output_options
def main(steps: int | None, out: str | None, as_json: bool, quick: bool, **asked: Any) -> None:
    """Profile training steps: on one rank, or as started by torchrun or mpiexec."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # a CUDA build of torch laments the GPU that is not there
    steps = steps or (2 if quick else 5)
    step = build_step(step_config(quick=quick, **asked))
    console = Console(json=as_json, silent=not step.group.is_first)
    console.line(str(step))

    from torch.profiler import ProfilerActivity, profile

    with contextlib.closing(step):
        for _ in range(WARMUP_STEPS):
            step()
        step.clock.pop_step()
        seconds, on_wire = [], 0.0
        for _ in range(steps):
            seconds.append(step().step_s)
            on_wire += step.clock.pop_step().on_wire / steps
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            times = [step() for _ in range(steps)]
        step.group.barrier()
    if not step.group.is_first:
        return

    folder = out_folder(out)
    waited = sum(one.data_s for one in times) if asked["data"] else 0.0  # noise is there already
    rows = by_op(profiler.events(), steps, waited_for_data=waited, ranks=step.group.world_size)
    profiled = sum(row["self_s"] for row in rows)
    kinds = {kind: sum(row["self_s"] for row in rows if row["kind"] == kind) for kind in KINDS}
    result = {
        **step.describe(),
        "steps": steps,
        "step_s": statistics.median(seconds),
        "profiled_step_s": profiled,
        "gradients_on_wire_s": on_wire,
        "kinds": {kind: {"self_s": spent, "share": spent / profiled} for kind, spent in kinds.items()},
        "ops": rows,
    }
    profiler.export_chrome_trace(str(folder / "trace.json.gz"))
    show(console, _op_table(rows, profiled), _kind_table(result))
    console.line(
        f"step {1e3 * result['step_s']:.1f} ms without the profiler (median of {steps}), "
        f"{1e3 * profiled:.1f} ms with it"
    )
    if step.group.world_size > 1:
        console.line(f"gradients on the wire {1e3 * on_wire:.1f} ms, mostly while the backward pass computes")
    console.line(f"{folder}/trace.json.gz: open it in ui.perfetto.dev or chrome://tracing")
    finish(result, _figure(result), folder, console, as_json=as_json)


def _op_table(rows: list[dict[str, Any]], profiled: float) -> Table:
    title = f"ops by self time, per step{f'; the first {_SHOWN} of {len(rows)}' if len(rows) > _SHOWN else ''}"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for name in ("ms", "of the step", "calls"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("op", overflow="fold")
    table.add_column("kind", no_wrap=True)
    for row in rows[:_SHOWN]:
        table.add_row(
            f"{1e3 * row['self_s']:.2f}",
            f"{row['self_s'] / profiled:.1%}",
            f"{row['calls']:g}",
            row["op"],
            KINDS[row["kind"]],
        )
    return table


def _kind_table(result: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="by kind of work, per step", title_justify="left")
    for name in ("ms", "of the step"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    for kind, row in result["kinds"].items():
        table.add_row(f"{1e3 * row['self_s']:.2f}", f"{row['share']:.1%}", KINDS[kind])
    return table


def _figure(result: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(11, 5), layout="constrained")
    figure.suptitle(
        f"training step: {result['model']}, batch {result['batch']}, {result['image_size']} px, "
        f"{result['precision']}, {result['engine']}, {result['threads']} threads; "
        f"{1e3 * result['step_s']:.1f} ms without the profiler"
    )
    by_kind, by_name = figure.subplots(1, 2)
    colours = {kind: f"C{place}" for place, kind in enumerate(KINDS)}
    kinds = dict(reversed(result["kinds"].items()))
    bars = by_kind.barh([KINDS[kind] for kind in kinds], [1e3 * row["self_s"] for row in kinds.values()],
                        color=[colours[kind] for kind in kinds])  # fmt: skip
    by_kind.bar_label(bars, [f"{row['share']:.1%}" for row in kinds.values()], padding=2, fontsize=8)
    by_kind.margins(x=0.15)
    ops = result["ops"][:15][::-1]
    by_name.barh([f"{row['op'][:38]} ({KINDS[row['kind']].split(':')[0].split(',')[0]})" for row in ops],
                 [1e3 * row["self_s"] for row in ops], color=[colours[row["kind"]] for row in ops])  # fmt: skip
    for axes, title in ((by_kind, "by kind of work"), (by_name, "by op")):
        axes.set(xlabel="self time, ms per step", title=title)
        axes.tick_params(axis="y", labelsize=8)
        axes.grid(axis="x", alpha=0.3)
    return figure


if __name__ == "__main__":
    main()
