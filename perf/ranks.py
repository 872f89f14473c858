"""Training steps over several ranks, settings in turns: what ranks, their links and the gradients on them cost.

    python perf/ranks.py --layouts 1x2,2x1                              divisions of this node: ranks x threads
    python perf/ranks.py --layouts 2x1 --bucket-mb 1,25,100             sizes of gradient buckets
    python perf/ranks.py --links 1,10 --hosts 2 --dtypes fp32,bf16      hosts of namespaces, links of 1 and 10 Gbit/s

Every combination of the lists is a setting. In each round every setting trains on noise for some steps, as `knltrain
train` does, in processes of its own; the figures are medians over the steps of all rounds. "exposed" is the part of the
gradients' way that the backward pass does not hide: from its last bucket's leaving to the last one's return.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, get_args

import click
from _common import finish, out_folder, output_options, show
from _turns import Setting, link_speed, list_of, train_in_turns
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from knltrain.config import EngineName, Precision, RunConfig, override
from knltrain.errors import ConfigError
from knltrain.node.topology import read_node
from knltrain.runlog.console import Console
from knltrain.runlog.provenance import provenance


def _layout(word: str) -> tuple[int, int]:
    ranks, threads = (int(number) for number in word.split("x"))
    if min(ranks, threads) < 1:
        raise ValueError
    return ranks, threads


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", default="resnet50", show_default=True, help="Network, as train names it.")
@click.option("--image-size", type=int, default=224, show_default=True, help="Pixels.")
@click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True, help="Images a step, all ranks.")
@click.option("--precision", type=click.Choice(get_args(Precision)), default="auto", show_default=True)
@click.option("--layouts", metavar="1x2,2x1", callback=list_of(_layout), help="Ranks x threads on this node.")
@click.option(
    "--links", metavar="1,10", callback=list_of(link_speed), help="Gbit/s between hosts of one rank each (root)."
)
@click.option("--hosts", type=click.IntRange(min=2), default=2, show_default=True, help="Hosts, with --links.")
@click.option("--engines", metavar="fused,eager", callback=list_of(str), help="Default auto.")
@click.option("--backends", metavar="ccl,gloo", callback=list_of(str), help="Default auto.")
@click.option("--dtypes", metavar="fp32,bf16", callback=list_of(str), help="Of gradients on the wire; default fp32.")
@click.option(
    "--bucket-mb", metavar="1,25", callback=list_of(float), help="Sizes of buckets, MiB; default by the ranks."
)
@click.option("--compressions", metavar="none,powersgd", callback=list_of(str), help="Default none.")
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
        places, engines or ["auto"], backends or ["auto"], dtypes or ["fp32"], bucket_mb or [None],
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
    rows, carried = train_in_turns(settings, console, rounds=rounds, steps=steps)
    result = {**common, "rounds": rounds, "steps": steps, "links_measured_gbit": carried, "settings": rows,
              **provenance(read_node())}  # fmt: skip
    show(console, _table(result))
    finish(result, _figure(result), folder, console, as_json=as_json)


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
