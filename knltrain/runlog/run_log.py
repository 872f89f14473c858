"""A run's rows, in its files and on the terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knltrain.runlog.console import Console, StepProgress
from knltrain.runlog.metrics import MetricsLog

if TYPE_CHECKING:
    from typing_extensions import Self


class RunLog(contextlib.ExitStack):
    """Writes rows to metrics.jsonl and TensorBoard on the first rank, and shows them there; nothing on the others.

    Args:
        out: the run's folder.
        console: where to show them.
        is_first: whether this is the first rank.
        step: steps done; rows of later ones are dropped.
        evaluated_step: the last step that was evaluated; rows of later evaluations are dropped.
        total_steps: of the run.
        epochs: of the run.
    """

    def __init__(
        self, out: Path, console: Console, *, is_first: bool, step: int, evaluated_step: int, total_steps: int,
        epochs: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self._open = (lambda: MetricsLog(out, step, evaluated_step, console.warn)) if is_first else None
        self._metrics: MetricsLog | None = None
        self._bar = StepProgress(console, first=step, total=total_steps, epochs=epochs)

    def __enter__(self) -> Self:
        super().__enter__()
        if self._open:
            self._metrics = self.enter_context(self._open())
        self.enter_context(self._bar)
        return self

    def step(self, row: Mapping[str, Any]) -> None:
        """Adds a step's row."""
        if self._metrics:
            self._metrics.write(row)
        self._bar.step(row)

    def evaluation(self, row: Mapping[str, Any]) -> None:
        """Adds an evaluation's row."""
        if self._metrics:
            self._metrics.write(row)
        self._bar.evaluation(row)

    def trust_ratios(self, step: int, epoch: float, ratios: Mapping[str, Mapping[str, float | None]]) -> None:
        """Adds a step's trust ratios, if there are any."""
        if self._metrics and ratios:
            self._metrics.write_trust_ratios(step, epoch, ratios)

    def sync(self) -> None:
        """Makes the rows durable that a checkpoint of this moment says there are."""
        if self._metrics:
            self._metrics.sync()
