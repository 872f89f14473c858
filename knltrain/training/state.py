"""A run: what stays as it is while it trains, and the state that training changes and a checkpoint holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from knltrain import checkpoint
from knltrain.comm.group import Group
from knltrain.config import RunConfig
from knltrain.config.schedule import Schedule
from knltrain.data.loader import Batch, Dataset, Loader, RankBatch
from knltrain.launch.placement import RankPlacement
from knltrain.node.contention import CpuContentionMonitor
from knltrain.runlog.console import Console
from knltrain.training.divergence import DivergenceCheck
from knltrain.training.due import DueRules
from knltrain.training.ema import WeightAverage
from knltrain.training.engine import Engine
from knltrain.training.gradient_noise import NoiseScale
from knltrain.training.replica_check import ReplicaCheck
from knltrain.training.resume import ResumePoint
from knltrain.training.signals import StopRequest
from knltrain.training.step_guard import StepGuard


class Component(Protocol):
    """A part of a run that has numbers of its own in a checkpoint."""

    def state(self) -> dict[str, Any]:
        """Its fields of :class:`~knltrain.checkpoint.Progress`."""

    def load(self, progress: checkpoint.Progress) -> None:
        """Takes them over."""


@dataclasses.dataclass
class Evaluations:
    """What evaluations have found.

    Attributes:
        step: the last step that was evaluated.
        top1: of the last one, percent; None before the first.
        best_top1: of the best one.
    """

    step: int = 0
    top1: float | None = None
    best_top1: float | None = None

    def add(self, step: int, top1: float) -> None:
        """Adds one."""
        self.step, self.top1, self.best_top1 = step, top1, max(top1, self.best_top1 or 0.0)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"evaluated_step": self.step, "top1": self.top1, "best_top1": self.best_top1}

    def load(self, progress: checkpoint.Progress) -> None:
        """Takes over what a checkpoint holds of it."""
        self.step, self.top1, self.best_top1 = progress.evaluated_step, progress.top1, progress.best_top1


@dataclasses.dataclass(kw_only=True)
class TrainState:
    """What training changes; made anew when the run goes back to a checkpoint.

    Attributes:
        engine: the model and its optimizer.
        average: the moving average of the weights, if there is one.
        evaluations: what they have found.
        guard: looks at each step's loss and gradient.
        divergence: looks at the loss over many steps.
        replicas: compares the ranks' weights.
        noise: measures the gradient noise scale.
        init_from: which file the weights came from, for config.json.
        step: optimizer updates done.
        wall_s: seconds of training before this process, evaluations and checkpoints included.
    """

    engine: Engine
    average: WeightAverage | None
    evaluations: Evaluations
    guard: StepGuard
    divergence: DivergenceCheck
    replicas: ReplicaCheck
    noise: NoiseScale
    init_from: dict[str, Any] | None
    step: int = 0
    wall_s: float = 0.0

    def begin_step(self, lr: float, part: RankBatch) -> None:
        """Prepares for a step.

        Args:
            lr: its learning rate.
            part: this rank's part of its batch.
        """
        for param_group in self.engine.optimizer.param_groups:
            param_group["lr"] = lr
        self.engine.optimizer.zero_grad(set_to_none=True)
        self.guard.begin_step()
        self.noise.begin_step(part)

    @property
    def eval_model(self) -> nn.Module:
        """The network that is evaluated."""
        return self.average.model if self.average else self.engine.model

    def progress(self, *, elapsed_s: float = 0.0) -> checkpoint.Progress:
        """Where the run stands; ``elapsed_s`` seconds after this process began to train."""
        numbers: dict[str, Any] = {}
        for component in self._components():
            numbers |= component.state()
        return checkpoint.Progress(step=self.step, wall_s=self.wall_s + elapsed_s, **numbers)

    def load(self, progress: checkpoint.Progress) -> None:
        """Goes on from where a checkpoint stands."""
        self.step, self.wall_s = progress.step, progress.wall_s
        for component in self._components():
            component.load(progress)

    def _components(self) -> tuple[Component, ...]:
        return self.evaluations, self.guard, self.divergence, self.noise


@dataclasses.dataclass(kw_only=True)
class Run:
    """What a run is made of.

    Attributes:
        config: what is trained.
        out: the run's folder.
        group: the ranks.
        console: where to speak.
        placement: where this rank runs.
        stop: whether a signal has come.
        train_set: the training images.
        schedule: the phases of the run.
        due: what is due after a step.
        rank_batches: this rank's part of the batches of each phase.
        train_loader: batches of the training set.
        val_loader: batches of the validation set.
        contention: what other processes take of this rank's CPUs.
        start: where this process began.
        plan: how the run computes, for config.json and the summary.
        runtime_env: what of the machine and the versions decides bits, for checkpoints.
        meta: what every checkpoint says of the network, the data and the configuration.
        writer: of checkpoints; of the first rank.
        saved: checkpoints that this process has written.
        state: what training changes.
    """

    config: RunConfig
    out: Path
    group: Group
    console: Console
    placement: RankPlacement
    stop: StopRequest
    train_set: Dataset
    schedule: Schedule
    due: DueRules
    rank_batches: tuple[RankBatch, ...]
    train_loader: Loader
    val_loader: Loader
    contention: CpuContentionMonitor
    start: ResumePoint
    plan: dict[str, Any]
    runtime_env: dict[str, Any]
    meta: dict[str, Any]
    writer: checkpoint.CheckpointWriter | None = None
    saved: list[Path] = dataclasses.field(default_factory=list)
    state: TrainState = dataclasses.field(init=False)

    @property
    def last_step(self) -> int:
        """Where this process stops: the end of the run, or max_steps."""
        return self.due.last_step

    @property
    def is_finished(self) -> bool:
        """Whether the last step is done and evaluated."""
        return self.last_step <= self.state.step == self.state.evaluations.step

    def epoch(self, steps: int) -> float:
        """Passes over the training images after so many steps."""
        return self.schedule.epoch(steps)

    def lr(self, step: int) -> float:
        """The learning rate of a step."""
        return self.state.guard.lr_factor * self.schedule.lr(self.config, step)

    def rank_batch(self, step: int) -> RankBatch:
        """This rank's part of a step."""
        return self.rank_batches[self.schedule.index(step)]

    def batches(self, first_step: int, last_step: int) -> Generator[Batch, None, None]:
        """Yields this rank's micro-batches of the steps [first_step, last_step).

        Raises:
            DataError: an image that cannot be decoded; the message has its path.
        """
        for part, phase in zip(self.rank_batches, self.schedule.phases, strict=True):
            first, last = max(first_step, phase.first_step), min(last_step, phase.last_step)
            if first < last:
                yield from self.train_loader.training(part, first, last)
