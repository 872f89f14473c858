"""Console output of a run: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from knltrain.errors import one_line

if TYPE_CHECKING:
    from typing_extensions import Self

# Interval of progress lines in a log file.
_LINE_INTERVAL_S = 10.0


class Console:
    """Text for people, on stdout, or on stderr if stdout is reserved for JSON.

    Args:
        json: reserve stdout for JSON.
        silent: print nothing, as on all ranks but rank 0.
    """

    def __init__(self, *, json: bool = False, silent: bool = False) -> None:
        self.rich = RichConsole(file=sys.stderr if json else sys.stdout, quiet=silent, highlight=False, soft_wrap=True)

    def line(self, text: str) -> None:
        """Prints a line above the progress bar."""
        self.rich.print(one_line(text), markup=False)

    def warn(self, text: str) -> None:
        """Prints a warning."""
        self.rich.print(f"warning: {one_line(text)}", markup=False, style="yellow")


class _Bar:
    """A context manager that shows a progress bar on a terminal, and nothing elsewhere."""

    _bar: Progress | None = None

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()


class ImageProgress(_Bar):
    """Shows the number of finished images (or files), their rate, and the remaining time.

    Attributes:
        seconds: time since creation.

    Args:
        console: the console.
        first: number already done.
        total: total number.
        unit: what is counted.
    """

    def __init__(self, console: Console, *, first: int, total: int, unit: str = "images") -> None:
        self._console, self._first, self._done, self._total, self._unit = console, first, first, total, unit
        self._start = self._last_line = time.monotonic()
        if console.rich.is_terminal and not console.rich.quiet:
            self._bar = Progress(
                BarColumn(bar_width=None),
                TextColumn("{task.completed:,}/{task.total:,} " + unit),
                TextColumn("{task.fields[rate]:,.0f}/s"),
                TimeRemainingColumn(),
                console=console.rich,
                transient=True,
                expand=True,
            )
            self._task: TaskID = self._bar.add_task(unit, total=total, completed=first, rate=0.0)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def add(self, count: int) -> None:
        """Adds to the number of finished items."""
        self._done += count
        rate = (self._done - self._first) / max(self.seconds, 1e-9)
        if self._bar:
            self._bar.update(self._task, completed=self._done, rate=rate)
        elif time.monotonic() - self._last_line > _LINE_INTERVAL_S:
            self._last_line = time.monotonic()
            left = (self._total - self._done) / rate
            self._console.line(f"{self._done:,}/{self._total:,} {self._unit}, {rate:,.0f}/s, {left / 60:.0f} min left")


class StepProgress(_Bar):
    """Shows the progress of training steps.

    Args:
        console: the console.
        first: steps already done.
        total: total number of steps.
        epochs: total number of epochs.
    """

    def __init__(self, console: Console, *, first: int, total: int, epochs: float) -> None:
        self._console, self._total, self._epochs = console, total, epochs
        self._last_line = time.monotonic()
        if console.rich.is_terminal and not console.rich.quiet:
            # Half a million steps fit into 80 columns. Only the bar shrinks: rich would cut the remaining time as well.
            self._bar = Progress(
                TextColumn("epoch {task.fields[epoch]:.1f}/" + f"{epochs:g}"),
                BarColumn(bar_width=None),
                TextColumn("step {task.completed}/{task.total}"),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(table_column=Column(no_wrap=True)),
                console=console.rich,
                transient=True,
                expand=True,
            )
            self._task: TaskID = self._bar.add_task(
                "training", total=total, completed=first, epoch=epochs * first / total, numbers=""
            )

    def step(self, row: Mapping[str, Any]) -> None:
        """Shows a step's row of metrics.jsonl."""
        data = row["data_s"] / row["step_s"]
        if self._bar:
            self._bar.update(
                self._task,
                completed=row["step"],
                epoch=row["epoch"],
                numbers=f"loss {row['loss']:.3f}  {row['images_per_s']:.0f} img/s  data {data:.0%}",
            )
        elif time.monotonic() - self._last_line > _LINE_INTERVAL_S:
            self._last_line = time.monotonic()
            self._console.line(
                f"step {row['step']}/{self._total}  epoch {row['epoch']:.2f}/{self._epochs:g}  loss {row['loss']:.4f}  "
                f"lr {row['lr']:.4g}  {row['images_per_s']:.0f} img/s  data {data:.0%}"
            )

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Shows an evaluation's row of metrics.jsonl."""
        self._last_line = time.monotonic()
        self._console.line(
            f"epoch {row['epoch']:.2f}  top-1 {row['top1']:.2f} %  top-5 {row['top5']:.2f} %  "
            f"validation loss {row['val_loss']:.4f}"
        )
