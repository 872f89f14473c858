"""What a run leaves behind for people and programs: rows of JSON, TensorBoard events, summary.json, curves.png."""

from __future__ import annotations

import json
import math
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of the packages that TensorBoard's writer imports
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

Row = Mapping[str, Any]


class _Appended:
    """A file that grows, unbuffered. What a full disk does not take is kept, and written before what comes next."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self._left = bytearray()

    def write(self, data: bytes) -> None:
        """Adds bytes to what :meth:`flush` writes."""
        self._left += data

    def flush(self, *, sync: bool = False) -> None:
        """Writes what there is.

        Raises:
            OSError: not all of it could be written.
        """
        while self._left:
            del self._left[: os.write(self._descriptor, self._left)]
        if sync:
            os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


class MetricsLog:
    """Appends rows to OUT/metrics.jsonl and OUT/tensorboard, and trust ratios to OUT/trust_ratios.jsonl.

    A disk that takes no more is a warning; the rows follow when there is room again.

    Args:
        out: the run's folder.
        after_step: rows of later steps are dropped: a resumed run writes them again.
        evaluated_step: rows of later evaluations are dropped likewise; by default those of later steps.
        warn: told when rows cannot be written.
    """

    def __init__(
        self,
        out: Path,
        after_step: int = 0,
        evaluated_step: int | None = None,
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        path, folder = out / "metrics.jsonl", out / "tensorboard"
        self._ratios_path = out / "trust_ratios.jsonl"
        self._ratios: _Appended | None = None
        last = {"step": after_step, "evaluation": after_step if evaluated_step is None else evaluated_step}
        for file in (path, self._ratios_path):
            if file.exists():
                rows = read_metrics(file)
                kept = [row for row in rows if row["step"] <= last["evaluation" if "top1" in row else "step"]]
                write_text(file, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = _Appended(path)
        folder.mkdir(exist_ok=True)
        # TensorBoard reads files in the order of their names.
        self._events = _Appended(folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}")
        self._records = RecordWriter(self._events)
        self._warn, self._failing = warn, False
        self._add_event(file_version="brain.Event:2")
        # What earlier files have of later steps is not shown.
        self._add_event(step=after_step + 1, session_log=SessionLog(status=SessionLog.START))
        self._flush()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flush()
        for file in self._files():
            file.close()

    def write(self, row: Row) -> None:
        """Adds a row; it needs a ``step``, and its numbers become TensorBoard scalars."""
        # JSON knows no infinity, and nothing that is no number.
        row = {name: None if isinstance(value, float) and not math.isfinite(value) else value
               for name, value in row.items()}  # fmt: skip
        self._file.write((json.dumps(row) + "\n").encode())
        scalars = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in row.items()
            if name != "step" and isinstance(value, int | float)
        ]
        self._add_event(step=row["step"], summary=Summary(value=scalars))
        self._flush()

    def write_trust_ratios(self, step: int, epoch: float, ratios: Mapping[str, Mapping[str, float | None]]) -> None:
        """Adds a step's trust ratios, by the kind of the parameters (weight, norm, bias) and their names."""
        if self._ratios is None:
            self._ratios = _Appended(self._ratios_path)
        short = {kind: {name: _five_digits(ratio) for name, ratio in named.items()} for kind, named in ratios.items()}
        self._ratios.write((json.dumps({"step": step, "epoch": epoch, **short}) + "\n").encode())
        self._flush()

    def sync(self) -> None:
        """Makes the rows last that a checkpoint of this moment says there are."""
        self._flush(sync=True)

    def _files(self) -> list[_Appended]:
        return [file for file in (self._file, self._events, self._ratios) if file]

    def _add_event(self, **contents: Any) -> None:
        self._records.write(Event(wall_time=time.time(), **contents).SerializeToString())

    def _flush(self, *, sync: bool = False) -> None:
        try:
            for file in self._files():
                file.flush(sync=sync)
        except OSError as error:
            if not self._failing:
                self._warn(f"metrics cannot be written ({error.strerror}); they follow when they can")
            self._failing = True
        else:
            self._failing = False


def _five_digits(ratio: float | None) -> float | None:
    return None if ratio is None or not math.isfinite(ratio) else float(f"{ratio:.5g}")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads a metrics.jsonl; a last line that a crash cut short is left out."""
    rows = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or not isinstance(row, dict) or not isinstance(row.get("step"), int):
            break
        rows.append(row)
    return rows


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    aside = path.with_name(path.name + ".tmp")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


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
    # Loaded by who draws, which of several ranks is one, and that at the end.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

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
