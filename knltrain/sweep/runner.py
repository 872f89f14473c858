"""Trains the runs of a sweep one after another, each in its own process, and keeps the results up to date."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from knltrain import config as configuration
from knltrain.config.checks import unreached_schedule_warnings, unused_field_warnings
from knltrain.data.datasets import open_data
from knltrain.errors import STOPPED, ConfigError, KnltrainError
from knltrain.files import naming, open_regular, says_absent
from knltrain.models import refuse_unbuildable
from knltrain.node.affinity import threads_per_rank
from knltrain.node.topology import read_node
from knltrain.runlog.console import Console
from knltrain.runlog.metrics import read_metrics, write_json, write_text
from knltrain.runlog.provenance import provenance
from knltrain.runlog.tables import new_table, shown
from knltrain.sweep.draw import draw_accuracy, draw_losses
from knltrain.sweep.markdown import report
from knltrain.sweep.plan import Point, Sweep, removed_values
from knltrain.sweep.results import ENDED, TRAINING_KEYS, Best, Outcome, Results, as_csv, last_row
from knltrain.training import run_dir
from knltrain.training.batching import rank_batches_by_size, refuse_untrainable_batches
from knltrain.training.engine import choose_engine, choose_precision
from knltrain.training.signals import StopRequest, waits_for_request

_POLL_INTERVAL_S = 0.5
# A run finishes its step and writes a checkpoint before it ends.
_SHUTDOWN_TIMEOUT_S = 600.0
# All tasks of a job array may start at once, and take the lock one after another.
_LOCK_TIMEOUT_S = 600.0
_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
_libc = ctypes.CDLL(None)


class _Running(NamedTuple):
    """The current run, and its last step that was logged."""

    point: Point
    row: dict[str, Any]


def sweep(plan: Sweep, out: Path, console: Console) -> tuple[dict[str, Any], bool]:
    """Trains what is left of a sweep, and writes sweep.csv, the figures and report.md.

    Args:
        plan: which runs.
        out: its folder: sweep.json, runs/NAME with the run of each, and the results.
        console: where to show the table while it fills.

    Returns:
        ``runs``, the rows of sweep.csv, ``best``, a row for each method and batch, ``reference``, one of them or None,
        and ``out``; and whether nothing is left to run: if so, False means that a signal stopped it.

    Raises:
        ConfigError: a run of it cannot be, or OUT holds another sweep.
        KnltrainError: the data cannot be read, OUT is in use, or runs failed; those are tried again by the same call.
    """
    num_images = check(plan, console)
    with run_dir.lock_run_dir(out, console):
        guard(plan, out)
        results = Results(plan, out, num_images)
        try:
            finished = _train_all(results, console)
        finally:
            collected = collect(results)
    if finished and (failed := [row["run"] for row in collected["runs"] if row["status"] == "failed"]):
        raise KnltrainError(
            f"{len(failed)} of {plan.num_tasks} runs failed, {failed[0]} first; {out}/report.md says why; the same "
            "command tries them again"
        )
    return collected, finished


def train_task(plan: Sweep, out: Path, console: Console, task: int) -> tuple[dict[str, Any], bool]:
    """Trains one run of a sweep, as a task of a batch system's array does.

    Args:
        plan: which runs there are: those of the search first, then the later seeds of the best learning rates.
        out: the sweep's folder.
        console: where to print.
        task: which of them, from 0.

    Returns:
        ``run``, ``status``, ``top1`` and ``seconds``; and whether it came to its end: if not, a signal stopped it.

    Raises:
        ConfigError: there is no such task, a run cannot be configured, or OUT holds another sweep.
        KnltrainError: it failed, or the learning rate of a later seed is not known yet.
    """
    num_images = check(plan, console)
    with run_dir.lock_run_dir(out, console, timeout_s=_LOCK_TIMEOUT_S):
        guard(plan, out)
    results = Results(plan, out, num_images)
    point = task_of(results, task)
    with StopRequest() as stop:
        outcome = results.outcome(point)
        if not outcome.ended:
            outcome = _train(results, point, stop, lambda row: None)
    console.line(_line(point, outcome))
    if outcome.status == "failed":
        raise KnltrainError(f"{point.name}: {outcome.reason}")
    found = {"run": point.name, "status": outcome.status, "top1": outcome.top1, "seconds": outcome.seconds}
    return found, outcome.status != "stopped"


def task_of(results: Results, task: int) -> Point:
    """The run of a number.

    Raises:
        ConfigError: there is none.
        KnltrainError: its learning rate is not known yet.
    """
    plan = results.sweep
    if not 0 <= task < plan.num_tasks:
        raise ConfigError(f"--task {task}: this sweep has the tasks 0 to {plan.num_tasks - 1}")
    search = plan.search()
    if task < len(search):
        return search[task]
    point = results.later()[task - len(search)]
    if point is None:
        raise KnltrainError(
            f"task {task} trains with a learning rate that is not known before tasks 0 to {len(search) - 1} have ended"
        )
    return point


def check(plan: Sweep, console: Console) -> int:
    """Refuses what could not run, before hours are spent; returns the number of training images.

    Raises:
        ConfigError: which run cannot be, and why.
        KnltrainError: the data cannot be read.
    """
    node, base = read_node(), plan.base()
    precision = choose_precision(base.precision, node, force=base.force_bf16, warn=console.warn)
    choose_engine(base.engine, model=base.model, precision=precision, node=node,
                  threads=threads_per_rank(node, local_size=1))  # fmt: skip
    late = {
        f"{point.optimizer}: {said}" for point in plan.search() for said in unreached_schedule_warnings(point.config)
    }
    for complaint in [*unused_field_warnings(base, plan.fields), *sorted(late)]:
        console.warn(complaint)
    refuse_unbuildable(base)
    for point in plan.search():
        try:
            refuse_untrainable_batches(point.config, rank_batches_by_size(point.config, 0, 1))
        except ConfigError as error:
            raise ConfigError(f"--batches {point.batch}: {error}") from None
    train_set, _ = open_data(base)
    for batch in plan.batches:
        if batch > base.epochs * len(train_set):
            epochs = configuration.as_typed(base.epochs)
            raise ConfigError(f"--batches {batch}: more images than {epochs} epochs of {len(train_set):,} have")
    return len(train_set)


def guard(plan: Sweep, out: Path) -> None:
    """Refuses a folder that holds another sweep, or a run; writes OUT/sweep.json. The caller has locked the folder.

    Raises:
        ConfigError: what differs.
    """
    path, asked = out / "sweep.json", {**plan.as_dict(), "config": configuration.as_dict(plan.base())}
    before: dict[str, Any] = {}
    if (out / "config.json").exists():
        raise ConfigError(f"{out} holds a run; give another --out")
    if path.exists():
        try:
            with naming(path), open_regular(path) as file:
                before = json.loads(file.read())
            differ = removed_values(plan, before)
            if not differ:
                # The first run of a sweep that grew may be another: compare with the one that the file describes.
                same = plan.point(before["optimizers"][0], before["batches"][0], 1.0, before["seeds"][0]).config
                changed = run_dir.changes(configuration.flatten(before["config"]), same)
                differ = [f"{name}: {was} -> {now}" for name, (was, now) in changed.items()]
        except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
            if isinstance(error, OSError) and not says_absent(error):
                raise
            raise ConfigError(f"{path} is damaged; delete this file: each run in {out} says what it is") from None
        if differ:
            raise ConfigError(f"{out} holds another sweep ({'; '.join(differ)}); give another --out")
    asked = json.loads(json.dumps(asked))
    if asked != {name: before.get(name) for name in asked}:
        write_json(path, {**asked, **provenance(read_node())})


def _train_all(results: Results, console: Console) -> bool:
    """Trains what is left; returns whether no signal came in between."""
    plan = results.sweep
    tried: set[str] = set()
    with StopRequest() as stop, shown(console) as show:

        def look(point: Point) -> Callable[[dict[str, Any]], None]:
            live = console.rich.is_terminal  # without a terminal, only the last table is printed
            return lambda row: show(_table(results, _Running(point, row))) if live else None

        show(_table(results, None))
        while not stop.requested:
            known = [*plan.search(), *(point for point in results.later() if point)]
            left = [point for point in known if point.name not in tried and not results.outcome(point).ended]
            if not left:
                show(_table(results, None))
                return True
            point = left[0]
            tried.add(point.name)
            outcome = _train(results, point, stop, look(point))
            console.line(_line(point, outcome))
            write_text(results.out / "sweep.csv", as_csv(results.rows()))
            show(_table(results, None))
            if outcome.status == "stopped":
                return False
    return False


def _train(results: Results, point: Point, stop: StopRequest, look: Callable[[dict[str, Any]], None]) -> Outcome:
    """Trains one run in its own process, resuming it if it has begun, and records how it ended.

    Args:
        results: of the sweep.
        point: which run.
        stop: where a signal is noted; the run is asked then to end with a checkpoint.
        look: called at each poll with the last step that was logged.
    """
    folder, started = point.folder(results.out), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ENDED).unlink(missing_ok=True)
    command = [sys.executable, "-m", "knltrain", *point.words(results.out)]
    with (folder / "train.log").open("a+", encoding="utf-8", errors="replace") as log:
        begin = log.seek(0, os.SEEK_END)
        # A session of its own: Ctrl-C comes here alone, and a second one ends both at once.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                                   preexec_fn=_end_with_parent)  # fmt: skip
        try:
            code = _wait(process, folder, stop, look)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(begin)
        words = _last_words(log.read())
    outcome = results.outcome(point)
    if outcome.ended or code == STOPPED or (stop.requested and code in (-signal.SIGKILL, -signal.SIGTERM)):
        return outcome if outcome.ended else dataclasses.replace(outcome, status="stopped")
    reason = words if code >= 0 else f"was ended by {signal.Signals(-code).name}; was there memory enough?"
    status = "diverged" if _has_diverged(folder, reason) else "failed"
    write_json(folder / ENDED, {"status": status, "reason": reason.removeprefix("diverged: "),
                                "seconds": time.monotonic() - started, "code": code,
                                "health": dataclasses.asdict(point.config.health)})  # fmt: skip
    return results.outcome(point)


def _end_with_parent() -> None:
    """Runs in the child before exec: SIGTERM, hence a checkpoint, when the sweep's process ends in any way."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _wait(
    process: subprocess.Popen[bytes], folder: Path, stop: StopRequest, look: Callable[[dict[str, Any]], None]
) -> int:
    """Waits for the end of a run, and passes a signal to stop on to it.

    A batch system may send the signal to the run too, and a second one would end the run at once, without a checkpoint.
    So the run is sent SIGTERM one poll later, and only if it waits for one.
    """
    asked, deadline = False, None
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(_POLL_INTERVAL_S)
        look(last_row(folder / "metrics.jsonl", *TRAINING_KEYS))
        if deadline is None:
            deadline = time.monotonic() + _SHUTDOWN_TIMEOUT_S if stop.requested else None
        elif not asked and waits_for_request(process.pid):
            asked = True
            process.terminate()
        elif time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)


