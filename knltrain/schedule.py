"""The learning rate as a pure function of the step. Imports no torch, so a login node can plot it.

All formulas use the step t = 0, 1, …, T-1 (T optimizer updates in all), the warm-up length W in steps, the peak
learning rate L and the rate s at which the warm-up starts:

* warm-up, t < W:             s + (L - s) t/W               a constant increment per step, as Goyal et al. (2017) 2.2
* ``poly``:                   e + (L - e) (1 - t/T)^p       counted from step 0, as Caffe's "poly" policy does, so
                                                            that the rate drops at once when a warm-up ends
* ``poly-after-warmup``:      e + (L - e) (1 - (t-W)/(T-W+1))^p    counted from the end of the warm-up, as the MLPerf
                                                            reference does
* ``step``:                   L g^k                         k milestones (in epochs) are behind
* ``constant``:               L
"""

from __future__ import annotations

import math

from knltrain.config import ScheduleConfig


def learning_rate(config: ScheduleConfig, *, peak: float, step: int, total_steps: int, steps_per_epoch: float) -> float:
    """Returns the learning rate of one optimizer update.

    Args:
        config: which schedule, and its constants.
        peak: the learning rate L that the warm-up ends at.
        step: which update, from 0.
        total_steps: updates in the whole run, T.
        steps_per_epoch: updates in an epoch; need not be whole.

    Raises:
        ValueError: ``step`` outside [0, total_steps), or an unknown schedule.
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"step {step} is outside the run's {total_steps} steps")
    warmup_steps = config.warmup_epochs * steps_per_epoch
    if step < warmup_steps:
        return config.warmup_lr + (peak - config.warmup_lr) * step / warmup_steps
    if config.name == "poly":
        return config.end_lr + (peak - config.end_lr) * math.pow(1 - step / total_steps, config.power)
    if config.name == "poly-after-warmup":
        done = (step - warmup_steps) / (total_steps - warmup_steps + 1)
        return config.end_lr + (peak - config.end_lr) * math.pow(1 - done, config.power)
    if config.name == "step":
        behind = sum(step >= milestone * steps_per_epoch for milestone in config.milestones)
        return peak * config.gamma**behind
    if config.name == "constant":
        return peak
    raise ValueError(f"unknown schedule {config.name!r}")


def total_steps(*, epochs: float, num_images: int, global_batch: int) -> int:
    """Optimizer updates in a run: epochs x images / batch, rounded, at least one.

    An epoch need not be a whole number of steps: the order of epoch e+1 follows that of epoch e without a gap, so no
    image is dropped and no batch is short. This gives the iteration counts the literature gives (225,205 for 90
    ImageNet epochs at batch 512).
    """
    return max(1, round(epochs * num_images / global_batch))
