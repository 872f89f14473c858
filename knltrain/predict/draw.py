"""The pictures of a prediction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from knltrain.predict.run import Prediction
from knltrain.predict.tables import duration

_LANES = ("input", "compute", "network", "optimizer")
_COLOURS = {"input": "C4", "earlier micro-batches": "C9", "forward": "C0", "backward": "C1", "packing": "C8",
            "waiting for gradients": "0.8", "network": "C2", "optimizer": "C3"}  # fmt: skip
_LABELS = {
    "network": "bucket",
    "packing": "dividing and converting a bucket",
    "input": "images",
    "backward": "backward, by layer",
}


def draw_step(prediction: Prediction, path: Path) -> None:
    """Draws the timeline of a step to a PNG: what computes, and what travels meanwhile.

    Args:
        prediction: of a run.
        path: where to.
    """
    job, step = prediction.job, prediction.step
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    lanes = [lane for lane in _LANES if any(span.lane == lane for span in step.spans)]
    shown = set()
    for span in step.spans:
        kind = span.name.partition(" ")[0] if span.name.startswith("backward") else span.name
        kind = kind if span.lane == "compute" else span.lane
        # Buckets are told apart by their edges; layers are too many for that.
        axes.barh(len(lanes) - 1 - lanes.index(span.lane), 1e3 * (span.end - span.start), left=1e3 * span.start,
                  height=0.6, color=_COLOURS[kind], edgecolor="white", lw=0.5 if kind == "network" else 0,
                  label=None if kind in shown else _LABELS.get(kind, kind))  # fmt: skip
        shown.add(kind)
    axes.set_yticks(range(len(lanes)), list(reversed(lanes)))
    axes.set(xlabel="ms", xlim=(0, 1e3 * step.seconds), ylim=(-0.5, len(lanes) - 0.5))
    axes.set_title(
        f"{job.config.model}, {job.nodes:,} nodes of {job.system.name}, {prediction.accumulate} x "
        f"{prediction.local_batch} images a rank: {1e3 * step.seconds:.1f} ms a step, "
        f"{1e3 * step.exposed_s:.1f} ms of communication not hidden",
        fontsize=9,
    )
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)


def draw_scaling(predictions: Sequence[Prediction], path: Path) -> None:
    """Draws time to the end, and where a step's time goes, against the number of nodes to a PNG.

    A line for each batch on the left; on the right the parts of a step at the largest batch.

    Args:
        predictions: at several numbers of nodes.
        path: where to.
    """
    job = predictions[0].job
    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{job.config.model}, {job.config.epochs:g} epochs on {job.system.name}", fontsize=10)
    times, parts = figure.subplots(1, 2)
    batches = sorted({one.job.config.global_batch for one in predictions})
    for batch in batches:
        row = sorted((one for one in predictions if one.job.config.global_batch == batch), key=lambda o: o.job.nodes)
        nodes = [one.job.nodes for one in row]
        (line,) = times.plot(nodes, [one.total_s / 60 for one in row], "o-", ms=4, label=f"batch {batch:,}")
        ideal = [row[0].total_s / 60 * nodes[0] / count for count in nodes]
        times.plot(nodes, ideal, ":", color=line.get_color(), lw=1)
        times.annotate(duration(row[-1].total_s), (nodes[-1], row[-1].total_s / 60), textcoords="offset points",
                       xytext=(0, 8), ha="right", fontsize=8)  # fmt: skip
    times.set(xlabel="nodes", ylabel="minutes; dotted: in proportion", yscale="log")
    times.legend(fontsize=8)
    places = range(len(row))
    bottom = [0.0] * len(row)
    for name, colour, values in (
        ("images", "C4", [one.step.input_s for one in row]),
        ("forward", "C0", [one.step.forward_s for one in row]),
        ("backward", "C1", [one.step.backward_s for one in row]),
        ("slowest rank", "C5", [one.step.straggler_s for one in row]),
        ("communication not hidden", "0.7", [one.step.exposed_s for one in row]),
        ("optimizer", "C3", [one.step.optimizer_s for one in row]),
    ):
        share = [value / one.step.seconds for value, one in zip(values, row, strict=True)]
        parts.bar(places, share, bottom=bottom, color=colour, label=name)
        bottom = [low + value for low, value in zip(bottom, share, strict=True)]
    parts.set_xticks(places, [f"{count:,}" for count in nodes], rotation=45 if len(row) > 6 else 0)
    parts.set(xlabel="nodes", ylabel=f"part of a step, batch {batches[-1]:,}", ylim=(0, 1))
    parts.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    times.set_xscale("log", base=2)
    times.set_xticks(nodes, [f"{count:,}" for count in nodes], rotation=45 if len(row) > 6 else 0)
    times.minorticks_off()
    times.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
