"""What is due after a step: an evaluation, a checkpoint, a comparison of the ranks' weights, a row of trust ratios."""

from __future__ import annotations

import math
from dataclasses import dataclass

from knltrain.config import RunConfig
from knltrain.config.schedule import Schedule

# Rows of trust ratios in a run: enough for a curve, at 6 kB each for ResNet-50.
_MAX_TRUST_RATIO_ROWS = 1000


@dataclass(frozen=True)
class Due:
    """What follows a step.

    Attributes:
        evaluate: evaluate.
        save: write a checkpoint.
        last: this process stops after it; the checkpoint is on disk before.
        check_finite: look whether the weights are finite, since a checkpoint of them may follow.
        compare: compare the weights of all ranks.
    """

    evaluate: bool
    save: bool
    last: bool
    check_finite: bool
    compare: bool


class DueRules:
    """Decides what is due, from the step alone.

    Args:
        config: of the run.
        schedule: of the run.

    Attributes:
        last_step: where this process stops: the end of the run, or ``max_steps``.
    """

    def __init__(self, config: RunConfig, schedule: Schedule) -> None:
        self._config, self._schedule = config, schedule
        self.last_step = min(schedule.total_steps, config.max_steps or schedule.total_steps)

    def after(self, steps: int, *, interrupted: bool = False) -> Due:
        """What is due after the last of ``steps`` steps.

        Args:
            steps: done.
            interrupted: a signal came: a checkpoint is written, and there is no time for an evaluation.
        """
        last = interrupted or steps == self.last_step
        evaluate = self.evaluation(steps)
        save = last or self.completed_interval(steps, self._config.checkpoint.every)
        every = self._config.health.compare_every
        return Due(
            evaluate=evaluate and not interrupted,
            save=save,
            last=last,
            check_finite=save or evaluate,
            compare=bool(every) and (save or evaluate or steps % every == 0),
        )

    def evaluation(self, steps: int) -> bool:
        """Whether the run is evaluated after so many steps: at the end of every epoch, and of the run."""
        return steps > 0 and (self.completed_interval(steps) or steps == self.last_step)

    def trust_ratios(self, steps: int) -> bool:
        """Whether the last of ``steps`` steps has its trust ratios logged: the first, and up to a thousand of a run."""
        every = math.ceil(self._schedule.total_steps / _MAX_TRUST_RATIO_ROWS)
        return self._config.log_trust_ratios and (steps == 1 or steps % every == 0)

    def completed_interval(self, steps: int, every: float = 1.0) -> bool:
        """Whether the last of ``steps`` steps completed another ``every`` epochs."""
        intervals = (math.floor(self._schedule.epoch(count) / every + 1e-9) for count in (steps - 1, steps))
        before, after = intervals
        return after > before
