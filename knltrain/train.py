"""The run: from a configuration to a folder that says everything about itself."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from knltrain import checkpoint, resume
from knltrain import config as configuration
from knltrain.comm.gradients import data_parallel, settle_buckets
from knltrain.comm.group import Group
from knltrain.comm.statistics import averaged_running_statistics, gather_running_statistics
from knltrain.config import RunConfig
from knltrain.console import Console, StepProgress
from knltrain.data.datasets import open_data
from knltrain.data.loader import Dataset, Loader, Share
from knltrain.data.order import random_bits
from knltrain.data.stage import stage_on_every_node
from knltrain.engine import Engine, build_engine, choose_engine, choose_precision
from knltrain.errors import ConfigError, KnltrainError
from knltrain.evaluate import evaluate
from knltrain.metrics import MetricsLog, draw_curves, read_metrics, write_json
from knltrain.models import model_of, refuse_unbuildable
from knltrain.node.binding import Place, drift, find_place, running_on
from knltrain.node.memory import keep_freed_memory, peak_resident_mb, resident_mb
from knltrain.ops.native import isa
from knltrain.optim import build_optimizer
from knltrain.provenance import provenance
from knltrain.schedule import learning_rate, total_steps
from knltrain.signals import StopRequest
from knltrain.weights import initialize

# Separates the random numbers of dropout from those of the data, which use 0 and 1.
_DROPOUT = 2


@dataclasses.dataclass
class Run:
    """Everything a training loop works on."""

    config: RunConfig
    out: Path
    group: Group
    share: Share
    engine: Engine
    train_loader: Loader
    val_loader: Loader
    num_images: int
    total_steps: int
    progress: checkpoint.Progress
    meta: dict[str, Any]
    place: Place
    writer: checkpoint.CheckpointWriter | None = None  # of the first rank

    @property
    def last_step(self) -> int:
        """Where this process stops: the end of the run, or max_steps."""
        return min(self.total_steps, self.config.max_steps or self.total_steps)

    @property
    def is_finished(self) -> bool:
        """Whether the last step is done and evaluated."""
        return self.last_step <= self.progress.step == self.progress.evaluated_step

    def epoch(self, steps: int) -> float:
        """Passes over the training images after so many steps."""
        return steps * self.config.global_batch / self.num_images

    def crossed(self, steps: int, every: float = 1.0) -> bool:
        """Whether the last of ``steps`` steps completed another ``every`` epochs."""
        return math.floor(self.epoch(steps) / every + 1e-9) > math.floor(self.epoch(steps - 1) / every + 1e-9)

    def evaluation_due(self, steps: int) -> bool:
        """Whether the run is evaluated after so many steps: at the end of every epoch, and of the run."""
        return steps > 0 and (self.crossed(steps) or steps == self.last_step)

    def lr(self, step: int) -> float:
        """The learning rate of a step."""
        return learning_rate(
            self.config.schedule,
            peak=self.config.peak_lr,
            step=step,
            total_steps=self.total_steps,
            steps_per_epoch=self.num_images / self.config.global_batch,
        )


def loop(run: Run, log: MetricsLog | None, bar: StepProgress, stop: StopRequest) -> bool:
    """Trains; returns whether the run is finished (and not stopped by a signal).

    ::

        for each step:
            set the learning rate
            for each micro-batch of this rank:
                wait for its images                        data_s
                loss = cross-entropy(model(images), labels)
                backward                                   gradients travel during the last one: comm_s,
                                                           of which it does not hide exposed_comm_s
            all ranks: mean loss; has anyone been asked to stop? is the loss a number?
            optimizer step
            after an epoch: evaluate, begin to write a checkpoint
            if asked to stop, also during the evaluation: write a checkpoint, and end
    """
    config, engine, group = run.config, run.engine, run.group
    model, clock = data_parallel(engine.model, config.comm, group, engine.optimizer.carried)
    first_step, last_step = run.progress.step, run.last_step
    started = time.perf_counter()
    shape = (run.share.local_batch, 3, config.image_size, config.image_size)
    settle_buckets(model, clock, torch.empty(shape, dtype=engine.dtype, device="meta"), engine.autocast())
    batches = run.train_loader.training(run.share, first_step, last_step)

    with contextlib.closing(batches):
        if group.sum(stop.requested) != [0]:
            return False  # while data were opened
        missed = run.progress.evaluated_step < first_step and run.evaluation_due(first_step)
        if missed and not evaluate_epoch(run, log, bar, stop):  # a signal had left no time for it
            return False
        if missed and first_step == last_step:
            save_checkpoint(run, log, time.perf_counter() - started, last=True)
        for step in range(first_step, last_step):
            step_start, data_s, loss_sum, lr = time.perf_counter(), 0.0, 0.0, run.lr(step)
            for param_group in engine.optimizer.param_groups:
                param_group["lr"] = lr
            engine.optimizer.zero_grad(set_to_none=True)
            for micro in range(run.share.accumulate):
                wait_start = time.perf_counter()
                images, labels = next(batches)
                data_s += time.perf_counter() - wait_start
                seed_dropout(config.seed, step, group.rank * run.share.accumulate + micro)
                with travelling(model, last=micro == run.share.accumulate - 1):
                    with engine.autocast():
                        logits = model(images)
                    loss = F.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
                    (loss / run.share.accumulate).backward()
                if micro < run.share.accumulate - 1:
                    engine.optimizer.carry()
                loss_sum += loss.item()
            loss_sum, stops = group.sum(loss_sum, stop.requested)
            mean_loss = loss_sum / run.share.accumulate / group.world_size
            if not math.isfinite(mean_loss):
                raise KnltrainError(
                    f"the loss is {mean_loss} at step {step + 1} (epoch {run.epoch(step + 1):.2f}, learning rate "
                    f"{lr:.4g}): lower optim.lr or lengthen schedule.warmup-epochs; checkpoints in {run.out} are good"
                )
            engine.optimizer.step()
            step_s = time.perf_counter() - step_start

            done, travel = step + 1, clock.take()
            group.last_step = done
            row = {"step": done, "epoch": run.epoch(done), "loss": mean_loss, "lr": lr,
                   "images_per_s": config.global_batch / step_s, "data_s": data_s, "step_s": step_s,
                   "comm_s": travel.on_wire, "exposed_comm_s": travel.exposed, "rss_mb": resident_mb()}  # fmt: skip
            if log:
                log.write(row)
            bar.step(row)
            run.progress = dataclasses.replace(run.progress, step=done)
            if run.evaluation_due(done) and not stops:
                stops = not evaluate_epoch(run, log, bar, stop)
            ending = done == last_step or stops > 0
            if run.crossed(done, config.checkpoint.every) or ending:
                save_checkpoint(run, log, time.perf_counter() - started, last=ending)
            if stops:
                return False
            if step == first_step:
                with running_on(run.place.plan.comm):
                    group.expect_steps(config.comm.timeout_s)
    return True


@contextlib.contextmanager
def travelling(model: nn.Module, *, last: bool) -> Iterator[None]:
    """Lets gradients travel in the backward pass of a step's last micro-batch only."""
    with model.no_sync() if isinstance(model, DistributedDataParallel) and not last else contextlib.nullcontext():
        yield


