"""``knltrain tune``: measures engines and layouts on this node, and stores the fastest for ``auto`` and ``plan``."""

from __future__ import annotations

import dataclasses
import datetime
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from knltrain.bench.compare import compare
from knltrain.config import CommConfig, RunConfig
from knltrain.errors import KnltrainError
from knltrain.launch.mpiexec import command_line, find_mpiexec
from knltrain.node.layouts import Layout, layouts
from knltrain.node.topology import read_node
from knltrain.node.tuning_cache import check_writable, layout_settings, settings_of, store
from knltrain.runlog.console import Console
from knltrain.runlog.metrics import read_metrics
from knltrain.runlog.tables import new_table, shown

# The first steps allocate, choose primitives and compile.
_WARMUP_STEPS = 3
_POLL_INTERVAL_S = 0.1
# For ranks to finish a step and write a checkpoint.
_SHUTDOWN_TIMEOUT_S = 60.0


def tune(config: RunConfig, console: Console, *, steps: int, budget_s: float) -> dict[str, Any]:
    """Measures every engine that runs on this node, then the layouts of ranks with the fastest, and stores both.

    Args:
        config: model, image size, global batch and precision.
        console: shows the tables as they fill.
        steps: timed steps of each engine and layout.
        budget_s: time limit for the layouts, seconds; later ones are not measured.

    Returns:
        The result of :func:`knltrain.bench.compare.compare`; ``fastest``, the engine of the shortest median step;
        ``layouts``, each with ``images_per_s`` or a ``reason``; ``layout``, the fastest of them or None; and
        ``stored``, the file of the results.

    Raises:
        ConfigError: this machine does not support the configuration.
        KnltrainError: no engine runs here, or the cache folder cannot be written.
    """
    check_writable()
    result = compare(config, console, steps=steps)
    measured = [row for row in result["engines"] if "images_per_s" in row]
    fastest = max(measured, key=lambda row: row["images_per_s"])["engine"]
    node, precision = read_node(), result["precision"]
    common = {"batch": result["batch"], "image_size": result["image_size"], "optimizer": result["optimizer"]}
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    stored = {"fastest": fastest, "engines": result["engines"], "steps": steps, "time": now}
    path = store({**settings_of(config.model, precision, node, result["threads"]), **common}, stored)

    config = dataclasses.replace(config, engine=fastest, precision=precision)
    rows = measure_layouts(config, console, layouts(node, config.global_batch), steps=steps, budget_s=budget_s)
    done = [row for row in rows if "images_per_s" in row]
    best = None
    if done:
        row = max(done, key=lambda row: row["images_per_s"])
        best = Layout(**{field.name: row[field.name] for field in dataclasses.fields(Layout)})
        settings = {**layout_settings(config.model, precision, node, best), **common}
        store(settings, {"fastest": fastest, "layout": dataclasses.asdict(best), "layouts": rows, "steps": steps,
                         "time": now})  # fmt: skip
    return {**result, "fastest": fastest, "layouts": rows, "layout": best and dataclasses.asdict(best),
            "stored": str(path)}  # fmt: skip


def measure_layouts(
    config: RunConfig, console: Console, candidates: Sequence[Layout], *, steps: int, budget_s: float
) -> list[dict[str, Any]]:
    """Runs ``knltrain train`` on synthetic images in each layout, one after the other.

    Args:
        config: model, image size, global batch, precision and engine.
        console: shows the table as it fills.
        candidates: the layouts, the most important first.
        steps: timed steps of each.
        budget_s: time limit for all, seconds.

    Returns:
        A row for each layout: its fields, and ``images_per_s`` and ``step_s`` of the median step, or a ``reason``.
    """
    deadline = time.monotonic() + budget_s
    rows: list[dict[str, Any]] = [dataclasses.asdict(layout) for layout in candidates]
    title = f"{config.model}, batch {config.global_batch}, {config.precision}, engine {config.engine}"
    with shown(console) as show:
        for layout, row in zip(candidates, rows, strict=True):
            show(_table(title, rows))
            try:
                if deadline <= time.monotonic():
                    raise KnltrainError(f"the time limit of {budget_s:g} s was reached")
                row |= _measure(config, layout, steps, deadline)
                outcome = f"{row['images_per_s']:.1f} img/s"
            except KnltrainError as error:
                row["reason"] = outcome = str(error)
            left = max(0.0, deadline - time.monotonic())
            console.line(f"{_describe(layout)}: {outcome}; {left:.0f} s of {budget_s:g} left")
        show(_table(title, rows))
    return rows


def _describe(layout: Layout) -> str:
    comm = f" + {layout.comm_cores} cores for communication" if layout.comm_cores else ""
    return f"{layout.ranks_per_node} x {layout.threads} threads{comm}, local batch {layout.local_batch}"


