"""A run: everything that training works on, what is said of it when it begins, and what it leaves when it ends."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Generator
from pathlib import Path
from typing import Any

from torch import nn

from knltrain import checkpoint
from knltrain import config as configuration
from knltrain.comm.group import Group
from knltrain.config import RunConfig
from knltrain.config.schedule import Schedule
from knltrain.data.loader import Batch, Dataset, Loader, RankBatch
from knltrain.errors import ConfigError
from knltrain.launch.placement import RankPlacement
from knltrain.node.contention import CpuContention, CpuContentionMonitor
from knltrain.node.memory import peak_resident_mb
from knltrain.runlog.console import Console
from knltrain.runlog.metrics import draw_curves, read_metrics, write_json
from knltrain.training.ema import WeightAverage
from knltrain.training.engine import Engine
from knltrain.training.step_guard import Watch

# Steps of a run whose trust ratios are logged: enough for a curve, at 6 kB each for ResNet-50.
_TRUST_RATIOS = 1000


@dataclasses.dataclass
class Run:
    """Everything a training loop works on."""

    config: RunConfig
    out: Path
    group: Group
    shares: tuple[RankBatch, ...]  # of each phase of the schedule
    engine: Engine
    train_loader: Loader
    val_loader: Loader
    schedule: Schedule
    progress: checkpoint.Progress
    meta: dict[str, Any]
    place: RankPlacement
    neighbours: CpuContentionMonitor
    watch: Watch
    average: WeightAverage | None
    writer: checkpoint.CheckpointWriter | None = None  # of the first rank
    saved: list[Path] = dataclasses.field(default_factory=list)  # checkpoints that this process has written

    @property
    def last_step(self) -> int:
        """Where this process stops: the end of the run, or max_steps."""
        return min(self.schedule.total_steps, self.config.max_steps or self.schedule.total_steps)

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated."""
        return self.average.model if self.average else self.engine.model

    @property
    def is_finished(self) -> bool:
        """Whether the last step is done and evaluated."""
        return self.last_step <= self.progress.step == self.progress.evaluated_step

    def epoch(self, steps: int) -> float:
        """Passes over the training images after so many steps."""
        return self.schedule.epoch(steps)

    def share(self, step: int) -> RankBatch:
        """This rank's part of a step."""
        return self.shares[self.schedule.index(step)]

    def batches(self, first_step: int, last_step: int) -> Generator[Batch, None, None]:
        """Yields this rank's micro-batches of the steps [first_step, last_step).

        Raises:
            DataError: an image that cannot be decoded; the message has its path.
        """
        for share, phase in zip(self.shares, self.schedule.phases, strict=True):
            first, last = max(first_step, phase.first_step), min(last_step, phase.last_step)
            if first < last:
                yield from self.train_loader.training(share, first, last)

    def crossed(self, steps: int, every: float = 1.0) -> bool:
        """Whether the last of ``steps`` steps completed another ``every`` epochs."""
        return math.floor(self.epoch(steps) / every + 1e-9) > math.floor(self.epoch(steps - 1) / every + 1e-9)

    def evaluation_due(self, steps: int) -> bool:
        """Whether the run is evaluated after so many steps: at the end of every epoch, and of the run."""
        return steps > 0 and (self.crossed(steps) or steps == self.last_step)

    def trust_ratios_due(self, steps: int) -> bool:
        """Whether the last of ``steps`` steps has its trust ratios logged: the first, and up to a thousand of a run."""
        every = math.ceil(self.schedule.total_steps / _TRUST_RATIOS)
        return self.config.log_trust_ratios and (steps == 1 or steps % every == 0)

    def lr(self, step: int) -> float:
        """The learning rate of a step."""
        return self.progress.lr_factor * self.schedule.lr(self.config, step)


def rank_batch_of(config: RunConfig, rank: int, world_size: int, batch: int | None = None) -> RankBatch:
    """Divides a batch, by default the global batch, over ranks and micro-batches.

    Raises:
        ConfigError: it does not divide; the message names sizes that do.
    """
    name, batch = ("global-batch", config.global_batch) if batch is None else ("schedule.batches", batch)
    if batch % world_size:
        down = batch // world_size * world_size
        near = f"{down} or {down + world_size}" if down else str(world_size)
        raise ConfigError(f"{name} {batch} is not a multiple of {world_size} ranks; take {near}")
    of_rank = batch // world_size
    local = min(config.local_batch or of_rank, of_rank)
    if of_rank % local:
        divisor = next(size for size in range(local, 0, -1) if of_rank % size == 0)
        raise ConfigError(
            f"local-batch {local} does not divide the {of_rank} images a rank has in a step of {name} {batch}; take "
            f"{divisor}"
        )
    return RankBatch(batch, local, rank, world_size)


def rank_batches_of(config: RunConfig, schedule: Schedule, rank: int, world_size: int) -> tuple[RankBatch, ...]:
    """Divides the batch of each phase.

    Raises:
        ConfigError: as :func:`rank_batch_of`.
    """
    return tuple(
        dataclasses.replace(
            rank_batch_of(config, rank, world_size, None if phase.batch == config.global_batch else phase.batch),
            first_step=phase.first_step,
            first_image=phase.first_image,
            image_size=phase.image_size,
            augmented=phase.augmented,
        )
        for phase in schedule.phases
    )


