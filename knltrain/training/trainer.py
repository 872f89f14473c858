"""The run: from a configuration to a folder that says everything about itself."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from knltrain import checkpoint
from knltrain import config as configuration
from knltrain.comm.gradients import data_parallel, prime_ddp_buckets
from knltrain.comm.group import Group
from knltrain.comm.statistics import averaged_running_statistics, gather_running_statistics
from knltrain.config import RunConfig
from knltrain.config.schedule import make_schedule
from knltrain.data.datasets import open_data
from knltrain.data.loader import Dataset, Loader, replaced
from knltrain.data.order import random_bits
from knltrain.data.stage import stage_on_every_node
from knltrain.errors import ConfigError, KnltrainError, SharedError
from knltrain.launch.placement import RankPlacement, drift, find_placement
from knltrain.launch.world import Ranks
from knltrain.models import model_of, refuse_unbuildable
from knltrain.models.convolutions import choose as choose_convolutions
from knltrain.node.binding import running_on
from knltrain.node.contention import CpuContention, CpuContentionMonitor
from knltrain.node.memory import keep_freed_memory, resident_mb
from knltrain.ops.native import isa
from knltrain.optim import build_optimizer
from knltrain.runlog.console import Console, StepProgress
from knltrain.runlog.metrics import MetricsLog, write_json
from knltrain.runlog.provenance import provenance
from knltrain.training import resume
from knltrain.training.ema import WeightAverage
from knltrain.training.engine import Engine, build_engine, choose_engine, choose_precision, set_fp32_precision
from knltrain.training.evaluate import evaluate
from knltrain.training.gradient_noise import NoiseScale
from knltrain.training.signals import StopRequest
from knltrain.training.state import Run, announce, rank_batch_of, rank_batches_of, summarize, summary_of
from knltrain.training.step_guard import RewindError, Watch
from knltrain.weights.load import initialize

# What is trained, and where its weights came from.
_Built: TypeAlias = tuple[Engine, checkpoint.Progress, Watch, WeightAverage | None, dict[str, Any] | None]
# Separates the random numbers of dropout from those of the data, which use 0 and 1.
_DROPOUT = 2


def loop(run: Run, log: MetricsLog | None, bar: StepProgress, stop: StopRequest) -> bool:  # noqa: C901, PLR0915
    """Trains; returns whether the run is finished (and not stopped by a signal).

    ::

        for each step:
            set the learning rate
            for each micro-batch of this rank:
                wait for its images                        data_s
                loss = cross-entropy(model(images), labels)
                backward                                   gradients travel during the last one: comm_s,
                                                           of which it does not hide exposed_comm_s
            all ranks: mean loss, norm of the gradient; has anyone been asked to stop?
            optimizer step, if loss and gradient are numbers; else as health.policy says
            the weights' moving average, where there is one
            every so often: have all ranks the same weights?
            after an epoch: evaluate, begin to write a checkpoint
            if asked to stop, also during the evaluation: write a checkpoint, and end
    """
    config, engine, group, watch = run.config, run.engine, run.group, run.watch
    noise = NoiseScale(config, group)
    model, clock = data_parallel(engine.model, config.comm, group, engine.optimizer.accumulated, noise.add)
    first_step, last_step = run.progress.step, run.last_step
    started = time.perf_counter()
    begin = run.share(first_step)
    size = begin.image_size or config.image_size
    shape = (begin.local_batch, 3, size, size)
    prime_ddp_buckets(model, clock, torch.empty(shape, dtype=engine.dtype, device="meta"), engine.autocast())
    batches = run.batches(first_step, last_step)

    with contextlib.closing(batches):
        if group.sum(stop.requested) != [0] or not make_up_evaluation(run, log, bar, stop):
            return False
        for step in range(first_step, last_step):
            step_start, data_s, lr, share = time.perf_counter(), 0.0, run.lr(step), run.share(step)
            losses: list[float] = []
            for param_group in engine.optimizer.param_groups:
                param_group["lr"] = lr
            engine.optimizer.zero_grad(set_to_none=True)
            watch.begin_step()
            noise.begin_step(share)
            for micro in range(share.accumulate):
                wait_start = time.perf_counter()
                images, labels = next(batches)
                data_s += time.perf_counter() - wait_start
                seed_dropout(config.seed, step, group.rank * share.accumulate + micro)
                with travelling(model, last=micro == share.accumulate - 1):
                    with engine.autocast():
                        logits = model(images)
                    loss = F.cross_entropy(logits.float(), labels, label_smoothing=config.label_smoothing)
                    (loss / share.accumulate).backward()
                if micro < share.accumulate - 1:
                    noise.end_micro_batch(micro, engine)
                    engine.optimizer.accumulate_fp32()
                losses.append(loss.item())
            loss_sum, norm_sum, squares, stops = group.sum(
                sum(losses), watch.gradient_norm(), noise.squares, stop.requested
            )
            mean_loss, norm = loss_sum / len(losses) / group.world_size, norm_sum / group.world_size
            run.progress = watch.judge(run.progress, lr, losses, mean_loss, norm)
            if not run.progress.skipped_in_a_row:
                run.progress = noise.update(run.progress, squares, norm)
                if log and run.trust_ratios_due(step + 1) and (ratios := engine.optimizer.trust_ratios(watch.norms)):
                    log.write_trust_ratios(step + 1, run.epoch(step + 1), ratios)
                engine.optimizer.step()
                if run.average:
                    run.average.update(engine.state_dict(), step + 1)
            step_s = time.perf_counter() - step_start

            done, travel = step + 1, clock.pop_step()
            group.last_step = done
            row = {"step": done, "epoch": run.epoch(done), "loss": mean_loss, "lr": lr, "grad_norm": norm,
                   "images_per_s": share.global_batch / step_s, "data_s": data_s, "step_s": step_s,
                   "comm_s": travel.on_wire, "exposed_comm_s": travel.exposed, "rss_mb": resident_mb(),
                   **noise.row(run.progress)}  # fmt: skip
            if log:
                log.write(row)
            bar.step(row)
            if problem := run.neighbours.problem():
                warnings.warn(problem, stacklevel=1)
            run.progress = dataclasses.replace(run.progress, step=done)
            may_save = run.crossed(done, config.checkpoint.every) or run.evaluation_due(done) or stops > 0
            watch.compare_weights(done, before_checkpoint=may_save)
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
    with averaged_running_statistics(run.evaluated, run.group):
        accuracy = evaluate(
            run.evaluated,
            run.engine.precision,
            run.val_loader,
            run.group,
            batch=min(run.shares[-1].local_batch, 256),
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


def make_up_evaluation(run: Run, log: MetricsLog | None, bar: StepProgress, stop: StopRequest) -> bool:
    """Evaluates where a signal had left no time for it; returns whether none has come in between again.

    The checkpoint is written anew with what was found, since the best one stays when others are removed.
    """
    step = run.progress.step
    if step == run.progress.evaluated_step or not run.evaluation_due(step):
        return True
    if not evaluate_epoch(run, log, bar, stop):
        return False
    save_checkpoint(run, log, 0.0, last=step == run.last_step)
    return True


def save_checkpoint(run: Run, log: MetricsLog | None, elapsed_s: float, *, last: bool) -> None:
    """Begins to write a checkpoint from rank 0, in the background; the last one is on disk when this returns.

    Raises:
        KnltrainError: the last one could not be written; on all ranks alike.
    """
    model, group = run.engine.model, run.group
    run.saved.append(checkpoint.folder_of(run.out, run.progress.step))
    average = run.average.model if run.average else None
    statistics = gather_running_statistics(model, group)
    average_statistics = gather_running_statistics(average, group) if average else None
    with contextlib.ExitStack() as borrowed:
        for network in (model, average):
            if network:
                borrowed.enter_context(averaged_running_statistics(network, group))
        if run.writer and log:
            log.sync()
            run.writer.begin(
                dataclasses.replace(run.progress, wall_s=run.progress.wall_s + elapsed_s),
                run.engine.state_dict(),
                run.engine.optimizer,
                meta=run.meta,
                statistics=statistics,
                average=average.state_dict() if average else None,
                average_statistics=average_statistics,
                last=last,
            )
    if last:
        failure = run.writer.finish() if run.writer else None
        (failures,) = group.sum(failure is not None)
        if failures:
            raise failure or KnltrainError("the last checkpoint could not be written; rank 0 says why")


def train(  # noqa: C901, PLR0915
    config: RunConfig,
    console: Console,
    place: RankPlacement | None = None,
    *,
    allow_change: frozenset[str] = frozenset(),
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
    place = place or find_placement(strict=False)
    ranks, node, threads = place.ranks, place.node, place.plan.threads
    torch.set_num_threads(threads)
    precision = choose_precision(config.precision, node, force=config.force_bf16, warn=console.warn)
    engine_name = choose_engine(config.engine, model=config.model, precision=precision, node=node, threads=threads)
    set_fp32_precision(config.fp32_precision, precision=precision, engine=engine_name, node=node)
    for batch in (None, *config.schedule.batches):
        rank_batch_of(config, ranks.rank, ranks.size, batch)
    out = Path(config.out or f"runs/{config.recipe or config.model}")
    with contextlib.ExitStack() as cleanup:
        stop = cleanup.enter_context(StopRequest())
        with running_on(place.plan.comm):  # where the threads that it makes then stay
            group = cleanup.enter_context(Group(ranks, config.comm.backend, place.plan.comm))
        cleanup.enter_context(group.names_lost_ranks())
        # Of auto, each node makes what is best there.
        group.require_same_on_all_ranks("precision", precision, "give one that all can have: --precision fp32")
        group.require_same_on_all_ranks("engine", engine_name, "give one that all can have: --engine NAME")
        if group.is_first:
            resume.guard_out(config, out, allow_change)
            refuse_unbuildable(config)  # before the data is read
        data = open_together(config, ranks, group, console, stop)
        if data is None:
            end_together(group, stop)
            return {}, False
        train_set, val_set = data
        course = make_schedule(config, len(train_set))
        shares = rank_batches_of(config, course, ranks.rank, ranks.size)
        labels_sha256 = hashlib.sha256(train_set.labels.tobytes()).hexdigest()
        if group.is_first:
            cleanup.enter_context(resume.lock_run_dir(out, console))
        start = resume.choose(config, out, group, console, allow_change)
        made = {"world_size": ranks.size, "threads": threads, "isa": node.isa, "kernels": isa(), "engine": engine_name,
                "precision": precision, "backend": group.backend.name if group.backend else "none",
                "torch": torch.__version__}  # fmt: skip
        chosen = choose_convolutions(
            config, num_classes=len(train_set.classes), engine=engine_name, precision=precision, node=node,
            threads=threads, images=shares[-1].local_batch, keep=ranks.local_rank == 0, recorded=start.convolutions,
        )  # fmt: skip
        convolutions = json.loads(group.broadcast_str(json.dumps(chosen)))
        if convolutions:
            made["convolutions"] = convolutions

        def build(start: resume.Start) -> _Built:
            torch.manual_seed(config.seed)
            model = model_of(config, len(train_set.classes))
            origin = initialize(model, config, out, group, console, resumed=start.folder is not None)
            optimizer = build_optimizer(model, config.optim)
            progress = start.restore(model, optimizer, group, console, made=made, course=course,
                                     labels_sha256=labels_sha256)  # fmt: skip
            average = None
            if config.ema_decay:
                average = WeightAverage(model, config.ema_decay)
                start.restore_average(average.model, group)
            engine = build_engine(engine_name, precision, model, optimizer, convolutions)
            watch = Watch(config, out, group, engine, course, shares, train_set, console.warn)
            return engine, progress, watch, average, origin

        engine, progress, watch, average, origin = build(start)
        workers = threads if config.workers is None else config.workers
        train_loader, val_loader = (
            cleanup.enter_context(
                contextlib.closing(Loader(part, config, dtype=engine.dtype, workers=workers, cpus=place.plan.decode))
            )
            for part in (train_set, val_set)
        )
        meta = {"model": config.model, "image_size": config.image_size, "resize": config.resize,
                "dropout": config.dropout, "classes": list(train_set.classes), "images": len(train_set),
                "labels_sha256": labels_sha256, "made": made,
                "config": configuration.as_dict(config), "config_sha256": resume.digest(config)}  # fmt: skip
        neighbours = CpuContentionMonitor(place.plan.cpus, spare=place.plan.num_spare_cpus)
        run = Run(
            config, out, group, shares, engine, train_loader, val_loader, course, progress, meta, place, neighbours,
            watch, average,
        )  # fmt: skip

        plan = {"launcher": ranks.launcher, "world_size": ranks.size, "ranks_per_node": ranks.local_size,
                "threads": threads, "workers": workers, "backend": "none", "local_batch": shares[-1].local_batch,
                "accumulate": shares[-1].accumulate, "steps": course.total_steps, "precision": precision,
                "engine": engine.name, "kernels": isa(), "convolutions": convolutions,
                "malloc": malloc, "affinity": place.as_dict()}  # fmt: skip
        if group.backend:
            plan |= {"backend": group.backend.name, "backend_version": group.backend.version,
                     "transport": group.backend.transport, "interface": group.interface,
                     "bucket_mb": config.comm.bucket_mb_of(ranks.size),
                     "oneccl": group.backend.settings}  # fmt: skip
        announce(console, run, plan, (train_set, val_set), start.folder)
        if run.is_finished:
            if group.is_first and not (out / "metrics.jsonl").exists():
                raise ConfigError(
                    f"{start.folder} is at the end of this run, and leaves {out} nothing to train; a larger "
                    "--max-steps goes further, or --epochs with --allow-change epochs"
                )
            console.line(f"nothing left to train: {out} holds this run, finished")
            return (summary_of(run, plan) if group.is_first else {}), True
        if group.is_first:
            record = {"config": configuration.as_dict(config), "plan": plan, "init_from": origin, **provenance(node),
                      "changes": start.changes, "data": {"train": len(train_set), "val": len(val_set),
                                                         "classes": len(train_set.classes)}}  # fmt: skip
            write_json(out / "config.json", record)
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
        finished = loop_and_rewind(run, start, build, console, stop)
        wall_s = progress.wall_s + time.perf_counter() - started
        taken = group.sum(*run.neighbours.taken())
        skipped = train_loader.skipped(group.sum) + val_loader.skipped(group.sum)
        if skipped:
            console.warn(replaced(skipped))
        summary = (
            summarize(run, plan, wall_s, skipped, CpuContention(*taken), finished=finished) if group.is_first else {}
        )
        if finished:
            group.barrier()
        else:
            end_together(group, stop)
    return summary, finished


def open_together(
    config: RunConfig, ranks: Ranks, group: Group, console: Console, stop: StopRequest
) -> tuple[Dataset, Dataset] | None:
    """The training and the validation set on every rank, from the node's own copy if asked for.

    Returns:
        None if a signal came while the data was copied.

    Raises:
        KnltrainError: the data cannot be read, or copied.
    """
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
            return None
        config = dataclasses.replace(config, data=str(here))
    if not group.is_first:
        group.barrier()  # rank 0 goes first: it draws `shapes`, and finds what is wrong with the data, once
    data = open_data(config)
    if group.is_first:
        group.barrier()
    return data


def loop_and_rewind(
    run: Run, start: resume.Start, build: Callable[[resume.Start], _Built], console: Console, stop: StopRequest
) -> bool:
    """Trains, and goes back to the last checkpoint where the watch says so; returns what :func:`loop` does.

    Args:
        run: brought up to date when it goes back.
        start: what it began with.
        build: makes what is trained, as it is in a checkpoint.
        console: where to speak.
        stop: where a signal is noted.
    """
    while True:
        at = run.progress
        try:
            with contextlib.ExitStack() as shown:
                log = None
                if run.group.is_first:
                    log = shown.enter_context(MetricsLog(run.out, at.step, at.evaluated_step, console.warn))
                total = run.schedule.total_steps
                bar = StepProgress(console, first=at.step, total=total, epochs=run.config.epochs)
                return loop(run, log, shown.enter_context(bar), stop)
        except SharedError:
            # A launcher ends the others with the first that ends: a checkpoint under way is to be whole by then.
            if run.writer:
                run.writer.finish()
            with contextlib.suppress(RuntimeError):  # that it took too long is no news beside the error
                run.group.barrier()
            raise
        except RewindError as error:
            console.warn(str(error))
        before = run.progress
        if run.writer:
            run.writer.finish()
        start = start.latest_valid(run.saved, run.group)
        run.engine, run.progress, run.watch, run.average, _ = build(start)
        lr_factor = before.lr_factor * run.config.health.rewind_factor
        run.progress = dataclasses.replace(run.progress, rewinds=before.rewinds + 1, lr_factor=lr_factor)
        console.line(f"back at step {run.progress.step:,}, with {lr_factor:g} times the learning rate")


def end_together(group: Group, stop: StopRequest) -> None:
    """Waits until no rank minds a signal: one that ends with a code that is not 0 has its launcher end the others."""
    if group.world_size > 1:
        stop.ignore_late()
        group.barrier()
