"""The figures of a sweep: accuracy against the batch, and losses against the epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from knltrain.config import as_typed
from knltrain.files import naming
from knltrain.runlog.metrics import read_metrics
from knltrain.sweep.results import Best, Results

# Points of a loss curve: each is the mean over a part of the run.
_MAX_POINTS = 150
_PANELS_ACROSS = 3


def batch_name(batch: int) -> str:
    """2K for 2,048: what the field calls a batch."""
    return f"{batch // 1024}K" if batch % 1024 == 0 else str(batch)


def draw_accuracy(results: Results, best: Sequence[Best], reference: Best | None, path: Path) -> None:
    """Draws top-1 against the batch to a PNG: a line a method at its best learning rates, through the means.

    Whiskers reach from the worst seed to the best one, and hollow points have a single seed. A cross at the bottom
    marks runs that diverged; where no learning rate has a result, the line has a gap.

    Args:
        results: of the sweep.
        best: by method and batch.
        reference: what the others are compared with; dashed.
        path: where to.
    """
    sweep = results.sweep
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for index, optimizer in enumerate(sweep.optimizers):
        mine = {one.batch: one for one in best if one.optimizer == optimizer}
        _draw_method(axes, [mine.get(batch) for batch in sorted(sweep.batches)], sorted(sweep.batches),
                     f"C{index}", optimizer.upper())  # fmt: skip
    crossed = _draw_diverged(axes, results, best)
    if reference:
        label = f"{reference.optimizer.upper()} at {batch_name(reference.batch)}: {reference.mean:.1f} %"
        axes.axhline(reference.mean, ls="--", lw=1, color="0.4", label=label)
    if crossed:
        axes.plot([], [], "x", color="0.3", label="diverged")
        low, high = axes.get_ylim()
        axes.set_ylim(low - 0.06 * (high - low) * (1 + len(sweep.optimizers)), high)
        axes.margins(x=0.2)  # for the text beside a cross at the smallest batch
    ticks = sorted({batch for _, batch in sweep.cells})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [batch_name(batch) for batch in ticks])
    axes.minorticks_off()
    axes.set(xlabel="global batch", ylabel="top-1, %")
    config = sweep.base()
    title = f"{config.model}, {as_typed(config.epochs)} epochs, best learning rate of each method and batch"
    figure.suptitle(f"{title}\n{_seeds(best)}", fontsize=9)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize=9, frameon=False)
    axes.grid(alpha=0.3)
    with naming(path):
        figure.savefig(path, dpi=120)


def _draw_method(axes: Axes, points: Sequence[Best | None], batches: Sequence[int], colour: str, label: str) -> None:
    """A line with a gap where there is no point; its whiskers and markers."""
    axes.plot(batches, [one.mean if one else math.nan for one in points], "-", color=colour, label=label)
    for one in filter(None, points):
        seeds = one.top1.values()
        whiskers = [[one.mean - min(seeds)], [max(seeds) - one.mean]] if len(seeds) > 1 else None
        axes.errorbar([one.batch], [one.mean], whiskers, fmt="o", ms=5, capsize=4, color=colour,
                      mfc=colour if len(seeds) > 1 else "white")  # fmt: skip


def _draw_diverged(axes: Axes, results: Results, best: Sequence[Best]) -> bool:
    """Crosses at the bottom, in a line for each method, and beside them how many; whether there are any."""
    crossed = False
    found = {(one.optimizer, one.batch): one for one in best}
    for cell in results.sweep.cells:
        one = found.get(cell)
        if one:
            diverged, tried = len(one.diverged), f"{len(one.diverged) + len(one.top1)} seeds"
        else:
            diverged, tried = results.num_diverged(*cell), f"{len(results.sweep.search(cell))} runs"
        if not diverged:
            continue
        index = results.sweep.optimizers.index(cell[0])
        height = 0.03 + 0.055 * index
        axes.plot([cell[1]], [height], "x", color=f"C{index}", transform=axes.get_xaxis_transform())
        axes.annotate(f"{diverged} of {tried}", (cell[1], height), xycoords=axes.get_xaxis_transform(), xytext=(-6, 0),
                      textcoords="offset points", ha="right", va="center", fontsize=8, color=f"C{index}")  # fmt: skip
        crossed = True
    return crossed


def _seeds(best: Sequence[Best]) -> str:
    """Explains points, hollow points and whiskers."""
    counts = sorted({len(one.top1) for one in best})
    if counts == [1]:
        return "a single seed each"
    several = [count for count in counts if count > 1]
    number = f"{several[0]}" if len(several) == 1 else f"{several[0]} to {several[-1]}"
    hollow = "; hollow: a single seed" if 1 in counts else ""
    return f"means over {number} seeds, whiskers from the worst seed to the best{hollow}"


def draw_losses(results: Results, best: Sequence[Best], path: Path) -> None:
    """Draws losses against the epoch to a PNG, a panel a batch: the first seed at each method's best learning rate.

    Lines are losses in training, averaged over parts of the run, dots those of validation.

    Args:
        results: of the sweep.
        best: by method and batch.
        path: where to.
    """
    batches = sorted({one.batch for one in best})
    optimizers = list(dict.fromkeys(one.optimizer for one in best))
    across = min(_PANELS_ACROSS, len(batches))
    down = math.ceil(len(batches) / across)
    figure = Figure(figsize=(3.4 * across + 0.6, 2.8 * down + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flatten()
    highest = 0.0
    for axes, batch in zip(panels, batches, strict=False):
        for one in best:
            if one.batch == batch:
                point = results.sweep.point(one.optimizer, batch, one.factor, next(iter(one.top1)))
                colour = f"C{optimizers.index(one.optimizer)}"
                losses = _draw_run(axes, point.folder(results.out), colour, f"{one.optimizer.upper()}, lr {one.lr:.3g}")
                highest = max([highest, *losses])
        axes.set_title(f"batch {batch_name(batch)}", fontsize=9)
        axes.set_xlabel("epoch")
        axes.tick_params(labelbottom=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    if highest:  # early validation losses, with young running statistics, may be far above
        panels[0].set_ylim(0, 1.05 * highest)
    for axes in panels[::across]:
        axes.set_ylabel("loss")
    for axes in panels[len(batches) :]:
        axes.remove()
    with naming(path):
        figure.savefig(path, dpi=120)


def _draw_run(axes: Axes, folder: Path, colour: str, label: str) -> list[float]:
    """Draws a run's losses, and returns those in training; of a run whose metrics are gone, the legend says so."""
    try:
        rows = read_metrics(folder / "metrics.jsonl")
    except FileNotFoundError:
        rows, label = [], f"{label}: no metrics.jsonl"
    rows = [row for row in rows if "epoch" in row]
    steps = [row for row in rows if row.get("loss") is not None]
    length = math.ceil(len(steps) / _MAX_POINTS)
    parts = [steps[first : first + length] for first in range(0, len(steps), length)] if steps else []
    epochs = [part[-1]["epoch"] for part in parts]
    losses = [sum(row["loss"] for row in part) / len(part) for part in parts]
    axes.plot(epochs, losses, lw=1, color=colour, label=label)
    evaluations = [row for row in rows if row.get("val_loss") is not None]
    axes.plot([row["epoch"] for row in evaluations], [row["val_loss"] for row in evaluations], "o", ms=2, color=colour)
    return losses