def _last_words(text: str) -> str:
    """The run's own last line, or else the last of any kind."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    mine = next((line for line in reversed(lines) if line.startswith("knltrain: ")), *lines[-1:] or ("no message",))
    return re.sub(r"^rank \S+: ", "", mine.removeprefix("knltrain: "))  # which a launcher around the sweep gave it


def _has_diverged(folder: Path, reason: str) -> bool:
    """Whether the run ended because of its loss or of NaN or Inf, whose step is kept in its folder."""
    if reason.startswith("diverged:"):
        return True
    try:
        rows = read_metrics(folder / "metrics.jsonl")
    except OSError:
        rows = []
    step = max((row["step"] for row in rows), default=0) + 1
    return (folder / "failed" / f"step-{step:08}").exists()


def collect(results: Results) -> dict[str, Any]:
    """Writes sweep.csv, the figures and report.md of what there is, and returns what they say."""
    out = results.out
    rows, best, reference = results.rows(), results.chosen(), results.reference()
    write_text(out / "sweep.csv", as_csv(rows))
    if best:
        draw_accuracy(results, best, reference, out / "accuracy.png")
        draw_losses(results, best, out / "losses.png")
    write_text(out / "report.md", report(results))
    return {
        "runs": rows,
        "best": [_as_row(one) for one in best],
        "reference": _as_row(reference) if reference else None,
        "out": str(out),
    }


def _as_row(best: Best) -> dict[str, Any]:
    row = dataclasses.asdict(best)
    return {**row, "mean": best.mean, "deviation": best.deviation, "at_edge": best.at_edge}


def _line(point: Point, outcome: Outcome) -> str:
    if outcome.status == "done":
        return f"{point.name}: top-1 {outcome.top1:.2f} % in {outcome.seconds or 0:.0f} s"
    return f"{point.name}: {outcome.status}{f', {outcome.reason}' if outcome.reason else ''}"


def _table(results: Results, running: _Running | None) -> Table:
    plan = results.sweep
    outcomes = [(point, results.outcome(point)) for point in results.points()]
    ended = [outcome for _, outcome in outcomes if outcome.ended]
    title = f"{plan.recipe}: {len(ended)} of {plan.num_tasks} runs"
    took = [outcome.seconds for outcome in ended if outcome.seconds]
    if took and len(ended) < plan.num_tasks:
        left = statistics.fmean(took) * (plan.num_tasks - len(ended))
        title += f", about {left / 3600:.1f} h left" if left > 5400 else f", about {left / 60:.0f} min left"
    if running:
        row = running.row
        title += f"\n{running.point.name}: " + (
            f"step {row['step']:,} of {results.steps(running.point):,}, loss {row['loss'] or float('nan'):.3f}, "
            f"{row['images_per_s']:,.0f} img/s"
            if row
            else "starting"
        )
    numbers = ("batch", "runs", "diverged", "failed", "best lr", "top-1, %", "seeds")
    table = new_table(title, names=("optimizer",), numbers=numbers)
    for optimizer, batch in plan.cells:
        mine = [outcome.status for point, outcome in outcomes if (point.optimizer, point.batch) == (optimizer, batch)]
        best = results.best(optimizer, batch)
        reached = f"{best.mean:.2f}" if best else ""
        if best and best.deviation is not None:
            reached += f" ± {best.deviation:.2f}"
        counts = (mine.count("done") + mine.count("diverged"), mine.count("diverged"), mine.count("failed"))
        table.add_row(optimizer, f"{batch:,}", *(str(count) if count else "" for count in counts),
                      f"{best.lr:g}" if best else "", reached, str(len(best.top1)) if best else "")  # fmt: skip
    return table
