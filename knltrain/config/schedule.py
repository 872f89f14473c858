"""What a step is, as a pure function of its number: its images, how they are seen, the learning rate.

Imports no torch, so a login node can plot it. A run is a few phases of steps that are alike (:class:`Schedule`): batch
and image size may change at given epochs, and the last epochs may go without augmentation. A phase begins with the step
that is nearest to its epoch, and with the image after the last one of the phase before: the stream has no gap.

All formulas of the learning rate use the step t = 0, 1, …, T-1 (T optimizer updates in all), the warm-up length W in
steps, the peak learning rate L and the rate s at which the warm-up starts:

* warm-up, t < W:             s + (L - s) t/W               a constant increment per step, as Goyal et al. (2017) 2.2
* ``poly``:                   e + (L - e) (1 - t/T)^p       counted from step 0, as Caffe's "poly" policy does, so
                                                            that the rate drops at once when a warm-up ends
* ``poly-after-warmup``:      e + (L - e) (1 - (t-W)/(T-W+1))^p    counted from the end of the warm-up, as the MLPerf
                                                            reference does
* ``step``:                   L g^k                         k milestones (in epochs) are behind
* ``constant``:               L

Where the batch changes, t, W and T are counted in steps of the last batch (images seen over ``global_batch``), so that
the rate is a function of the images seen; with linear scaling, L follows the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from knltrain.config.schema import RunConfig, ScheduleConfig


class Phase(NamedTuple):
    """Steps that are alike.

    Attributes:
        first_step: of the run, from 0.
        last_step: the first one that is not of it any more.
        first_image: place of its first image in the stream that the run is trained on.
        batch: images of a step.
        image_size: pixels.
        augmented: whether training sees other crops than evaluation.
    """

    first_step: int
    last_step: int
    first_image: int
    batch: int
    image_size: int
    augmented: bool


@dataclass(frozen=True)
class Schedule:
    """The phases of a run, in order and without a gap."""

    phases: tuple[Phase, ...]
    num_images: int

    @property
    def total_steps(self) -> int:
        """Updates in the whole run."""
        return self.phases[-1].last_step

    def index(self, step: int) -> int:
        """Which phase a step is of; of steps after the run's end, the last."""
        return sum(step >= phase.last_step for phase in self.phases[:-1])

    def phase(self, step: int) -> Phase:
        """The phase that a step is of."""
        return self.phases[self.index(step)]

    def images(self, steps: int) -> int:
        """Images that so many steps have seen."""
        phase = self.phase(max(0, steps - 1))
        return phase.first_image + (steps - phase.first_step) * phase.batch

    def epoch(self, steps: int) -> float:
        """Passes over the training images after so many steps."""
        return self.images(steps) / self.num_images

    def lr(self, config: RunConfig, step: int) -> float:
        """The learning rate of a step; ``config`` is what the schedule was made of."""
        return learning_rate(
            config.schedule,
            peak=config.peak_lr_at(self.phase(step).batch),
            step=self.images(step) / config.global_batch,
            total_steps=self.images(self.total_steps) / config.global_batch,
            steps_per_epoch=self.num_images / config.global_batch,
        )


def make_schedule(config: RunConfig, num_images: int) -> Schedule:
    """Divides a run into phases.

    Each takes as many steps as come closest to its end; the whole run at least one. Without changes in its course a run
    is one phase of :func:`total_steps`.

    Args:
        config: what is trained.
        num_images: of the training set.
    """
    schedule, end = config.schedule, config.epochs
    collapse = end - config.augment.collapse_epochs
    bounds = {*schedule.image_size_epochs, *schedule.batch_epochs, collapse, end}
    phases: list[Phase] = []
    step = image = 0
    begin = 0.0
    for bound in sorted(bound for bound in bounds if 0 < bound <= end):
        batch = _value_at(begin, schedule.batches, schedule.batch_epochs, config.global_batch)
        size = _value_at(begin, schedule.image_sizes, schedule.image_size_epochs, config.image_size)
        augmented = config.augment.name != "none" and begin < collapse
        steps = max(0, round((bound * num_images - image) / batch))
        if bound == end and not phases:
            steps = max(1, steps)
        if steps:
            phases.append(Phase(step, step + steps, image, batch, size, augmented))
        step, image, begin = step + steps, image + steps * batch, bound
    return Schedule(tuple(phases), num_images)


def _value_at(epoch: float, values: tuple[int, ...], ends: tuple[float, ...], last: int) -> int:
    return next((value for value, end in zip(values, ends, strict=True) if epoch < end), last)


def learning_rate(
    config: ScheduleConfig, *, peak: float, step: float, total_steps: float, steps_per_epoch: float
) -> float:
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
