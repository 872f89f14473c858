"""NaN and Inf in a step: seen before they reach the weights, and before the weights reach a checkpoint.

Everything that is decided here follows from sums over all ranks, so that all ranks decide alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from knltrain.checkpoint import Progress
from knltrain.comm.group import Group
from knltrain.config import HealthConfig
from knltrain.config.schedule import Schedule
from knltrain.errors import SharedError
from knltrain.training.engine import Engine
from knltrain.training.failure_dump import FailureDump, StepNumbers
from knltrain.training.gradient_norm import exact_norms

_LOWER_RATE = "lower optim.lr or lengthen schedule.warmup-epochs, or go on with --health.policy skip or rewind"


class RewindError(Exception):
    """The run is to go back to its last checkpoint; the message says why."""


class StepGuard:
    """Decides whether the optimizer may take a step; ``health.policy`` says what becomes of one that it may not.

    Args:
        health: of the run's configuration.
        out: the run's folder.
        group: the ranks.
        engine: has the gradients, weights and buffers.
        schedule: of the run.
        dump: keeps what a bad step was made of.
        warn: told of a step that is skipped.

    Attributes:
        skipped_steps: steps without an update.
        skipped_in_a_row: of these, the last ones up to now.
        rewinds: how often the run went back to a checkpoint.
        lr_factor: what the schedule's learning rate is multiplied by since.
    """

    def __init__(
        self, health: HealthConfig, out: Path, group: Group, engine: Engine, schedule: Schedule, dump: FailureDump,
        warn: Callable[[str], None],
    ) -> None:  # fmt: skip
        self._health, self._out, self._group, self._engine = health, out, group, engine
        self._schedule, self._dump, self._warn = schedule, dump, warn
        self._buffers: list[Tensor] = list(engine.model.buffers()) if health.policy == "skip" else []
        self._before: list[Tensor] = []
        self.skipped_steps = self.skipped_in_a_row = self.rewinds = 0
        self.lr_factor = 1.0

    def begin_step(self) -> None:
        """Remembers what the forward pass changes, for a step that is then skipped."""
        self._before = [buffer.clone() for buffer in self._buffers]

    def check_step(self, numbers: StepNumbers, progress: Progress) -> bool:
        """Decides whether the optimizer may take a step.

        Args:
            numbers: of the step.
            progress: where the run stood before it.

        Returns:
            False where the step is skipped: what its forward pass has changed is as before.

        Raises:
            RewindError: the run is to go back to its last checkpoint.
            SharedError: it is to end. What it stood on is in OUT/failed.
        """
        if math.isfinite(numbers.loss) and math.isfinite(numbers.norm):
            self.skipped_in_a_row = 0
            return True
        skip = self._health.policy == "skip" and self.skipped_in_a_row < self._health.max_skips
        rewind = self._health.policy == "rewind" and self.rewinds < self._health.max_rewinds
        why = self._describe(numbers)
        where = self._dump.write(numbers, progress, with_state=not (skip or rewind))
        if rewind:
            raise RewindError(f"{why}, {where}")
        if not skip:
            raise SharedError(f"{why}; {where}. {self._advice()}; checkpoints in {self._out} are good")
        self._warn(f"{why}; the step is skipped, {where}")
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(before)
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        return False

    def check_weights(self, step: int) -> None:
        """Looks whether the weights are finite, before a checkpoint; all ranks call it at once.

        Raises:
            SharedError: they are not.
        """
        bad = [name for name, weight in self._engine.weights().items() if not _is_finite(weight)]
        if self._group.any(bool(bad)):
            where = bad[0] if bad else "on another rank"
            raise SharedError(
                f"step {step} made NaN or Inf of finite weights ({where}): {_LOWER_RATE}; checkpoints in {self._out} "
                "are good"
            )

    def rewound(self, before: StepGuard) -> None:
        """Counts the rewind that ended the attempt ``before``, and lowers the learning rate."""
        self.rewinds = before.rewinds + 1
        self.lr_factor = before.lr_factor * self._health.rewind_factor

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"skipped_steps": self.skipped_steps, "skipped_in_a_row": self.skipped_in_a_row,
                "rewinds": self.rewinds, "lr_factor": self.lr_factor}  # fmt: skip

    def load(self, progress: Progress) -> None:
        """Takes over what a checkpoint holds of it."""
        self.skipped_steps, self.skipped_in_a_row = progress.skipped_steps, progress.skipped_in_a_row
        self.rewinds, self.lr_factor = progress.rewinds, progress.lr_factor

    def _describe(self, numbers: StepNumbers) -> str:
        """One line that is the same on all ranks, which all call this."""
        mean = torch.tensor([sum(numbers.losses) / len(numbers.losses)], dtype=torch.float64)
        of_ranks = self._group.gather(mean)[:, 0].tolist()
        norms = exact_norms(self._engine.gradients())
        bad = [name for name, norm in norms.items() if not math.isfinite(norm)]
        epoch = self._schedule.epoch(numbers.step)
        what = f"at step {numbers.step} (epoch {epoch:.2f}, learning rate {numbers.lr:.4g}) "
        blamed = [rank for rank, loss in enumerate(of_ranks) if not math.isfinite(loss)]
        if blamed:
            what += f"the loss of {self._group.names_of(blamed)} is {of_ranks[blamed[0]]}"
        else:
            what += f"the loss is {numbers.loss:.4g} and finite on every rank, but the gradient is not"
        if bad:
            what += f"; the first layer with a bad gradient is {bad[0]}, {len(bad)} of {len(norms)} have one"
        return what

    def _advice(self) -> str:
        if self._health.policy == "skip":
            return f"{self._health.max_skips} steps in a row were skipped: lower optim.lr, or --health.policy rewind"
        if self._health.policy == "rewind":
            return f"gone back {self._health.max_rewinds} times: lower optim.lr, or look at the images of that step"
        return _LOWER_RATE


def _is_finite(weight: Tensor) -> bool:
    # A sum of finite numbers may be Inf; then each is looked at.
    return bool(weight.sum().isfinite()) or bool(weight.isfinite().all())
