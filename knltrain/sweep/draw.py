"""The figures of a sweep: accuracy against the batch, and losses against the epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from knltrain.config import RunConfig
from knltrain.runlog.metrics import read_metrics
from knltrain.sweep.results import Best, Results

# Points of a curve: a loss is averaged over as many stretches of its run.
_STRETCHES = 150
_PANELS_ACROSS = 3


def batch_name(batch: int) -> str:
    """2K for 2,048: what the field calls a batch."""
    return f"{batch // 1024}K" if batch % 1024 == 0 else str(batch)


def draw_accuracy(best: Sequence[Best], reference: Best | None, path: Path, config: RunConfig) -> None:
    """Draws top-1 against the batch to a PNG: a line a method at its best learning rates, through the means.

    Whiskers reach from the worst seed to the best one, small dots are single seeds, the reference is dashed.

    Args:
        best: by method and batch.
        reference: what the others are held against.
        path: where to.
        config: what all have in common, for the title.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for index, optimizer in enumerate(dict.fromkeys(one.optimizer for one in best)):
        mine = sorted((one for one in best if one.optimizer == optimizer), key=lambda one: one.batch)
        batches, means = [one.batch for one in mine], [one.mean for one in mine]
        below = [one.mean - min(one.top1.values()) for one in mine]
        above = [max(one.top1.values()) - one.mean for one in mine]
        axes.errorbar(batches, means, (below, above), fmt="o-", ms=4, capsize=3, color=f"C{index}",
                      label=optimizer.upper())  # fmt: skip
        for one in mine:
            if len(one.top1) > 1:
                axes.plot([one.batch] * len(one.top1), list(one.top1.values()), ".", ms=4, color=f"C{index}", alpha=0.4)
    if reference:
        label = f"{reference.optimizer.upper()} at {batch_name(reference.batch)}: {reference.mean:.1f} %"
        axes.axhline(reference.mean, ls="--", lw=1, color="0.4", label=label)
    ticks = sorted({one.batch for one in best})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [batch_name(batch) for batch in ticks])
    axes.minorticks_off()
    axes.set(xlabel="global batch", ylabel="top-1, %")
    axes.set_title(f"{config.model}, {config.epochs:g} epochs, best learning rate of each method and batch", fontsize=9)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def draw_losses(results: Results, best: Sequence[Best], path: Path) -> None:
    """Draws losses against the epoch to a PNG, a panel a batch: the first seed at each method's best learning rate.

    Lines are losses in training, averaged over stretches of the run, dots those of validation.

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
    if highest:  # what validation says of running statistics that are young may be far above
        panels[0].set_ylim(0, 1.05 * highest)
    for axes in panels[::across]:
        axes.set_ylabel("loss")
    for axes in panels[len(batches) :]:
        axes.remove()
    figure.savefig(path, dpi=120)


def _draw_run(axes: Axes, folder: Path, colour: str, label: str) -> list[float]:
    """Draws a run's losses, and returns those in training; of a run whose metrics are gone, the legend says so."""
    try:
        rows = read_metrics(folder / "metrics.jsonl")
    except FileNotFoundError:
        rows, label = [], f"{label}: no metrics.jsonl"
    steps = [row for row in rows if row.get("loss") is not None]
    length = math.ceil(len(steps) / _STRETCHES)
    stretches = [steps[first : first + length] for first in range(0, len(steps), length)] if steps else []
    epochs = [stretch[-1]["epoch"] for stretch in stretches]
    losses = [sum(row["loss"] for row in stretch) / len(stretch) for stretch in stretches]
    axes.plot(epochs, losses, lw=1, color=colour, label=label)
    evaluations = [row for row in rows if row.get("val_loss") is not None]
    axes.plot([row["epoch"] for row in evaluations], [row["val_loss"] for row in evaluations], "o", ms=2, color=colour)
    return losses