def seed_dropout(seed: int, step: int, micro_batch: int) -> None:
    """Makes what is dropped a function of the seed and of the micro-batch's place in the run."""
    # Not torch.manual_seed: in a CUDA build it queues a call for a device that will never be there, at every step.
    torch.default_generator.manual_seed(int(random_bits(seed, _DROPOUT, step, micro_batch)[0]))


def evaluate_epoch(run: Run, log: MetricsLog | None, bar: StepProgress, stop: StopRequest) -> bool:
    """Evaluates, and notes the best top-1; returns whether no signal came in between, which gives the evaluation up."""
    start = time.perf_counter()
    with averaged_running_statistics(run.engine.model, run.group):
        accuracy = evaluate(
            run.engine.model,
            run.engine.precision,
            run.val_loader,
            run.group,
            batch=min(run.share.local_batch, 256),
            stop=stop,
        )
    if accuracy is None:
        return False
    best = max(accuracy.top1, run.progress.best_top1 or 0.0)
    step = run.progress.step
    run.progress = dataclasses.replace(run.progress, evaluated_step=step, top1=accuracy.top1, best_top1=best)
    row = {"step": step, "epoch": run.epoch(step), "top1": accuracy.top1, "top5": accuracy.top5,
           "val_loss": accuracy.loss, "eval_s": time.perf_counter() - start}  # fmt: skip
    if log:
        log.write(row)
    bar.evaluation(row)
    for problem in (drift(run.place), run.train_loader.moved(), run.val_loader.moved()):
        if problem:
            warnings.warn(f"{problem}: a library has changed it", stacklevel=1)
    return True


