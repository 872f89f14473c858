"""The pictures of a prediction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from knltrain.config import as_typed
from knltrain.files import naming
from knltrain.predict.run import Prediction
from knltrain.predict.timeline import EARLIER

_LANES = ("input", "compute", "network", "optimizer")
_COLOURS = {"input": "C4", EARLIER: "C9", "forward": "C0", "backward": "C1", "packing": "C8",
            "waiting for gradients": "0.8", "network": "C2", "optimizer": "C3"}  # fmt: skip
_LABELS = {
    "network": "bucket",
    "packing": "dividing and converting a bucket",
    "input": "images",
    "backward": "backward, by layer",
}
# Parts of a step from the bottom of a bar to its top: label, colour, field of a Step.
_PARTS = (
    ("images", "C4", "input_s"),
    ("forward", "C0", "forward_s"),
    ("backward", "C1", "backward_s"),
    ("slowest rank", "C5", "straggler_s"),
    ("communication\nnot hidden", "0.7", "exposed_s"),
    ("optimizer", "C3", "optimizer_s"),
)
_UNITS = (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))
# More numbers of nodes are thinned out, so that an axis stays readable.
_MAX_TICKS = 9


def draw_step(prediction: Prediction, path: Path) -> None:
    """Draws the timeline of a step to a PNG: what computes, and what is on the wire meanwhile.

    Of a step of several micro-batches it shows the last, the only one during which gradients are sent.

    Args:
        prediction: of a run.
        path: where to.
    """
    job, step = prediction.job, prediction.step
    begin = max((span.end for span in step.spans if span.name == EARLIER), default=0.0)
    spans = [span for span in step.spans if span.end > begin]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    lanes = [lane for lane in _LANES if any(span.lane == lane for span in spans)]
    shown = set()
    for span in spans:
        kind = span.name.partition(" ")[0] if span.name.startswith("backward") else span.name
        kind = kind if span.lane == "compute" else span.lane
        # Edges separate the buckets; there are too many layers for edges.
        left = 1e3 * (span.start - begin)
        axes.barh(len(lanes) - 1 - lanes.index(span.lane), 1e3 * (span.end - span.start), left=left,
                  height=0.6, color=_COLOURS[kind], edgecolor="white", lw=0.5 if kind == "network" else 0,
                  label=None if kind in shown else _LABELS.get(kind, kind))  # fmt: skip
        shown.add(kind)
    axes.set_yticks(range(len(lanes)), list(reversed(lanes)))
    count = prediction.accumulate
    axes.set(xlabel=f"ms since the last of {count} micro-batches began" if begin else "ms",
             xlim=(0, 1e3 * (step.seconds - begin)), ylim=(-0.5, len(lanes) - 0.5))  # fmt: skip
    title = (
        f"{job.config.model}, {job.nodes:,} nodes of {job.system.name}, {count} x {prediction.local_batch} images a "
        f"rank\n{1e3 * step.seconds:,.1f} ms a step, {1e3 * step.exposed_s:,.1f} ms of communication not hidden"
    )
    if begin:
        title += f"; not shown: the first {1e3 * begin:,.1f} ms, without communication"
    figure.suptitle(title, fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    with naming(path):
        figure.savefig(path, dpi=120)


def draw_scaling(predictions: Sequence[Prediction], path: Path) -> None:
    """Draws time to the end, and where a step's time goes, against the number of nodes to a PNG.

    A line for each batch on the left; on the right the parts of a step at the largest batch.

    Args:
        predictions: at several numbers of nodes.
        path: where to.
    """
    job = predictions[0].job
    batches: dict[int, list[Prediction]] = {}
    for one in sorted(predictions, key=lambda one: (one.job.config.global_batch, one.job.nodes)):
        batches.setdefault(one.job.config.global_batch, []).append(one)
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{job.config.model}, {as_typed(job.config.epochs)} epochs on {job.system.name}", fontsize=11)
    times, parts = figure.subplots(1, 2)
    _draw_times(times, batches)
    _draw_parts(parts, batches[max(batches)])
    with naming(path):
        figure.savefig(path, dpi=120)


def _draw_times(axes: Axes, batches: dict[int, list[Prediction]]) -> None:
    """A line for each batch, and dotted what a number of nodes in proportion would take."""
    every = [one for row in batches.values() for one in row]
    fastest, slowest = (choose(one.total_s for one in every) for choose in (min, max))
    unit, seconds = next(unit for unit in _UNITS if fastest >= unit[1] or unit is _UNITS[-1])
    handles = []
    for index, (batch, row) in enumerate(batches.items()):
        nodes = [one.job.nodes for one in row]
        best = min(row, key=lambda one: one.total_s)
        label = f"batch {batch:,}, at best {best.total_s / seconds:,.3g} {unit} on {best.job.nodes:,} nodes"
        # Smaller from batch to batch: their times may be the same.
        (line,) = axes.plot(nodes, [one.total_s / seconds for one in row], "o-", ms=max(3, 6 - 2 * index), label=label)
        linear = [row[0].total_s / seconds * nodes[0] / count for count in nodes]
        axes.plot(nodes, linear, ":", color=line.get_color(), lw=1)
        handles.append(line)
    handles.append(Line2D([], [], ls=":", lw=1, color="0.4", label="linear scaling"))
    axes.set(xlabel="nodes", ylabel=unit, xscale="log", yscale="log")
    # Linear scaling may run far below what is predicted, which is what the axis is for.
    axes.set_ylim(fastest / seconds / 2, 1.5 * slowest / seconds)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if slowest < 100 * fastest else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    nodes = sorted({one.job.nodes for one in every})
    ticks = _thin(nodes)
    axes.set_xticks(ticks, [_short(count) for count in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    axes.legend(handles=handles, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)


def _draw_parts(axes: Axes, row: Sequence[Prediction]) -> None:
    """A bar for each number of nodes, of the parts of a step."""
    bottom = [0.0] * len(row)
    for label, colour, name in _PARTS:
        shares = [100 * getattr(one.step, name) / one.step.seconds for one in row]
        if any(shares):
            axes.bar(range(len(row)), shares, bottom=bottom, color=colour, label=label)
            bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
    places = _thin(range(len(row)))
    axes.set_xticks(places, [_short(row[place].job.nodes) for place in places])
    axes.set(xlabel="nodes", ylabel=f"% of a step, batch {row[0].job.config.global_batch:,}", ylim=(0, 100))
    # Reversed, which is the order of the bars from top to bottom.
    axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1, 1), frameon=False, reverse=True)


def _thin(ticks: Sequence[int]) -> Sequence[int]:
    return ticks[:: -(-len(ticks) // _MAX_TICKS)]


def _short(nodes: int) -> str:
    """2K for 2,048, so that sixteen numbers of nodes stand beside each other."""
    return f"{nodes // 1024}K" if nodes >= 1024 and nodes % 1024 == 0 else f"{nodes:,}"
