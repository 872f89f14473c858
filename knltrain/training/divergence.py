"""A run that has diverged: its loss stays above that of a network that guesses."""

from __future__ import annotations

import math
from typing import Any

from knltrain.checkpoint import Progress
from knltrain.config import RunConfig
from knltrain.config.schedule import Schedule
from knltrain.errors import SharedError
from knltrain.training.failure_dump import StepNumbers

# A network that has learnt nothing yet is within a hundredth of chance.
_DIVERGED_OVER_CHANCE = 1.05


class DivergenceCheck:
    """Ends a run whose loss has been above chance for ``health.divergence_steps`` steps, after its warm-up.

    Args:
        config: of the run.
        schedule: of the run.
        num_classes: of the training set.

    Attributes:
        steps_above_chance: the last steps in a row whose loss was that of a diverged run.
    """

    def __init__(self, config: RunConfig, schedule: Schedule, num_classes: int) -> None:
        self._limit, self._schedule = config.health.divergence_steps, schedule
        # The cross-entropy of equal probabilities; smoothing the labels does not change it.
        self._threshold = _DIVERGED_OVER_CHANCE * math.log(max(2, num_classes))
        self._first_epoch = max(config.schedule.warmup_epochs, 1.0)
        self.steps_above_chance = 0

    def check_step(self, numbers: StepNumbers) -> None:
        """Counts a step with a finite loss.

        Raises:
            SharedError: the run has diverged.
        """
        above = numbers.loss > self._threshold and self._schedule.epoch(numbers.step - 1) >= self._first_epoch
        self.steps_above_chance = self.steps_above_chance + 1 if above else 0
        if self._limit and self.steps_above_chance >= self._limit:
            epoch = self._schedule.epoch(numbers.step)
            raise SharedError(
                f"diverged: at step {numbers.step} (epoch {epoch:.2f}, learning rate {numbers.lr:.4g}) the loss is "
                f"{numbers.loss:.4g}, and has been above {self._threshold:.4g}, 5 % above chance, for {self._limit} "
                "steps; lower optim.lr or lengthen schedule.warmup-epochs in another --out; "
                "--health.divergence-steps 0 goes on"
            )

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"steps_above_chance": self.steps_above_chance}

    def load(self, progress: Progress) -> None:
        """Takes over what a checkpoint holds of it."""
        self.steps_above_chance = progress.steps_above_chance
