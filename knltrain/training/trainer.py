"""The run: from a configuration to a folder that says everything about itself."""

from __future__ import annotations

import contextlib
import time
import warnings
from typing import Any

from knltrain import checkpoint
from knltrain import config as configuration
from knltrain.comm.statistics import averaged_running_statistics, gather_running_statistics
from knltrain.config import RunConfig
from knltrain.data.loader import replaced
from knltrain.errors import ConfigError, KnltrainError, SharedError
from knltrain.launch.placement import RankPlacement, binding_drift, find_placement
from knltrain.node.binding import running_on
from knltrain.node.contention import CpuContention
from knltrain.runlog.console import Console
from knltrain.runlog.metrics import write_json
from knltrain.runlog.provenance import provenance
from knltrain.runlog.run_log import RunLog
from knltrain.training.evaluate import evaluate
from knltrain.training.setup import barrier_before_exit, build_state, make_writer, set_up
from knltrain.training.signals import InterruptError, StopRequest
from knltrain.training.state import Run
from knltrain.training.step import Stepper
from knltrain.training.step_guard import RewindError
from knltrain.training.summary import finished_summary, log_run_header, summarize

# Images at once in an evaluation, at most: more save nothing.
_MAX_EVAL_BATCH = 256


def train(
    config: RunConfig, console: Console, placement: RankPlacement | None = None, *,
    allow_change: frozenset[str] = frozenset(),
) -> tuple[dict[str, Any], bool]:  # fmt: skip
    """Trains as configured, alone or as one of several ranks.

    Args:
        config: what to train.
        console: where to speak.
        placement: where this rank runs, as it was bound before torch was loaded; by default nothing is moved.
        allow_change: fields that may differ from the run that OUT holds, or from the checkpoint that is named.

    Returns:
        The summary (also OUT/summary.json), and whether the run is finished; if not, a signal stopped it after a
        checkpoint and the same call goes on from there.

    Raises:
        ConfigError: the configuration is not possible on this machine, or OUT holds another run.
        KnltrainError: data, a checkpoint or the other ranks failed.
    """
    with contextlib.ExitStack() as cleanup:
        stop = cleanup.enter_context(StopRequest())
        placement = placement or find_placement(strict=False)
        try:
            run = set_up(config, console, placement, stop, cleanup, allow_change=allow_change)
        except InterruptError:
            return {}, False
        log_run_header(run)
        if run.is_finished:
            return _nothing_left(run), True
        if run.group.is_first:
            _write_config(run)
            run.writer = cleanup.enter_context(make_writer(run))
        started, wall_s, finished = time.perf_counter(), run.state.wall_s, True
        try:
            train_with_rewinds(run)
        except InterruptError:
            finished = False
        summary = _summarize_all_ranks(run, wall_s + time.perf_counter() - started, finished=finished)
        if finished:
            run.group.barrier()
        else:
            barrier_before_exit(run.group, stop)
    return summary, finished


def train_with_rewinds(run: Run) -> None:
    """Trains to the end; goes back to the last checkpoint where ``health.policy`` says so.

    Raises:
        InterruptError: a signal came; the checkpoint is written.
        SharedError: the run cannot go on.
    """
    while True:
        state = run.state
        log = RunLog(
            run.out, run.console, is_first=run.group.is_first, step=state.step, evaluated_step=state.evaluations.step,
            total_steps=run.schedule.total_steps, epochs=run.config.epochs,
        )  # fmt: skip
        try:
            with log:
                train_steps(run, log)
            return
        except SharedError:
            # A launcher ends the others with the first that ends: a checkpoint under way is to be whole by then.
            if run.writer:
                run.writer.finish()
            with contextlib.suppress(RuntimeError):  # that it took too long is no news beside the error
                run.group.barrier()
            raise
        except RewindError as error:
            run.console.warn(str(error))
        rewind(run)


def rewind(run: Run) -> None:
    """Goes back to the newest whole checkpoint that this process has written, with a lower learning rate."""
    if run.writer:
        run.writer.finish()
    before = run.state.guard
    run.state = build_state(run, run.start.latest_valid(run.saved, run.group))
    run.state.guard.rewound(before)
    factor = run.state.guard.lr_factor
    run.console.line(f"back at step {run.state.step:,}, with {factor:g} times the learning rate")


def train_steps(run: Run, log: RunLog) -> None:
    """Trains from where the run stands to its last step.

    Raises:
        InterruptError: a signal came; the checkpoint is written.
        RewindError: the run is to go back to its last checkpoint.
        SharedError: it cannot go on.
    """
    stepper, started, first_step = Stepper(run, log), time.perf_counter(), run.state.step
    with contextlib.closing(run.batches(first_step, run.last_step)) as batches:
        if run.group.any(run.stop.requested):
            raise InterruptError
        run_pending_evaluation(run, log)
        for step in range(first_step, run.last_step):
            interrupted = stepper.train_step(batches)
            if problem := run.contention.problem():
                warnings.warn(problem, stacklevel=1)
            finish_step(run, log, elapsed_s=time.perf_counter() - started, interrupted=interrupted)
            if step == first_step:
                # The first step takes longer than others: only from now on is a time-out a sign of a lost rank.
                with running_on(run.placement.plan.comm):
                    run.group.set_timeout(run.config.comm.timeout_s)


