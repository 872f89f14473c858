"""Settings of several ranks that train in turns, and how a command line names them."""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from _links import Hosts

from knltrain.bench.tune import rank_command, timed_steps, train_arguments
from knltrain.config import RunConfig
from knltrain.node.layouts import Layout
from knltrain.runlog.console import Console

_T = TypeVar("_T")
_MEASUREMENT_TIMEOUT_S = 1800.0
_TIMES = ("step_s", "comm_s", "exposed_comm_s", "data_s")


def list_of(kind: Callable[[str], _T]) -> Callable[[Any, click.Parameter, str | None], list[_T]]:
    """Reads a list of values separated by commas."""

    def read(context: Any, option: click.Parameter, text: str | None) -> list[_T]:
        try:
            return [kind(word) for word in text.split(",")] if text else []
        except ValueError:
            raise click.BadParameter(f"{text}: values separated by commas, as in {option.metavar}") from None

    return read


def link_speed(word: str) -> float:
    """Reads Gbit/s."""
    if not 0.001 <= float(word) <= 1000:
        raise ValueError
    return float(word)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a turn trains with.

    Attributes:
        ranks: all of them.
        threads: compute threads of each.
        gbit: speed of the links between hosts of one rank each, Gbit/s; None with all ranks on this node.
        config: what they train.
    """

    ranks: int
    threads: int
    gbit: float | None
    config: RunConfig

    def as_dict(self) -> dict[str, Any]:
        """What differs between settings, by the names that the table has."""
        config = self.config
        return {"ranks": self.ranks, "threads": self.threads, "link_gbit": self.gbit, "engine": config.engine,
                "local_batch": config.global_batch // self.ranks, "dtype": config.comm.dtype,
                "bucket_mb": config.comm.bucket_mb_of(self.ranks), "backend": config.comm.backend,
                "compression": config.comm.compression}  # fmt: skip


def train_in_turns(
    settings: Sequence[Setting], console: Console, *, rounds: int, steps: int
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Lets every setting train on noise for some steps, as ``knltrain train`` does, in each round.

    Returns:
        A row of each, with medians over the steps of all rounds, and what links of each speed carried when asked alone,
        Gbit/s.

    Raises:
        KnltrainError: ranks failed.
    """
    samples: list[list[dict[str, Any]]] = [[] for _ in settings]
    plans: list[dict[str, Any]] = [{} for _ in settings]
    carried: dict[str, float] = {}
    for number in range(1, rounds + 1):
        for setting, taken, plan in zip(settings, samples, plans, strict=True):
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder, "run")
                config = setting.config
                train = train_arguments(config, config.global_batch // setting.ranks, out, steps)
                deadline = time.monotonic() + _MEASUREMENT_TIMEOUT_S
                if setting.gbit is None:
                    layout = Layout(setting.ranks, setting.threads, 0, config.global_batch // setting.ranks)
                    command, environ = rank_command(layout, train)
                    turn = timed_steps(command, environ, out, steps, deadline)
                else:
                    hosts = Hosts(setting.ranks, setting.gbit)
                    try:
                        carried.setdefault(f"{setting.gbit:g}", hosts.measured_gbit())
                        turn = timed_steps(hosts.ranks(train), dict(os.environ), out, steps, deadline)
                    finally:
                        hosts.close()
                plan |= json.loads((out / "config.json").read_text("utf-8"))["plan"]
            taken += turn
            median = statistics.median(row["step_s"] for row in turn)
            console.line(f"round {number} of {rounds}, {_words(setting)}: {config.global_batch / median:.1f} img/s")
    rows = []
    for setting, taken, plan in zip(settings, samples, plans, strict=True):
        row = setting.as_dict() | {key: plan[key] for key in ("engine", "backend", "precision")}  # as it was resolved
        for name in _TIMES:
            row[name] = statistics.median(step[name] for step in taken)
        times = sorted(step["step_s"] for step in taken)
        row |= {"fastest_step_s": times[0], "slowest_step_s": times[-1],
                "images_per_s": setting.config.global_batch / row["step_s"],
                "exposed_fraction": statistics.median(step["exposed_comm_s"] / step["step_s"] for step in taken),
                "all_step_s": [step["step_s"] for step in taken]}  # fmt: skip
        rows.append(row)
    return rows, carried


def _words(setting: Setting) -> str:
    row = setting.as_dict()
    where = f"{row['link_gbit']:g} Gbit/s, " if row["link_gbit"] else ""
    packed = "" if row["compression"] == "none" else f", {row['compression']}"
    return (
        f"{row['ranks']} x {row['threads']}, {where}{row['engine']}, {row['backend']}, {row['dtype']}{packed}, "
        f"buckets of {row['bucket_mb']:g} MiB"
    )