def announce(
    console: Console, run: Run, plan: dict[str, Any], data: tuple[Dataset, Dataset], resume_from: Path | None
) -> None:
    """Says what is about to run, in a few lines."""
    config, (train_set, val_set) = run.config, data
    console.line(
        f"{config.model} on {config.data}: {len(train_set):,} + {len(val_set):,} images, "
        f"{len(train_set.classes)} classes"
    )
    console.line(
        f"{config.optim.name}/{config.optim.variant}, batch {config.global_batch:,} = {plan['world_size']} rank(s) x "
        f"{plan['accumulate']} x {plan['local_batch']}, peak lr {config.peak_lr:g}, {config.epochs:g} epochs = "
        f"{run.schedule.total_steps:,} steps"
    )
    for phase in run.schedule.phases if len(run.schedule.phases) > 1 else ():
        console.line(
            f"epochs {run.epoch(phase.first_step):.4g} to {run.epoch(phase.last_step):.4g}: batch {phase.batch:,}, "
            f"{phase.image_size} pixels" + ("" if phase.augmented else ", no augmentation")
        )
    console.line(
        f"{plan['precision']}, engine {plan['engine']}, {plan['threads']} threads and {plan['workers']} decoders a rank"
    )
    if plan["convolutions"]:
        console.line(f"convolutions: {len(plan['convolutions'])} by Winograd's algorithm, as config.json lists them")
    if run.group.backend:
        backend = run.group.backend
        console.line(
            f"gradients travel in {config.comm.dtype} over {backend.name} ({backend.version}, {backend.transport})"
        )
        if backend.note:
            console.line(backend.note)
        if resume_from and config.comm.compression == "powersgd":
            console.warn("what PowerSGD had left out of earlier steps is not in checkpoints: it begins anew")
    elif dataclasses.replace(config.comm, timeout_s=0.1) != configuration.CommConfig(timeout_s=0.1):
        console.warn("of comm.*, timeout-s alone has an effect on a single rank")
    if resume_from:
        console.line(f"resumed from {resume_from} (epoch {run.epoch(run.progress.step):.2f})")


def summary_of(run: Run, plan: dict[str, Any]) -> dict[str, Any]:
    """The summary of a finished run as it is on disk, or made up for if the run was killed before it was there."""
    try:
        summary: dict[str, Any] = json.loads((run.out / "summary.json").read_text("utf-8"))
        if summary["steps"] == run.progress.step and summary["finished"]:
            return summary
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return summarize(run, plan, run.progress.wall_s, 0, None, finished=True)


def summarize(
    run: Run, plan: dict[str, Any], wall_s: float, skipped: int, taken: CpuContention | None, *, finished: bool
) -> dict[str, Any]:
    """Writes OUT/summary.json and OUT/curves.png from the run's metrics, and returns the former.

    Args:
        run: what was trained.
        plan: how.
        wall_s: seconds of it, of earlier starts as well.
        skipped: images that could not be decoded.
        taken: of all ranks' CPUs, since the last start; None where that is not known.
        finished: whether nothing is left to train.
    """
    rows = read_metrics(run.out / "metrics.jsonl")
    steps = [row for row in rows if "step_s" in row]
    evaluations = [row for row in rows if "top1" in row]
    train_s = sum(row["step_s"] for row in steps)
    last: dict[str, Any] = evaluations[-1] if evaluations else {}
    summary = {
        "recipe": run.config.recipe,
        "model": run.config.model,
        "finished": finished,
        "top1": last.get("top1"),
        "top5": last.get("top5"),
        "best_top1": run.progress.best_top1,
        "epochs": run.epoch(run.progress.step),
        "steps": run.progress.step,
        "images_per_s": sum(run.share(row["step"] - 1).global_batch for row in steps) / train_s if steps else None,
        "data_fraction": sum(row["data_s"] for row in steps) / train_s if steps else None,
        "comm_fraction": sum(row["comm_s"] for row in steps) / train_s if steps else None,
        "exposed_comm_fraction": sum(row["exposed_comm_s"] for row in steps) / train_s if steps else None,
        "skipped_images": skipped,
        "skipped_steps": run.progress.skipped_steps,
        "rewinds": run.progress.rewinds,
        "peak_rss_mb": peak_resident_mb(),
        "other_cpus": taken and taken.other,
        "stolen_cpus": taken and taken.steal,
        "train_s": train_s,
        "wall_s": wall_s,
        "engine": plan["engine"],
        "precision": plan["precision"],
        "world_size": plan["world_size"],
        "global_batch": run.config.global_batch,
        "out": str(run.out),
    }
    write_json(run.out / "summary.json", summary)
    title = f"{run.config.recipe or run.config.model}, batch {run.config.global_batch:,}"
    draw_curves(rows, run.out / "curves.png", title)
    return summary
