"""Which primitives oneDNN ran in a training step: layer, implementation, time, GFLOP/s, and what reorders cost.

    python perf/onednn_layers.py --model resnet50 --batch 32

oneDNN itself keeps the time: ONEDNN_VERBOSE=1 makes it print a line for every primitive it has executed. What PyTorch
computes without oneDNN is not among them: batch norm, pooling, fp32 matrix products, which are MKL's, and what the
engine fused has kernels of its own for.
"""

from __future__ import annotations

import os
import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import click
from _common import WARMUP_STEPS, build_step, finish, out_folder, output_options, show, step_config, step_options
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from rich import box
from rich.table import Table

from knltrain.bench.primitives import Primitive, native_stdout, parse, slow_convolutions
from knltrain.errors import KnltrainError
from knltrain.runlog.console import Console

_SHOWN = 30
_COLOURS = {"forward": "tab:blue", "data gradient": "tab:orange", "weight gradient": "tab:green"}


def layers(primitives: Iterable[Primitive], steps: int) -> list[dict[str, Any]]:
    """Adds up executions of the same primitive: calls, ms, GFLOP and MB per step, GFLOP/s; the slowest first."""
    times: dict[Primitive, list[float]] = defaultdict(list)
    for primitive in primitives:
        same = Primitive(
            primitive.kind, primitive.direction, primitive.implementation, primitive.types, primitive.shape, 0
        )
        times[same].append(primitive.ms)
    rows = [
        {
            "primitive": one.kind,
            "direction": one.direction,
            "implementation": one.implementation,
            "types": list(one.types),
            "shape": one.shape,
            "calls": len(ms) / steps,
            "ms": sum(ms) / steps,
            "gflop": None if one.gflop is None else one.gflop * len(ms) / steps,
            "mb": None if one.megabytes is None else one.megabytes * len(ms) / steps,
            "gflop_per_s": None if one.gflop is None or not sum(ms) else 1e3 * one.gflop * len(ms) / sum(ms),
        }
        for one, ms in times.items()
    ]
    return sorted(rows, key=lambda row: -row["ms"])


