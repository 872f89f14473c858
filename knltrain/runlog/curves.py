"""curves.png of a run: loss and accuracy against the epoch. Loads matplotlib; reading and writing rows does not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from knltrain.files import replacing

# A line through fewer points is drawn with the points: through one it would show nothing.
_MIN_POINTS_WITHOUT_MARKERS = 30


def draw_curves(rows: Iterable[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draws loss and accuracy against the epoch to a PNG.

    Args:
        rows: of a metrics.jsonl: steps have ``loss``, evaluations have ``top1``, ``top5`` and ``val_loss``.
        path: where to.
        title: above the picture.
    """
    rows = [row for row in rows if "epoch" in row]
    steps = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "top1" in row]
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    loss_axes, accuracy_axes = figure.subplots(1, 2, sharex=True)
    markers = {"marker": "."} if len(steps) < _MIN_POINTS_WITHOUT_MARKERS else {}
    loss_axes.plot(*_points(steps, "loss"), lw=1, label="training", **markers)
    loss_axes.plot(*_points(evaluations, "val_loss"), "o-", ms=3, label="validation")
    loss_axes.set(xlabel="epoch", ylabel="loss")
    accuracy_axes.plot(*_points(evaluations, "top1"), "o-", ms=3, label="top-1")
    accuracy_axes.plot(*_points(evaluations, "top5"), "o-", ms=3, label="top-5", alpha=0.5)
    # A little beyond 100, where the markers of a network that makes no mistake are.
    accuracy_axes.set(xlabel="epoch", ylabel="validation accuracy, %", ylim=(0, 103))
    for axes in (loss_axes, accuracy_axes):
        axes.grid(alpha=0.3)
        _legend_above(axes)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)


def _points(rows: Iterable[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Epochs and values; NaN, which leaves a gap, where a row has none."""
    values = [(row["epoch"], row.get(name)) for row in rows]
    return [epoch for epoch, _ in values], [math.nan if value is None else value for _, value in values]


def _legend_above(axes: Axes) -> None:
    """Puts the legend where no curve can be."""
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
