"""Rows of metrics that a run leaves behind, as JSON and as TensorBoard events. Reading them loads neither."""

from __future__ import annotations

import json
import math
import os
import socket
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from knltrain.files import naming, replacing

Row = Mapping[str, Any]


class _Appended:
    """An unbuffered file to append to. Data that a full disk does not take are kept and written later."""

    def __init__(self, path: Path) -> None:
        self._path = path
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
        with naming(self._path):
            while self._left:
                del self._left[: os.write(self._descriptor, self._left)]
            if sync:
                os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


class MetricsLog:
    """Appends rows to OUT/metrics.jsonl and OUT/tensorboard, and trust ratios to OUT/trust_ratios.jsonl.

    A full disk is a warning; the rows are written once there is space again.

    Args:
        out: the run's folder.
        after_step: rows of later steps are dropped: a resumed run writes them again.
        evaluated_step: rows of later evaluations are dropped likewise; by default those of later steps.
        warn: called when rows cannot be written.
    """

    def __init__(
        self,
        out: Path,
        after_step: int = 0,
        evaluated_step: int | None = None,
        warn: Callable[[str], None] = warnings.warn,
    ) -> None:
        from knltrain.runlog.tensorboard import EventWriter  # imported here: readers of rows need no TensorBoard

        path, folder = out / "metrics.jsonl", out / "tensorboard"
        self._ratios_path = out / "trust_ratios.jsonl"
        self._ratios: _Appended | None = None
        last = {"step": after_step, "evaluation": after_step if evaluated_step is None else evaluated_step}
        for file in (path, self._ratios_path):
            if file.exists():
                rows = read_metrics(file, warn)
                kept = [row for row in rows if row["step"] <= last["evaluation" if "top1" in row else "step"]]
                write_text(file, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = _Appended(path)
        folder.mkdir(exist_ok=True)
        # TensorBoard reads files in the order of their names.
        self._events = _Appended(folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}")
        self._tensorboard = EventWriter(self._events, first_step=after_step + 1)
        self._warn, self._failing = warn, False
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
        # JSON has neither infinity nor NaN.
        row = {name: None if isinstance(value, float) and not math.isfinite(value) else value
               for name, value in row.items()}  # fmt: skip
        self._file.write((json.dumps(row) + "\n").encode())
        scalars = {name: value for name, value in row.items() if name != "step" and isinstance(value, int | float)}
        self._tensorboard.add_scalars(row["step"], scalars)
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

    def _flush(self, *, sync: bool = False) -> None:
        try:
            for file in self._files():
                file.flush(sync=sync)
        except OSError as error:
            if not self._failing:
                self._warn(f"metrics cannot be written ({error.filename}: {error.strerror}); they follow when they can")
            self._failing = True
        else:
            self._failing = False


def _five_digits(ratio: float | None) -> float | None:
    return None if ratio is None or not math.isfinite(ratio) else float(f"{ratio:.5g}")


def read_metrics(path: Path, warn: Callable[[str], None] = warnings.warn) -> list[dict[str, Any]]:
    """Reads a metrics.jsonl. Lines that are no rows are left out, as is a last line that a crash cut short.

    Args:
        path: the file.
        warn: called once if there are such lines before the end.

    Raises:
        OSError: it is missing, or cannot be read now.
    """
    with naming(path), open(path, "rb") as file:
        *lines, _ = file.read().split(b"\n")
    rows = [_row(line) for line in lines]
    if bad := [number for number, row in enumerate(rows, 1) if row is None]:
        warn(left_out(path, bad[0], len(bad)))
    return [row for row in rows if row is not None]


def left_out(path: Path, first: int, count: int) -> str:
    """Says that lines of a file are no rows.

    Args:
        path: the file.
        first: the number of the first such line.
        count: how many there are.
    """
    if count == 1:
        return f"{path}: line {first} is no row; it is left out"
    return f"{path}: {count:,} lines are no rows, line {first} first; they are left out"


def _row(line: bytes) -> dict[str, Any] | None:
    """Returns the row that a line has; None if it is none. A crash may have left NULs where a disk lost what came."""
    try:
        row = json.loads(line.strip(b"\0"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    numbers = all(isinstance(value, int | float | dict) or value is None for value in row.values())
    return row if numbers else None


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    with replacing(path, aside=path.with_name(f"{path.name}.tmp")) as file:
        file.write(text.encode())
