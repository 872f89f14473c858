"""From a configuration to a run: what this process computes with, its ranks, its folder, its data, its state."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from knltrain import checkpoint
from knltrain import config as configuration
from knltrain.comm.group import Group
from knltrain.config import RunConfig
from knltrain.config.schedule import Schedule, make_schedule
from knltrain.data.datasets import open_data, remarks_of
from knltrain.data.loader import Dataset, Loader, RankBatch
from knltrain.data.stage import stage_on_every_node
from knltrain.launch.placement import RankPlacement
from knltrain.models import model_of, refuse_unbuildable
from knltrain.models.convolutions import choose as choose_convolutions
from knltrain.node.binding import running_on
from knltrain.node.contention import CpuContentionMonitor
from knltrain.node.memory import keep_freed_memory
from knltrain.ops.native import isa
from knltrain.optim import build_optimizer
from knltrain.runlog.console import Console
from knltrain.training.batching import rank_batches_by_size, rank_batches_of, refuse_untrainable_batches
from knltrain.training.divergence import DivergenceCheck
from knltrain.training.due import DueRules
from knltrain.training.ema import WeightAverage
from knltrain.training.engine import DTYPES, build_engine, choose_engine, choose_precision, set_fp32_precision
from knltrain.training.failure_dump import FailureDump
from knltrain.training.gradient_noise import NoiseScale
from knltrain.training.ranks import require_same_data, same_fields
from knltrain.training.replica_check import ReplicaCheck
from knltrain.training.resume import ResumePoint, choose
from knltrain.training.run_dir import digest, lock_run_dir
from knltrain.training.same_data import describe as describe_data
from knltrain.training.signals import InterruptError, StopRequest
from knltrain.training.state import Evaluations, Run, TrainState
from knltrain.training.step_guard import StepGuard
from knltrain.weights.load import initialize


class Compute(NamedTuple):
    """How this process computes.

    Attributes:
        precision: bf16 or fp32.
        engine: fused, eager, compile or ipex.
        threads: compute threads.
        malloc: which allocator keeps freed memory.
    """

    precision: str
    engine: str
    threads: int
    malloc: dict[str, Any]


def set_up(
    config: RunConfig, console: Console, placement: RankPlacement, stop: StopRequest, cleanup: contextlib.ExitStack, *,
    allow_change: frozenset[str],
) -> Run:  # fmt: skip
    """Makes everything that a run needs, and its state as it was in the checkpoint that it goes on from.

    What is cheap to refuse is refused first: the configuration, then the ranks, then the folder, then the data.

    Args:
        config: what to train.
        console: where to speak.
        placement: where this rank runs.
        stop: whether a signal has come.
        cleanup: closes what is opened here.
        allow_change: fields that may differ from those of the run in OUT, or of the checkpoint that is named.

    Raises:
        ConfigError: the configuration is not possible on this machine, or OUT holds another run.
        InterruptError: a signal came while the data was copied.
        KnltrainError: data, a checkpoint or the other ranks failed.
    """
    ranks = placement.ranks
    compute = choose_compute(config, placement, console)
    by_size = rank_batches_by_size(config, ranks.rank, ranks.size)
    group = join_group(config, compute, placement, stop, cleanup)
    out = Path(config.out or f"runs/{config.recipe or config.model}")
    if group.is_first:
        refuse_unbuildable(config)
        refuse_untrainable_batches(config, by_size)
        cleanup.enter_context(lock_run_dir(out, console))
    start = choose(config, out, group, console, allow_change)
    train_set, val_set = open_datasets(config, placement, group, console, stop)
    data = describe_data(train_set, val_set)
    start.check_data(train_set.classes, data, group, console)
    schedule = make_schedule(config, len(train_set))
    rank_batches = rank_batches_of(by_size, schedule)
    runtime_env = choose_runtime(config, compute, placement, group, train_set, rank_batches[-1], start)
    workers = compute.threads if config.workers is None else config.workers
    loaders = [
        cleanup.enter_context(
            contextlib.closing(
                Loader(part, config, dtype=DTYPES[compute.precision], workers=workers, cpus=placement.plan.decode)
            )
        )
        for part in (train_set, val_set)
    ]
    run = Run(
        config=config,
        out=out,
        group=group,
        console=console,
        placement=placement,
        stop=stop,
        train_set=train_set,
        schedule=schedule,
        due=DueRules(config, schedule),
        rank_batches=rank_batches,
        train_loader=loaders[0],
        val_loader=loaders[1],
        contention=CpuContentionMonitor(placement.plan.cpus, spare=placement.plan.num_spare_cpus),
        start=start,
        plan=describe_plan(config, compute, placement, group, schedule, rank_batches[-1], workers, runtime_env),
        runtime_env=runtime_env,
        meta=describe_checkpoint(config, train_set, data, runtime_env, start),
    )
    run.state = build_state(run, start)
    return run


def choose_compute(config: RunConfig, placement: RankPlacement, console: Console) -> Compute:
    """Chooses precision and engine, and has PyTorch compute so in this process.

    Raises:
        ConfigError: what was asked for is not possible here.
    """
    malloc, node, threads = keep_freed_memory(), placement.node, placement.plan.threads
    torch.set_num_threads(threads)
    precision = choose_precision(config.precision, node, force=config.force_bf16, warn=console.warn)
    engine = choose_engine(config.engine, model=config.model, precision=precision, node=node, threads=threads)
    set_fp32_precision(config.fp32_precision, precision=precision, engine=engine, node=node)
    return Compute(precision, engine, threads, malloc)


def join_group(
    config: RunConfig, compute: Compute, placement: RankPlacement, stop: StopRequest, cleanup: contextlib.ExitStack
) -> Group:
    """Joins the process group, and sees that all ranks were started alike.

    Raises:
        ConfigError: ranks have other fields, or computed otherwise.
        KnltrainError: rendezvous failed.
    """
    # With auto, each node chooses what is best there.
    same = {**same_fields(config), "precision": compute.precision, "engine": compute.engine}
    with running_on(placement.plan.comm), stop.at_once():  # where the threads that it makes then stay
        group = cleanup.enter_context(
            Group(
                placement.ranks, config.comm.backend, placement.plan.comm,
                same=same, start_timeout_s=config.comm.start_timeout_s,
            )
        )  # fmt: skip
    cleanup.enter_context(group.report_lost_ranks())
    return group


def open_datasets(
    config: RunConfig, placement: RankPlacement, group: Group, console: Console, stop: StopRequest
) -> tuple[Dataset, Dataset]:
    """Opens the training and the validation set on every rank, from the node's own copy if asked for.

    Raises:
        ConfigError: ranks have different data.
        InterruptError: a signal came while the data was copied.
        KnltrainError: the data cannot be read, or copied.
    """
    if config.stage:
        here = stage_on_every_node(
            Path(config.data),
            Path(config.stage),
            group.sum,
            console.line,
            local_rank=placement.ranks.local_rank,
            stop_requested=lambda: stop.requested,
        )
        if here is None:
            barrier_before_exit(group, stop)
            raise InterruptError
        config = dataclasses.replace(config, data=str(here))
    if not group.is_first:
        group.barrier()  # rank 0 goes first: it draws `shapes`, and finds what is wrong with the data, once
    train, val = open_data(config)
    if group.is_first:
        group.barrier()
    require_same_data({"train": train, "val": val}, config.data, group)
    for remark in remarks_of(train, val):
        console.warn(remark)
    return train, val


def choose_runtime(
    config: RunConfig, compute: Compute, placement: RankPlacement, group: Group, train_set: Dataset, part: RankBatch,
    start: ResumePoint,
) -> dict[str, Any]:  # fmt: skip
    """Chooses which convolutions are native, and says what of ranks, machine and versions decides a run's bits.

    Args:
        config: what is trained.
        compute: how this process computes.
        placement: where it runs.
        group: the ranks; the first one's choice of convolutions is that of all.
        train_set: the training images.
        part: this rank's part of a batch, which convolutions are measured with.
        start: has the choice that the run began with.
    """
    chosen = choose_convolutions(
        config,
        num_classes=len(train_set.classes),
        engine=compute.engine,
        precision=compute.precision,
        node=placement.node,
        threads=compute.threads,
        images=part.local_batch,
        keep=placement.ranks.local_rank == 0,
        recorded=start.convolutions,
    )
    convolutions = json.loads(group.broadcast_str(json.dumps(chosen)))
    return {
        "world_size": placement.ranks.size,
        "threads": compute.threads,
        "isa": placement.node.isa,
        "kernels": isa(),
        "engine": compute.engine,
        "precision": compute.precision,
        "backend": group.backend.name if group.backend else "none",
        "torch": torch.__version__,
        **({"convolutions": convolutions} if convolutions else {}),
    }


def describe_plan(
    config: RunConfig, compute: Compute, placement: RankPlacement, group: Group, schedule: Schedule, part: RankBatch,
    workers: int, runtime_env: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """How the run computes, as JSON types: config.json has it under ``plan``."""
    ranks = placement.ranks
    plan = {
        "launcher": ranks.launcher,
        "world_size": ranks.size,
        "ranks_per_node": ranks.local_size,
        "threads": compute.threads,
        "workers": workers,
        "backend": "none",
        "local_batch": part.local_batch,
        "accumulate": part.accumulate,
        "steps": schedule.total_steps,
        "precision": compute.precision,
        "engine": compute.engine,
        "kernels": isa(),
        "convolutions": runtime_env.get("convolutions", {}),
        "malloc": compute.malloc,
        "affinity": placement.as_dict(),
    }
    if group.backend:
        plan |= {
            "backend": group.backend.name,
            "backend_version": group.backend.version,
            "transport": group.backend.transport,
            "interface": group.interface,
            "bucket_mb": config.comm.bucket_mb_of(ranks.size),
            "oneccl": group.backend.settings,
        }
    return plan


def describe_checkpoint(
    config: RunConfig, train_set: Dataset, data: dict[str, Any], runtime_env: dict[str, Any], start: ResumePoint
) -> dict[str, Any]:
    """What every checkpoint of the run says of its network, its data and its configuration, as JSON types."""
    return {
        "model": config.model,
        "image_size": config.image_size,
        "resize": config.resize,
        "dropout": config.dropout,
        "classes": list(train_set.classes),
        "images": len(train_set),
        "data": data,
        "started_from": start.started_from,
        "made": runtime_env,
        "config": configuration.as_dict(config),
        "config_sha256": digest(config),
    }


def build_state(run: Run, point: ResumePoint) -> TrainState:
    """Makes what a run trains, as it is in a checkpoint: when the run begins, and when it goes back.

    Args:
        run: everything else of it.
        point: which checkpoint, or none.

    Raises:
        KnltrainError: the checkpoint or the initial weights cannot be read, or are of another network.
    """
    config, group = run.config, run.group
    torch.manual_seed(config.seed)
    model = model_of(config, len(run.train_set.classes))
    init_from = initialize(model, config, run.out, group, run.console, resumed=point.folder is not None)
    optimizer = build_optimizer(model, config.optim)
    optimizer.carries_norms = True
    progress = point.restore(model, optimizer, group, run.console, runtime_env=run.runtime_env, schedule=run.schedule)
    average = None
    if config.ema_decay:
        average = WeightAverage(model, config.ema_decay)
        point.restore_average(average.model, group)
    engine = build_engine(
        run.plan["engine"], run.plan["precision"], model, optimizer, run.runtime_env.get("convolutions")
    )
    dump = FailureDump(
        run.out, group, engine, run.schedule, run.rank_batches, seed=config.seed, num_images=len(run.train_set)
    )
    state = TrainState(
        engine=engine,
        average=average,
        evaluations=Evaluations(),
        guard=StepGuard(config.health, run.out, group, engine, run.schedule, dump, run.console.warn),
        divergence=DivergenceCheck(config, run.schedule, len(run.train_set.classes)),
        replicas=ReplicaCheck(group, engine),
        noise=NoiseScale(config, group),
        init_from=init_from,
    )
    state.load(progress)
    return state


def make_writer(run: Run) -> checkpoint.CheckpointWriter:
    """The writer of the run's checkpoints."""
    return checkpoint.CheckpointWriter(
        run.out,
        keep=run.config.checkpoint.keep,
        cpus=run.placement.plan.decode,
        warn=run.console.warn,
        timeout_s=run.config.comm.timeout_s,
    )


def barrier_before_exit(group: Group, stop: StopRequest) -> None:
    """Waits until no rank minds a signal: one that ends with a code that is not 0 has its launcher end the others."""
    if group.world_size > 1:
        stop.ignore_late()
        group.barrier()
