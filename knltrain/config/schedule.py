"""The schedule of a run: batch, image size, augmentation and learning rate as pure functions of the step.

Imports no torch, so that it can be plotted on a login node. A run is a sequence of phases (:class:`Schedule`) with
constant settings: batch and image size may change at given epochs, and the last epochs may be trained without
augmentation. A phase starts at the step nearest to its epoch, with the image after the last one of the previous phase:
no image is skipped.

All formulas of the learning rate use the step t = 0, 1, …, T-1 (T optimizer updates in all), the warm-up length W in
steps, the peak learning rate L and the rate s at which the warm-up starts:

* warm-up, t < W:             s + (L - s) t/W               a constant increment per step, as Goyal et al. (2017) 2.2
* ``poly``:                   e + (L - e) (1 - t/T)^p       counted from step 0, as Caffe's "poly" policy does, so
                                                            that the rate drops at once when a warm-up ends
* ``poly-after-warmup``:      e + (L - e) (1 - (t-W)/(T-W+1))^p    counted from the end of the warm-up, as the MLPerf
                                                            reference does
* ``step``:                   L g^k                         after k milestones (in epochs)
* ``constant``:               L

If the batch changes, t, W and T are counted in steps of the last batch (images seen over ``global_batch``), so that
the rate is a function of the images seen; with linear scaling, L follows the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from knltrain.config.schema import RunConfig, ScheduleConfig


class Phase(NamedTuple):
    """Steps with the same settings.

    Attributes:
        first_step: first step, counted from 0.
        last_step: the step after the last one.
        first_image: index of its first image in the sequence of all images that the run trains on.
        batch: images per step.
        image_size: height and width, pixels.
        augmented: whether images are augmented.
    """

    first_step: int
    last_step: int
    first_image: int
    batch: int
    image_size: int
    augmented: bool


@dataclass(frozen=True)
class Schedule:
    """The phases of a run, in order, without gaps."""

    phases: tuple[Phase, ...]
    num_images: int

    @property
    def total_steps(self) -> int:
        """Number of optimizer updates in the run."""
        return self.phases[-1].last_step

    def index(self, step: int) -> int:
        """Returns the index of a step's phase; for steps after the end of the run, the last."""
        return sum(step >= phase.last_step for phase in self.phases[:-1])

    def phase(self, step: int) -> Phase:
        """Returns the phase of a step."""
        return self.phases[self.index(step)]

    def images(self, steps: int) -> int:
        """Returns the number of images in the first ``steps`` steps."""
        phase = self.phase(max(0, steps - 1))
        return phase.first_image + (steps - phase.first_step) * phase.batch

    def epoch(self, steps: int) -> float:
        """Returns the epoch, a fraction, after ``steps`` steps."""
        return self.images(steps) / self.num_images

    def lr(self, config: RunConfig, step: int) -> float:
        """Returns the learning rate of a step; ``config`` is the configuration of the schedule."""
        return learning_rate(
            config.schedule,
            peak=config.peak_lr_at(self.phase(step).batch),
            step=self.images(step) / config.global_batch,
            epoch=self.epoch(step),
            total_steps=self.images(self.total_steps) / config.global_batch,
            steps_per_epoch=self.num_images / config.global_batch,
        )


def make_schedule(config: RunConfig, num_images: int) -> Schedule:
    """Divides a run into phases.

    Each phase has the number of steps that comes closest to its end; the run has at least one step. Without changes, a
    run is one phase of :func:`total_steps`.

    Args:
        config: the configuration of the run.
        num_images: size of the training set.
    """
    schedule, end = config.schedule, config.epochs
    collapse = end - config.augment.collapse_epochs
    bounds = {*schedule.image_size_epochs, *schedule.batch_epochs, collapse, end}
    phases: list[Phase] = []
    step = image = 0
    begin = 0.0
    for bound in sorted(bound for bound in bounds if 0 < bound <= end):
        batch = _value_at_epoch(begin, schedule.batches, schedule.batch_epochs, config.global_batch)
        size = _value_at_epoch(begin, schedule.image_sizes, schedule.image_size_epochs, config.image_size)
        augmented = config.augment.name != "none" and begin < collapse
        steps = max(0, round((bound * num_images - image) / batch))
        if bound == end and not phases:
            steps = max(1, steps)
        if steps:
            phases.append(Phase(step, step + steps, image, batch, size, augmented))
        step, image, begin = step + steps, image + steps * batch, bound
    return Schedule(tuple(phases), num_images)


def _value_at_epoch(epoch: float, values: tuple[int, ...], ends: tuple[float, ...], last: int) -> int:
    return next((value for value, end in zip(values, ends, strict=True) if epoch < end), last)


def learning_rate(
    config: ScheduleConfig, *, peak: float, step: float, epoch: float, total_steps: float, steps_per_epoch: float
) -> float:
    """Returns the learning rate of one optimizer update.

    Args:
        config: the schedule and its constants.
        peak: the learning rate L at the end of the warm-up.
        step: the update, counted from 0; may be a fraction.
        epoch: the images seen before it over the size of the training set. Warm-up and milestones are compared with
            it: a quotient of whole numbers is rounded once, so a step at a milestone is at it, with any batch.
        total_steps: updates in the run, T.
        steps_per_epoch: updates per epoch; may be a fraction.

    Raises:
        ValueError: ``step`` outside [0, total_steps), or an unknown schedule.
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"step {step} is outside the run's {total_steps} steps")
    warmup_steps = config.warmup_epochs * steps_per_epoch
    if epoch < config.warmup_epochs:
        return config.warmup_lr + (peak - config.warmup_lr) * step / warmup_steps
    if config.name == "poly":
        return config.end_lr + (peak - config.end_lr) * math.pow(1 - step / total_steps, config.power)
    if config.name == "poly-after-warmup":
        done = (step - warmup_steps) / (total_steps - warmup_steps + 1)
        return config.end_lr + (peak - config.end_lr) * math.pow(1 - done, config.power)
    if config.name == "step":
        behind = sum(epoch >= milestone for milestone in config.milestones)
        return peak * config.gamma**behind
    if config.name == "constant":
        return peak
    raise ValueError(f"unknown schedule {config.name!r}")


def total_steps(*, epochs: float, num_images: int, global_batch: int) -> int:
    """Returns the optimizer updates in a run: epochs x images / batch, rounded, at least one.

    An epoch need not be a whole number of steps: epoch e+1 continues in the batch that epoch e has not filled, so no
    image is dropped and no batch is short. The counts match the literature: 225,205 for 90 ImageNet epochs at batch
    512.
    """
    return max(1, round(epochs * num_images / global_batch))
