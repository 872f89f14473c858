"""What a run leaves behind for people and programs: metrics.jsonl, TensorBoard events, summary.json, curves.png."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of the packages that TensorBoard's writer imports
    from torch.utils.tensorboard import SummaryWriter

Row = Mapping[str, Any]


class MetricsLog:
    """Appends rows to OUT/metrics.jsonl and OUT/tensorboard.

    Args:
        out: the run's folder.
        after_step: rows of later steps are dropped: a resumed run writes them again.
    """

    def __init__(self, out: Path, after_step: int = 0) -> None:
        path = out / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if row["step"] <= after_step] if path.exists() else []
        self._file = path.open("w", encoding="utf-8")
        self._file.writelines(json.dumps(row) + "\n" for row in kept)
        self._tensorboard = SummaryWriter(str(out / "tensorboard"), purge_step=after_step + 1)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._tensorboard.close()

    def write(self, row: Row) -> None:
        """Adds a row; it needs a ``step``, and its numbers become TensorBoard scalars."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step" and value is not None:
                self._tensorboard.add_scalar(name, value, row["step"])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads a metrics.jsonl; a last line that a crash cut short is left out."""
    rows = []
    for line in path.read_text("utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file, whole or not at all."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
    aside.replace(path)


def draw_curves(rows: Iterable[Row], path: Path, title: str) -> None:
    """Draws loss and accuracy against the epoch to a PNG.

    Args:
        rows: of a metrics.jsonl: steps have ``loss``, evaluations have ``top1`` and ``val_loss``.
        path: where to.
        title: above the picture.
    """
    rows = list(rows)
    steps = [row for row in rows if "loss" in row]
    evaluations = [row for row in rows if "top1" in row]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    loss_axes, accuracy_axes = figure.subplots(1, 2, sharex=True)
    # A run of few steps is drawn as points too: a line through one point shows nothing.
    dots = {"marker": "."} if len(steps) < 30 else {}
    loss_axes.plot([row["epoch"] for row in steps], [row["loss"] for row in steps], lw=1, label="training", **dots)
    epochs = [row["epoch"] for row in evaluations]
    loss_axes.plot(epochs, [row["val_loss"] for row in evaluations], "o-", ms=3, label="validation")
    loss_axes.set(xlabel="epoch", ylabel="loss")
    loss_axes.legend()
    accuracy_axes.plot(epochs, [row["top1"] for row in evaluations], "o-", ms=3, label="top-1")
    accuracy_axes.plot(epochs, [row["top5"] for row in evaluations], "o-", ms=3, label="top-5", alpha=0.5)
    accuracy_axes.set(xlabel="epoch", ylabel="validation accuracy, %", ylim=(0, 100))
    accuracy_axes.legend(loc="lower right")
    for axes in (loss_axes, accuracy_axes):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
