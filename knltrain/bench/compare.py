"""Comparison of engines: one process each, measured alternately, so that interference affects all of them."""

from __future__ import annotations

import contextlib
import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from knltrain.bench.process import Process
from knltrain.bench.step import StepTime, summary
from knltrain.config import EngineName, RunConfig
from knltrain.errors import KnltrainError
from knltrain.models import refuse_unbuildable
from knltrain.node.topology import read_node
from knltrain.runlog.console import Console
from knltrain.runlog.provenance import provenance
from knltrain.runlog.tables import new_table, shown
from knltrain.training.engine import choose_precision

ENGINES: tuple[EngineName, ...] = tuple(name for name in typing.get_args(EngineName) if name != "auto")
_MAX_ROUNDS = 5


def compare(
    config: RunConfig, console: Console, *, steps: int, engines: Sequence[EngineName] = ENGINES
) -> dict[str, Any]:
    """Times training steps of several engines on synthetic images.

    Each engine warms up in a process of its own. Then they are measured in turns, in an order that rotates each round;
    a turn starts with a step that is not timed. All processes exist at the same time, so their memory adds up.

    Args:
        config: as for :func:`knltrain.bench.bench`; its engine is ignored.
        console: shows the table as it fills.
        steps: timed steps of each engine.
        engines: the engines to compare.

    Returns:
        ``engines``, a list in the order of the arguments: step times, images/s and peak memory as ``bench`` gives
        them, and ``ratio``, images/s relative to ``ratio_to`` (eager, or the slowest if eager did not run). An
        engine that does not run here has a ``reason`` instead.

    Raises:
        ConfigError: this machine does not support the configuration.
        KnltrainError: none of the engines runs.
    """
    node = read_node()
    precision = choose_precision(config.precision, node, force=config.force_bf16, warn=console.warn)
    refuse_unbuildable(config)  # once, not by every engine
    title = f"{config.model}, batch {config.global_batch}, {config.image_size} px, {precision}; {node.cpu_model}"
    rows: dict[str, dict[str, Any]] = {name: {"engine": name} for name in engines}
    processes: dict[str, Process] = {}
    times: dict[str, list[StepTime]] = {name: [] for name in engines}

    def exclude(name: str, error: KnltrainError) -> None:
        rows[name] = {"engine": name, "reason": str(error)}
        console.line(f"{name} does not run here: {error}")

    with contextlib.ExitStack() as stack:
        show = stack.enter_context(shown(console))
        for name in engines:
            show(_table(title, rows))
            try:
                processes[name] = stack.enter_context(Process(dataclasses.replace(config, engine=name)))
            except KnltrainError as error:
                exclude(name, error)
                continue
            rows[name]["warmup_s"] = processes[name].warmup_s
            console.line(f"{name} is warm after {processes[name].warmup_s:.1f} s")
        show(_table(title, rows))
        turns: list[str] = list(processes)
        for steps_of_round in _split(steps, _MAX_ROUNDS):
            for turn in list(turns):
                try:
                    measured, peak = processes[turn].measure(steps_of_round)
                except KnltrainError as error:
                    exclude(turn, error)
                    turns.remove(turn)
                    continue
                times[turn] += measured
                rows[turn] |= {**summary(times[turn], processes[turn].settings), "peak_rss_mb": peak}
                _add_ratios(rows)
                show(_table(title, rows))
            turns = turns[1:] + turns[:1]
    if not turns:
        raise KnltrainError("no engine runs here: " + "; ".join(f"{n}: {row['reason']}" for n, row in rows.items()))
    settings = {k: value for k, value in processes[turns[0]].settings.items() if k not in ("engine", "convolutions")}
    return {**settings, "steps": steps, "engines": list(rows.values()), "ratio_to": _add_ratios(rows),
            **provenance(node)}  # fmt: skip


def _split(steps: int, rounds: int) -> list[int]:
    """Splits steps into at most ``rounds`` rounds, as equal as possible."""
    rounds = min(steps, rounds)
    return [steps // rounds + (index < steps % rounds) for index in range(rounds)]


def _add_ratios(rows: Mapping[str, dict[str, Any]]) -> str:
    """Sets every ``ratio``; returns the engine that has 1."""
    measured = {name: row["images_per_s"] for name, row in rows.items() if "images_per_s" in row}
    reference = "eager" if "eager" in measured else min(measured, key=measured.__getitem__)
    for name, rate in measured.items():
        rows[name]["ratio"] = rate / measured[reference]
    return reference


def _table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> Table:
    numbers = ("img/s", "ratio", "step, ms", "quartiles", "memory, MiB", "warm-up, s")
    table = new_table(title, names=("engine",), numbers=numbers)
    for name, row in rows.items():
        if "reason" in row:
            table.add_row(name, "-", style="dim")
        elif "step_s" in row:
            step = {key: f"{1e3 * value:.1f}" for key, value in row["step_s"].items()}
            table.add_row(name, f"{row['images_per_s']:.1f}", f"{row['ratio']:.2f}", step["median"],
                          f"{step['quartile1']}-{step['quartile3']}", f"{row['peak_rss_mb']:.0f}",
                          f"{row['warmup_s']:.1f}")  # fmt: skip
        else:
            table.add_row(name, "", "", "", "", "", f"{row['warmup_s']:.1f}" if "warmup_s" in row else "")
    return table
