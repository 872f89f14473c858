"""Training steps over several ranks, settings in turns: what ranks, their links and the gradients on them cost.

    python perf/ranks.py --layouts 1x2,2x1                              divisions of this node: ranks x threads
    python perf/ranks.py --layouts 2x1 --bucket-mb 1,25,100             sizes of gradient buckets
    python perf/ranks.py --links 1,10 --hosts 2 --dtypes fp32,bf16      hosts of namespaces, links of 1 and 10 Gbit/s

Every combination of the lists is a setting. In each round every setting trains on noise for some steps, as `knltrain
train` does, in processes of its own; the figures are medians over the steps of all rounds. "exposed" is the part of the
gradients' way that the backward pass does not hide: from its last bucket's leaving to the last one's return.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import click
from _common import finish, out_folder, output_options, show
from _links import Hosts
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from knltrain.config import EngineName, Precision, RunConfig, override
from knltrain.console import Console
from knltrain.errors import ConfigError
from knltrain.node.layouts import Layout
from knltrain.node.topology import read_node
from knltrain.provenance import provenance
from knltrain.tune import rank_command, timed_steps, training_words

_T = TypeVar("_T")
_PATIENCE_S = 1800.0
_TIMES = ("step_s", "comm_s", "exposed_comm_s", "data_s")


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
                "bucket_mb": config.comm.bucket_mb, "backend": config.comm.backend,
                "compression": config.comm.compression}  # fmt: skip


def _list(kind: Callable[[str], _T]) -> Callable[[Any, click.Parameter, str | None], list[_T]]:
    """Reads a list of values separated by commas."""

    def read(context: Any, option: click.Parameter, text: str | None) -> list[_T]:
        try:
            return [kind(word) for word in text.split(",")] if text else []
        except ValueError:
            raise click.BadParameter(f"{text}: values separated by commas, as in {option.metavar}") from None

    return read


def _layout(word: str) -> tuple[int, int]:
    ranks, threads = (int(number) for number in word.split("x"))
    if min(ranks, threads) < 1:
        raise ValueError
    return ranks, threads


def _speed(word: str) -> float:
    if not 0.001 <= float(word) <= 1000:
        raise ValueError
    return float(word)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", default="resnet50", show_default=True, help="Network, as train names it.")
@click.option("--image-size", type=int, default=224, show_default=True, help="Pixels.")
@click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True, help="Images a step, all ranks.")
@click.option("--precision", type=click.Choice(get_args(Precision)), default="auto", show_default=True)
@click.option("--layouts", metavar="1x2,2x1", callback=_list(_layout), help="Ranks x threads on this node.")
@click.option("--links", metavar="1,10", callback=_list(_speed), help="Gbit/s between hosts of one rank each (root).")
@click.option("--hosts", type=click.IntRange(min=2), default=2, show_default=True, help="Hosts, with --links.")
@click.option("--engines", metavar="fused,eager", callback=_list(str), help="Default auto.")
@click.option("--backends", metavar="ccl,gloo", callback=_list(str), help="Default auto.")
@click.option("--dtypes", metavar="fp32,bf16", callback=_list(str), help="Of gradients on the wire; default fp32.")
@click.option("--bucket-mb", metavar="1,25", callback=_list(float), help="Sizes of buckets, MiB; default 25.")
@click.option("--compressions", metavar="none,powersgd", callback=_list(str), help="Default none.")
@click.option("--steps", type=click.IntRange(min=1), help="Steps timed in a turn; default 5, with --quick 1.")
@click.option("--rounds", type=click.IntRange(min=1), help="Turns of each setting; default 3, with --quick 1.")
@output_options
def main(
    model: str, image_size: int, batch: int, precision: Precision, layouts: list[tuple[int, int]], links: list[float],
    hosts: int, engines: list[EngineName], backends: list[str], dtypes: list[str], bucket_mb: list[float],
    compressions: list[str], steps: int | None, rounds: int | None, out: str | None, as_json: bool, quick: bool,
) -> None:  # fmt: skip
    """Compare training steps over several ranks."""
    if bool(layouts) == bool(links):
        raise ConfigError("give --layouts, ranks on this node, or --links, hosts with links of that speed")
    if quick:
        model, image_size, batch = "alexnet_bn_small", 32, 16
    common = {"model": model, "image_size": image_size, "global_batch": batch, "precision": precision,
              "data": "synthetic"}  # fmt: skip
    cores = len(read_node().cores)
    places = [(ranks, threads, None) for ranks, threads in layouts]
    places += [(hosts, max(1, cores // hosts), gbit) for gbit in links]
    settings = []
    for (ranks, threads, gbit), engine, backend, dtype, bucket, compression in itertools.product(
        places, engines or ["auto"], backends or ["auto"], dtypes or ["fp32"], bucket_mb or [25.0],
        compressions or ["none"],
    ):  # fmt: skip
        if batch % ranks:
            raise ConfigError(f"--batch {batch} is not a multiple of {ranks} ranks")
        config = override(RunConfig(), {**common, "engine": engine, "comm.backend": backend, "comm.dtype": dtype,
                                        "comm.bucket_mb": bucket, "comm.compression": compression})  # fmt: skip
        settings.append(Setting(ranks, threads, gbit, config))
    console = Console(json=as_json)
    folder = out_folder(out)
    rounds, steps = rounds or (1 if quick else 3), steps or (1 if quick else 5)
    rows, carried = _measure(settings, console, rounds=rounds, steps=steps)
    result = {**common, "rounds": rounds, "steps": steps, "links_measured_gbit": carried, "settings": rows,
              **provenance(read_node())}  # fmt: skip
    show(console, _table(result))
    finish(result, _figure(result), folder, console, as_json=as_json)


def _measure(
    settings: Sequence[Setting], console: Console, *, rounds: int, steps: int
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Lets the settings take turns; returns a row of each, and what links of each speed carried when asked alone."""
    samples: list[list[dict[str, Any]]] = [[] for _ in settings]
    plans: list[dict[str, Any]] = [{} for _ in settings]
    carried: dict[str, float] = {}
    for number in range(1, rounds + 1):
        for setting, taken, plan in zip(settings, samples, plans, strict=True):
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder, "run")
                config = setting.config
                train = training_words(config, config.global_batch // setting.ranks, out, steps)
                deadline = time.monotonic() + _PATIENCE_S
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


# By the keys of a row: what the table calls them.
_NAMES = {"link_gbit": "link, Gbit/s", "engine": "engine", "backend": "backend", "dtype": "wire",
          "compression": "compression", "precision": "precision", "bucket_mb": "bucket, MiB"}  # fmt: skip


def _title(result: dict[str, Any]) -> str:
    """What is the same for all settings."""
    rows = result["settings"]
    same = [f"{name} {rows[0][key]}" for key, name in _NAMES.items() if len({row[key] for row in rows}) == 1]
    network = f"{result['model']}, {result['image_size']} pixels, batch {result['global_batch']} over all ranks"
    return ", ".join([network, *(words for words in same if not words.endswith("None"))])


def _differences(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [key for key in _NAMES if len({row[key] for row in rows}) > 1]


def _table(result: dict[str, Any]) -> Table:
    rows = result["settings"]
    table = Table(title=_title(result), title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("ranks", *(_NAMES[key] for key in _differences(rows))):
        table.add_column(name, no_wrap=True)
    for name in ("img/s", "step, ms", "lowest", "highest", "on the wire", "exposed", "of the step"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row['ranks']} x {row['threads']}", *(str(row[key]) for key in _differences(rows)),
            f"{row['images_per_s']:.1f}",
            *(f"{1e3 * row[name]:.0f}" for name in ("step_s", "fastest_step_s", "slowest_step_s", "comm_s")),
            f"{1e3 * row['exposed_comm_s']:.1f}", f"{row['exposed_fraction']:.1%}",
        )  # fmt: skip
    return table


def _figure(result: dict[str, Any]) -> Figure:
    """A bar for each setting: the step, and what of it is exposed communication."""
    rows = result["settings"]
    figure = Figure(figsize=(9, 1.7 + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots()
    units = {"link_gbit": " Gbit/s", "bucket_mb": " MiB"}
    names = [
        ", ".join([f"{row['ranks']} x {row['threads']}",
                   *(f"{row[key]}{units.get(key, '')}" for key in _differences(rows))])
        for row in rows
    ]  # fmt: skip
    hidden = [1e3 * (row["step_s"] - row["exposed_comm_s"]) for row in rows]
    spread = [[1e3 * (row["step_s"] - row["fastest_step_s"]) for row in rows],
              [1e3 * (row["slowest_step_s"] - row["step_s"]) for row in rows]]  # fmt: skip
    axes.barh(names, hidden, color="tab:blue", label="computing")
    axes.barh(names, [1e3 * row["exposed_comm_s"] for row in rows], left=hidden, color="tab:red",
              label="exposed communication", xerr=spread, ecolor="0.3")  # fmt: skip
    axes.invert_yaxis()
    axes.set_xlabel("step, ms (median; lines from the fastest step to the slowest)")
    axes.set_title(_title(result), fontsize="medium", wrap=True)
    figure.legend(loc="outside lower right", ncols=2, fontsize="small")
    return figure


if __name__ == "__main__":
    main()