def save_checkpoint(run: Run, log: MetricsLog | None, elapsed_s: float, *, last: bool) -> None:
    """Begins to write a checkpoint from rank 0, in the background; the last one is on disk when this returns.

    Raises:
        KnltrainError: the last one could not be written; on all ranks alike.
    """
    model, group = run.engine.model, run.group
    statistics = gather_running_statistics(model, group)
    with averaged_running_statistics(model, group):
        if run.writer and log:
            log.sync()
            run.writer.begin(
                dataclasses.replace(run.progress, wall_s=run.progress.wall_s + elapsed_s),
                run.engine.state_dict(),
                run.engine.optimizer,
                meta=run.meta,
                statistics=statistics,
                last=last,
            )
    if last:
        failure = run.writer.finish() if run.writer else None
        (failures,) = group.sum(failure is not None)
        if failures:
            raise failure or KnltrainError("the last checkpoint could not be written; rank 0 says why")


def train(
    config: RunConfig, console: Console, place: Place | None = None, *, allow_change: frozenset[str] = frozenset()
) -> tuple[dict[str, Any], bool]:
    """Trains as configured, alone or as one of several ranks.

    Args:
        config: what to train.
        console: where to speak.
        place: where this rank runs, as it was taken before torch was loaded; by default nothing is moved.
        allow_change: fields that may differ from the run that OUT holds, or from the checkpoint that is named.

    Returns:
        The summary (also OUT/summary.json), and whether the run is finished; if not, a signal stopped it after a
        checkpoint and the same call goes on from there.

    Raises:
        ConfigError: the configuration is not possible on this machine, or OUT holds another run.
        KnltrainError: data, a checkpoint or the other ranks failed.
    """
    malloc = keep_freed_memory()
    place = place or find_place(strict=False)
    ranks, node, threads = place.ranks, place.node, place.plan.threads
    torch.set_num_threads(threads)
    precision = choose_precision(config.precision, node, force=config.force_bf16)
    engine_name = choose_engine(config.engine, model=config.model, precision=precision, node=node, threads=threads)
    share = share_of(config, ranks.rank, ranks.size)
    out = Path(config.out or f"runs/{config.recipe or config.model}")
    with contextlib.ExitStack() as cleanup:
        stop = cleanup.enter_context(StopRequest())
        with running_on(place.plan.comm):  # where the threads that it makes then stay
            group = cleanup.enter_context(Group(ranks, config.comm.backend, place.plan.comm))
        cleanup.enter_context(group.names_lost_ranks())
        if group.is_first:
            resume.guard_out(config, out, allow_change)
            refuse_unbuildable(config)  # before the data is read
        staged = config
        if config.stage:
            here = stage_on_every_node(
                Path(config.data),
                Path(config.stage),
                group.sum,
                console.line,
                local_rank=ranks.local_rank,
                stop_requested=lambda: stop.requested,
            )
            if here is None:
                return {}, False
            staged = dataclasses.replace(config, data=str(here))
        if not group.is_first:
            group.barrier()  # rank 0 goes first: it draws `shapes`, and finds what is wrong with the data, once
        train_set, val_set = open_data(staged)
        if group.is_first:
            group.barrier()
        steps = total_steps(epochs=config.epochs, num_images=len(train_set), global_batch=config.global_batch)
        if group.is_first:
            cleanup.enter_context(resume.lock_out(out, console))
        start = resume.choose(config, out, group, console, allow_change)
        torch.manual_seed(config.seed)
        model = model_of(config, len(train_set.classes))
        origin = initialize(model, config, out, group, console, resumed=start.folder is not None)
        optimizer = build_optimizer(model, config.optim)
        made = {"world_size": ranks.size, "threads": threads, "isa": node.isa, "kernels": isa(), "engine": engine_name,
                "precision": precision, "backend": group.backend.name if group.backend else "none",
                "torch": torch.__version__}  # fmt: skip
        progress = start.restore(model, optimizer, group, console, made=made, images=len(train_set))
        engine = build_engine(engine_name, precision, model, optimizer)
        workers = threads if config.workers is None else config.workers
        train_loader, val_loader = (
            cleanup.enter_context(
                contextlib.closing(Loader(part, config, dtype=engine.dtype, workers=workers, cpus=place.plan.decode))
            )
            for part in (train_set, val_set)
        )
        meta = {"model": config.model, "image_size": config.image_size, "resize": config.resize,
                "dropout": config.dropout, "classes": list(train_set.classes), "images": len(train_set), "made": made,
                "config": configuration.as_dict(config), "config_sha256": resume.digest(config)}  # fmt: skip
        run = Run(
            config, out, group, share, engine, train_loader, val_loader, len(train_set), steps, progress, meta, place
        )

        plan = {"launcher": ranks.launcher, "world_size": ranks.size, "ranks_per_node": ranks.local_size,
                "threads": threads, "workers": workers, "backend": "none", "local_batch": share.local_batch,
                "accumulate": share.accumulate, "steps": steps, "precision": precision, "engine": engine.name,
                "kernels": isa(), "malloc": malloc, "affinity": place.as_dict()}  # fmt: skip
        if group.backend:
            plan |= {"backend": group.backend.name, "backend_version": group.backend.version,
                     "transport": group.backend.transport, "interface": group.interface,
                     "oneccl": group.backend.settings}  # fmt: skip
        announce(console, run, plan, (train_set, val_set), start.folder)
        if run.is_finished:
            console.line(f"nothing left to train: {out} holds this run, finished")
            return (summary_of(run, plan) if group.is_first else {}), True
        log = None
        if group.is_first:
            record = {"config": configuration.as_dict(config), "plan": plan, "init_from": origin, **provenance(node),
                      "changes": start.changes, "data": {"train": len(train_set), "val": len(val_set),
                                                         "classes": len(train_set.classes)}}  # fmt: skip
            write_json(out / "config.json", record)
            log = cleanup.enter_context(MetricsLog(out, progress.step, progress.evaluated_step, console.warn))
            run.writer = cleanup.enter_context(
                checkpoint.CheckpointWriter(
                    out,
                    keep=config.checkpoint.keep,
                    cpus=place.plan.decode,
                    warn=console.warn,
                    timeout_s=config.comm.timeout_s,
                )
            )
        started = time.perf_counter()
        with StepProgress(console, first=progress.step, total=steps, epochs=config.epochs) as bar:
            finished = loop(run, log, bar, stop)
        wall_s = progress.wall_s + time.perf_counter() - started
        (skipped,) = group.sum(train_loader.skipped + val_loader.skipped)
        if skipped:
            console.warn(f"{skipped:,.0f} images could not be decoded; the next good ones took their places")
        summary = summarize(run, plan, wall_s, int(skipped), finished=finished) if group.is_first else {}
        group.barrier()  # a rank that ends with a code that is not 0, as when stopped, has its launcher end the others
    return summary, finished