def _table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = new_table(title, numbers=("ranks", "threads", "comm cores", "local batch", "img/s", "step, ms"))
    fastest_rate = max((row["images_per_s"] for row in rows if "images_per_s" in row), default=0.0)
    for row in rows:
        cells = [str(row[field.name]) for field in dataclasses.fields(Layout)]
        if "reason" in row:
            table.add_row(*cells, "-", "", style="dim")
        elif "step_s" not in row:
            table.add_row(*cells, "", "")
        else:
            style = "bold" if row["images_per_s"] == fastest_rate else None
            table.add_row(*cells, f"{row['images_per_s']:.1f}", f"{1e3 * row['step_s']:.1f}", style=style)
    return table


def _measure(config: RunConfig, layout: Layout, steps: int, deadline: float) -> dict[str, float]:
    """Times the training steps of a layout.

    Raises:
        KnltrainError: as :func:`timed_steps`.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        command, environ = rank_command(layout, train_arguments(config, layout.local_batch, out, steps))
        times = [row["step_s"] for row in timed_steps(command, environ, out, steps, deadline)]
    step_s = statistics.median(times)
    return {"images_per_s": config.global_batch / step_s, "step_s": step_s}


def timed_steps(
    command: Sequence[str], environ: Mapping[str, str], out: Path, steps: int, deadline: float
) -> list[dict[str, Any]]:
    """Starts ranks, reads their metrics until there are enough steps, and terminates them.

    Args:
        command: a command that runs all ranks, with :func:`train_arguments`.
        environ: its environment.
        out: the run's folder.
        steps: number of steps to return.
        deadline: deadline by ``time.monotonic``.

    Returns:
        The metrics of each step after the warm-up.

    Raises:
        KnltrainError: the ranks ended earlier, or the deadline has passed.
    """
    wanted = _WARMUP_STEPS + steps
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        process = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                   start_new_session=True)  # fmt: skip
        try:
            while True:
                ended = process.poll() is not None
                rows = _steps_in(out / "metrics.jsonl")
                if len(rows) >= wanted:
                    return rows[_WARMUP_STEPS:wanted]
                if ended:
                    output.seek(0)
                    raise KnltrainError(f"training ended with {process.returncode}: {last_message(output.read())}")
                if time.monotonic() > deadline:
                    raise KnltrainError(f"step {len(rows)} of {wanted} when the time limit was reached")
                time.sleep(_POLL_INTERVAL_S)
        finally:
            _terminate(process)


def _steps_in(path: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(path) if "step_s" in row] if path.exists() else []


def last_message(text: str) -> str:
    """Returns the most relevant line: knltrain's, the first of a launcher's framed message, or else the last."""
    lines = [line.strip() for line in text.splitlines() if any(map(str.isalpha, line))]
    framed = lines[:1] if text.startswith("---") else lines[-1:]
    return next((line for line in lines if line.startswith("knltrain:")), *framed or ("no message",))


def train_arguments(config: RunConfig, local_batch: int, out: Path, steps: int) -> list[str]:
    """Returns the interpreter's arguments of a rank that trains on synthetic images for :func:`timed_steps`."""
    fields = {"model": config.model, "image-size": config.image_size, "global-batch": config.global_batch,
              "local-batch": local_batch, "precision": config.precision, "engine": config.engine,
              "force-bf16": str(config.force_bf16).lower(), "data": "synthetic", "out": out,
              # timed_steps() terminates it earlier, unless it was killed.
              "max-steps": 2 * (_WARMUP_STEPS + steps),
              # On noise a usual rate may lead to NaN.
              "optim.lr": 1e-4}  # fmt: skip
    fields |= {f"comm.{name}": value for name, value in dataclasses.asdict(config.comm).items()
               if value != getattr(CommConfig(), name)}  # fmt: skip
    train = ["-m", "knltrain", "train", "--config", os.devnull]
    return train + [word for name, value in fields.items() for word in (f"--{name}", str(value))]


def rank_command(layout: Layout, train: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Returns the command that starts the ranks of a layout on this node, and its environment."""
    # In the plan, cores without a compute thread are reserved for communication.
    environ = {**os.environ, "OMP_NUM_THREADS": str(layout.threads)}
    if layout.ranks_per_node == 1:
        return [sys.executable, *train], environ
    try:
        mpiexec = find_mpiexec()
    except KnltrainError:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return [*torchrun, f"--nproc-per-node={layout.ranks_per_node}", *train], environ
    environ |= mpiexec.environment
    ranks = layout.ranks_per_node
    return command_line(mpiexec, ranks, ranks, [], [sys.executable, *train], environ), environ


def _terminate(process: subprocess.Popen[bytes]) -> None:
    """Sends SIGTERM, as a batch system does, and SIGKILL after a time-out."""
    process.terminate()
    try:
        process.wait(_SHUTDOWN_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
