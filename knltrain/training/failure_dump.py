"""OUT/failed: what a step with NaN or Inf was made of."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from knltrain.checkpoint import Progress, Snapshot, write
from knltrain.comm.group import Group
from knltrain.config.schedule import Schedule
from knltrain.data.loader import RankBatch
from knltrain.data.order import samples
from knltrain.training.engine import Engine
from knltrain.training.gradient_norm import exact_norms


class StepNumbers(NamedTuple):
    """What a step is judged by.

    Attributes:
        step: its number, from 1.
        lr: its learning rate.
        losses: of this rank's micro-batches.
        loss: the mean over all ranks.
        norm: the gradient's, over all ranks.
    """

    step: int
    lr: float
    losses: Sequence[float]
    loss: float
    norm: float


class FailureDump:
    """Writes what a step was made of to a folder of its own: all ranks call it, each writes its own part.

    Args:
        out: the run's folder.
        group: the ranks.
        engine: has the weights and gradients.
        schedule: of the run.
        rank_batches: this rank's part of the batches of each phase.
        seed: of the run.
        num_images: of the training set.
    """

    def __init__(
        self, out: Path, group: Group, engine: Engine, schedule: Schedule, rank_batches: Sequence[RankBatch], *,
        seed: int, num_images: int,
    ) -> None:  # fmt: skip
        self._out, self._group, self._engine = out, group, engine
        self._schedule, self._rank_batches, self._seed, self._num_images = schedule, rank_batches, seed, num_images

    def write(self, numbers: StepNumbers, progress: Progress, *, with_state: bool) -> str:
        """Writes the images, losses and gradient norms of a step.

        Args:
            numbers: of the step.
            progress: where the run stood before it.
            with_state: write the weights too, as they were before the step.

        Returns:
            Where it is, for people; the same on all ranks unless one could not write.
        """
        folder = self._out / "failed" / f"step-{numbers.step:08}"
        problem = ""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write_json(folder / f"rank-{self._group.rank:04}.json", self._rank_record(numbers))
            if self._group.is_first:
                _write_json(folder / "report.json", self._report(numbers, progress))
                if with_state:
                    snapshot = Snapshot()
                    snapshot.take(progress, self._engine.state_dict(), self._engine.optimizer, meta={})
                    write(snapshot, folder / "state")
        except OSError as error:
            problem = f"{folder} could not be written ({error.strerror})"
        # Waits until all have written: the end of one rank ends the others.
        if self._group.any(bool(problem)):
            return problem or f"{folder} could not be written whole"
        return f"{'its state' if with_state else 'its record'} is in {folder}"

    def _rank_record(self, numbers: StepNumbers) -> dict[str, Any]:
        step, rank = numbers.step - 1, self._group.rank
        batches = [
            samples(self._seed, self._num_images, first, stop).tolist()
            for first, stop in self._rank_batches[self._schedule.index(step)].ranges(step)
        ]
        return {"rank": rank, "host": self._group.hosts[rank], "losses": numbers.losses, "samples": batches}

    def _report(self, numbers: StepNumbers, progress: Progress) -> dict[str, Any]:
        return {"step": numbers.step, "epoch": self._schedule.epoch(numbers.step), "lr": numbers.lr,
                "loss": numbers.loss, "grad_norm": numbers.norm,
                "gradient_norms": exact_norms(self._engine.gradients()),
                "progress": dataclasses.asdict(progress)}  # fmt: skip


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    """JSON has neither NaN nor Inf: they are written as words."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    path.write_text(json.dumps(_in_words(value), indent=2) + "\n", "utf-8")


def _in_words(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _in_words(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_in_words(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