def share_of(config: RunConfig, rank: int, world_size: int) -> Share:
    """Divides the global batch over ranks and micro-batches.

    Raises:
        ConfigError: it does not divide; the message names sizes that do.
    """
    if config.global_batch % world_size:
        down = config.global_batch // world_size * world_size
        near = f"{down} or {down + world_size}" if down else str(world_size)
        raise ConfigError(f"global-batch {config.global_batch} is not a multiple of {world_size} ranks; take {near}")
    of_rank = config.global_batch // world_size
    local = min(config.local_batch or of_rank, of_rank)
    if of_rank % local:
        divisor = next(size for size in range(local, 0, -1) if of_rank % size == 0)
        raise ConfigError(
            f"local-batch {local} does not divide the {of_rank} images a rank has in a step; take {divisor}"
        )
    return Share(config.global_batch, local, rank, world_size)


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
        f"{run.total_steps:,} steps"
    )
    console.line(
        f"{plan['precision']}, engine {plan['engine']}, {plan['threads']} threads and {plan['workers']} decoders a rank"
    )
    if run.group.backend:
        backend = run.group.backend
        console.line(
            f"gradients travel in {config.comm.dtype} over {backend.name} ({backend.version}, {backend.transport})"
        )
        if backend.note:
            console.line(backend.note)
        if resume_from and config.comm.compression == "powersgd":
            console.warn("what PowerSGD had left out of earlier steps is not in checkpoints: it begins anew")
    elif config.comm != configuration.CommConfig():
        console.warn("comm.* has no effect on a single rank")
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
    return summarize(run, plan, run.progress.wall_s, 0, finished=True)


def summarize(run: Run, plan: dict[str, Any], wall_s: float, skipped: int, *, finished: bool) -> dict[str, Any]:
    """Writes OUT/summary.json and OUT/curves.png from the run's metrics, and returns the former."""
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
        "images_per_s": len(steps) * run.config.global_batch / train_s if steps else None,
        "data_fraction": sum(row["data_s"] for row in steps) / train_s if steps else None,
        "comm_fraction": sum(row["comm_s"] for row in steps) / train_s if steps else None,
        "exposed_comm_fraction": sum(row["exposed_comm_s"] for row in steps) / train_s if steps else None,
        "skipped_images": skipped,
        "peak_rss_mb": peak_resident_mb(),
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