def finish_step(run: Run, log: RunLog, *, elapsed_s: float, interrupted: bool) -> None:
    """Does what is due after a step: checks of the weights, an evaluation, a checkpoint.

    Args:
        run: of which a step was taken.
        log: gets what an evaluation finds.
        elapsed_s: seconds since this process began to train.
        interrupted: a signal came during the step.

    Raises:
        InterruptError: a signal came, then or during the evaluation; the checkpoint is written.
        SharedError: the weights are not finite, or differ between ranks.
    """
    state = run.state
    due = run.due.after(state.step, interrupted=interrupted)
    if due.check_finite:
        state.guard.check_weights(state.step)
    if due.compare:
        state.replicas.check(state.step)
    try:
        if interrupted:
            raise InterruptError
        if due.evaluate:
            evaluate_epoch(run, log)
    except InterruptError:
        save_checkpoint(run, log, elapsed_s, last=True)
        raise
    if due.save:
        save_checkpoint(run, log, elapsed_s, last=due.last)


def evaluate_epoch(run: Run, log: RunLog) -> None:
    """Evaluates, and notes what was found.

    Raises:
        InterruptError: a signal came before it was through.
    """
    start, state = time.perf_counter(), run.state
    with averaged_running_statistics(state.eval_model, run.group):
        accuracy = evaluate(
            state.eval_model,
            state.engine.precision,
            run.val_loader,
            run.group,
            batch=min(run.rank_batches[-1].local_batch, _MAX_EVAL_BATCH),
            stop=run.stop,
        )
    state.evaluations.add(state.step, accuracy.top1)
    log.evaluation({"step": state.step, "epoch": run.epoch(state.step), "top1": accuracy.top1, "top5": accuracy.top5,
                    "val_loss": accuracy.loss, "eval_s": time.perf_counter() - start})  # fmt: skip
    for problem in (binding_drift(run.placement), run.train_loader.moved(), run.val_loader.moved()):
        if problem:
            warnings.warn(f"{problem}: a library has changed it", stacklevel=1)


def run_pending_evaluation(run: Run, log: RunLog) -> None:
    """Evaluates where a signal had left no time for it.

    The checkpoint is written anew with what was found, since the best one stays when others are removed.

    Raises:
        InterruptError: a signal came again.
    """
    step = run.state.step
    if step != run.state.evaluations.step and run.due.evaluation(step):
        evaluate_epoch(run, log)
        save_checkpoint(run, log, 0.0, last=step == run.last_step)


def save_checkpoint(run: Run, log: RunLog, elapsed_s: float, *, last: bool) -> None:
    """Begins to write a checkpoint from rank 0, in the background; the last one is on disk when this returns.

    Raises:
        KnltrainError: the last one could not be written; on all ranks alike.
    """
    state, group = run.state, run.group
    run.saved.append(checkpoint.folder_of(run.out, state.step))
    average = state.average.model if state.average else None
    statistics = gather_running_statistics(state.engine.model, group)
    average_statistics = gather_running_statistics(average, group) if average else None
    with contextlib.ExitStack() as borrowed:
        for network in (state.engine.model, average):
            if network:
                borrowed.enter_context(averaged_running_statistics(network, group))
        if run.writer:
            log.sync()
            run.writer.begin(
                state.progress(elapsed_s=elapsed_s),
                state.engine.state_dict(),
                state.engine.optimizer,
                meta=run.meta,
                statistics=statistics,
                average=average.state_dict() if average else None,
                average_statistics=average_statistics,
                last=last,
            )
    if last:
        failure = run.writer.finish() if run.writer else None
        if group.any(failure is not None):
            raise failure or KnltrainError("the last checkpoint could not be written; rank 0 says why")


def _nothing_left(run: Run) -> dict[str, Any]:
    """The summary of a run that is finished already; empty but on the first rank.

    Raises:
        ConfigError: the checkpoint that was named is at the end of the run, and OUT holds no other.
    """
    if run.group.is_first and not (run.out / "metrics.jsonl").exists():
        raise ConfigError(
            f"{run.start.folder} is at the end of this run, and leaves {run.out} nothing to train; a larger "
            "--max-steps goes further, or --epochs with --allow-change epochs"
        )
    run.console.line(f"nothing left to train: {run.out} holds this run, finished")
    return finished_summary(run) if run.group.is_first else {}


def _write_config(run: Run) -> None:
    """Writes OUT/config.json."""
    record = {
        "config": configuration.as_dict(run.config),
        "plan": run.plan,
        "init_from": run.state.init_from,
        **provenance(run.placement.node),
        "changes": run.start.changes,
        "data": {"train": len(run.train_set), "val": len(run.val_loader), "classes": len(run.train_set.classes)},
    }
    write_json(run.out / "config.json", record)


def _summarize_all_ranks(run: Run, wall_s: float, *, finished: bool) -> dict[str, Any]:
    """Adds up what all ranks have seen, and writes the summary; empty but on the first rank."""
    contention = CpuContention(*run.group.sum(*run.contention.taken()))
    skipped = run.train_loader.skipped(run.group.sum) + run.val_loader.skipped(run.group.sum)
    if skipped:
        run.console.warn(replaced(skipped))
    return summarize(run, wall_s, skipped, contention, finished=finished) if run.group.is_first else {}