def totals(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds layers up by primitive and direction: calls, ms, GFLOP, MB, GFLOP/s and, of reorders, GB/s."""
    sums: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for row in rows:
        total = sums[row["primitive"], row["direction"]]
        for name in ("calls", "ms", "gflop", "mb"):
            total[name] += row[name] or 0.0
    return [
        {
            "primitive": kind,
            "direction": direction,
            **total,
            "gflop_per_s": 1e3 * total["gflop"] / total["ms"] if total["gflop"] and total["ms"] else None,
            "gb_per_s": total["mb"] / total["ms"] if total["mb"] and total["ms"] else None,
        }
        for (kind, direction), total in sorted(sums.items(), key=lambda item: -item[1]["ms"])
    ]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@step_options
@output_options
def main(steps: int | None, out: str | None, as_json: bool, quick: bool, **asked: Any) -> None:
    """Run training steps with oneDNN's own clock on, and list its primitives by time."""
    # Before torch is loaded: every oneDNN in the process reads it once. IPEX brings one of its own.
    os.environ["ONEDNN_VERBOSE"] = "1"
    console, steps = Console(json=as_json), steps or (2 if quick else 5)
    step = build_step(step_config(quick=quick, **asked))
    if step.group.world_size > 1:
        step.close()
        raise KnltrainError("measures one rank: start it without torchrun, mpiexec or srun")
    folder = out_folder(out)
    console.line(str(step))

    seconds = []
    with tempfile.TemporaryFile() as printed, native_stdout(printed):
        for _ in range(WARMUP_STEPS):
            step()
        warm_up_ends = os.lseek(1, 0, os.SEEK_CUR)
        for _ in range(steps):
            seconds.append(step().step_s)
        printed.seek(0)
        text = printed.read()
    primitives = list(parse(text[warm_up_ends:].decode(errors="replace").splitlines()))
    if not primitives:
        raise KnltrainError(
            "oneDNN printed no primitive: this PyTorch is built without oneDNN, or without its verbose mode "
            "(torch.backends.mkldnn.is_available() tells)"
        )
    rows = layers(primitives, steps)
    about = re.findall(
        r"dnnl?_verbose,(?:v\d,)?info,((?:oneDNN|DNNL|Intel MKL-DNN|cpu).*)", text.decode(errors="replace")
    )
    result = {
        **step.describe(),
        "steps": steps,
        # With the lines being written; `knltrain bench` has the time without.
        "step_s": statistics.median(seconds),
        "onednn_s": 1e-3 * sum(row["ms"] for row in rows),
        "onednn": about,
        "totals": totals(rows),
        "layers": rows,
    }
    show(console, _layer_table(rows), _totals_table(result))
    console.line(
        f"oneDNN {1e3 * result['onednn_s']:.1f} ms of a step of {1e3 * result['step_s']:.1f} ms "
        f"({result['onednn_s'] / result['step_s']:.0%})"
    )
    if problem := slow_convolutions(primitives):
        console.warn(problem)
    finish(result, _figure(result), folder, console, as_json=as_json)


def _layer_table(rows: list[dict[str, Any]]) -> Table:
    title = f"layers by time, per step{f'; the first {_SHOWN} of {len(rows)}' if len(rows) > _SHOWN else ''}"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for name in ("ms", "calls", "GFLOP/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("primitive", "shape", "implementation"):
        table.add_column(name, no_wrap=name != "implementation", overflow="fold")
    for row in rows[:_SHOWN]:
        table.add_row(
            f"{row['ms']:.2f}",
            f"{row['calls']:g}",
            "" if row["gflop_per_s"] is None else f"{row['gflop_per_s']:.0f}",
            _name(row),
            _short(row["shape"]),
            row["implementation"],
        )
    return table


def _totals_table(result: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="by kind, per step", title_justify="left")
    table.add_column("primitive")
    for name in ("calls", "ms", "of the step", "GFLOP", "GFLOP/s", "MB", "GB/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result["totals"]:
        table.add_row(
            _name(row),
            f"{row['calls']:g}",
            f"{row['ms']:.2f}",
            f"{1e-3 * row['ms'] / result['step_s']:.1%}",
            *(f"{row[name]:.1f}" if row[name] else "" for name in ("gflop", "gflop_per_s", "mb", "gb_per_s")),
        )
    return table


def _name(row: dict[str, Any]) -> str:
    return row["primitive"] if row["direction"] == "undef" else f"{row['primitive']}, {row['direction']}"


def _short(shape: str) -> str:
    """Leaves out strides of 1, dilations and padding of 0, and what is the same across as down."""
    height, _, width = shape.rpartition("_iw")
    if height.rpartition("_ih")[2].replace("h", "w") == width:
        shape = height
    return re.sub(r"s[dhw]1(?!\d)|[dp][dhw]0(?!\d)", "", shape)


def _figure(result: dict[str, Any]) -> Figure:
    rows = result["layers"][:_SHOWN]
    figure = Figure(figsize=(12, 2 + 0.26 * len(rows)), layout="constrained")
    figure.suptitle(
        f"oneDNN in a training step: {result['model']}, batch {result['batch']}, {result['image_size']} px, "
        f"{result['precision']}, {result['engine']}, {result['threads']} threads"
    )
    times, rates = figure.subplots(1, 2, sharey=True)
    places = range(len(rows))
    for axes, values, title in (
        (times, [row["ms"] for row in rows], "ms per step"),
        (rates, [row["gflop_per_s"] or 0.0 for row in rows], "GFLOP/s (2 per multiply-add)"),
    ):
        axes.barh(places, values, color=[_COLOURS.get(row["direction"], "tab:gray") for row in rows])
        axes.set(xlabel=title)
        axes.grid(axis="x", alpha=0.3)
        axes.margins(y=0.01)
    times.invert_yaxis()
    times.set_yticks(
        places, [f"{row['primitive']} {_short(row['shape'])} × {row['calls']:g}" for row in rows], fontsize=7
    )
    figure.legend(
        handles=[Patch(color=colour, label=direction) for direction, colour in _COLOURS.items()],
        loc="outside lower center",
        ncols=3,
    )
    return figure


if __name__ == "__main__":
    main()
