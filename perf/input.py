"""How fast images come in: knltrain's formats and other people's loaders, alone, on one core each, in turns.

The images are those of a folder (train/CLASS/IMAGE). Beside the results, ``prepare`` packs them as raw pixels, as JPEGs
with a short side of 256 pixels, and as they are; each contestant reads what it is made for, a core to itself, and ends
with a normalised batch.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
from _common import finish, out_folder, output_options, show, take_turns
from _loaders import BATCH, CONTESTANTS, bars, prepare_formats, read_by_knltrain
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from knltrain.runlog.console import Console

_WARMUP_BATCHES = 6  # more than anybody decodes ahead


def _serve(pipe: Connection, name: str, root: Path, size: int, cpu: int) -> None:
    """A contestant's process: says ``None`` or why it does not run, then reads batches whenever it is asked."""
    os.sched_setaffinity(0, [cpu])
    make, _, augment = CONTESTANTS[name]
    try:
        batches = make(root, size, augment)
        next(batches)
    except Exception as error:  # whatever a library raises where it does not run
        pipe.send(f"{type(error).__name__}: {error}")
        return
    pipe.send(None)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            count = pipe.recv()
            for _ in range(_WARMUP_BATCHES):
                next(batches)
            start = time.perf_counter()
            images = sum(next(batches) for _ in range(count))
            pipe.send(images / (time.perf_counter() - start))


def measure(roots: dict[str, Path], size: int, console: Console, *, rounds: int, batches: int) -> list[dict[str, Any]]:
    """Images/s of every contestant, all in turn in each round.

    Returns:
        For each its ``name`` and ``images_per_s`` (median, with ``rounds``), or the ``reason`` why it does not run.
    """
    cpu = min(os.sched_getaffinity(0))
    contestants = {name: (name, roots[kind], size, cpu) for name, (_, kind, _) in CONTESTANTS.items()}
    answers, reasons = take_turns(_serve, contestants, console, rounds=rounds, count=batches)
    rows: list[dict[str, Any]] = [
        {"name": name, "rounds": rates, "images_per_s": statistics.median(rates)} for name, rates in answers.items()
    ]
    return rows + [{"name": name, "reason": reason} for name, reason in reasons.items()]


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("one core", no_wrap=True)
    for heading in ("img/s", "lowest", "highest"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if "reason" in row:
            table.add_row(row["name"], "does not run", style="dim")
        else:
            table.add_row(
                row["name"], *(f"{x:,.0f}" for x in (row["images_per_s"], min(row["rounds"]), max(row["rounds"])))
            )
    return table


def _figure(rows: list[dict[str, Any]]) -> Figure:
    rates = {row["name"]: row["images_per_s"] for row in rows if "rounds" in row}
    ours = {name for name, (reader, _, _) in CONTESTANTS.items() if reader is read_by_knltrain}
    figure = Figure(figsize=(9, 1 + 0.35 * len(rates)), layout="constrained")
    bars(rates, ",.0f", ours, "img/s on one core", figure).set_xscale("log")
    return figure


@click.command(context_settings={"max_content_width": 110})
@click.argument("data")
@click.option("--image-size", type=click.IntRange(min=8), default=224, show_default=True, help="Pixels of the batch.")
@click.option("--rounds", type=click.IntRange(min=1), help="Turns of each; default 5, with --quick 2.")
@click.option("--batches", type=click.IntRange(min=1), help=f"Of {BATCH} images in a turn; default 10, with --quick 1.")
@output_options
def main(
    data: str, image_size: int, rounds: int | None, batches: int | None, out: str | None, quick: bool, as_json: bool
) -> None:
    """Time loaders on the images of DATA, a folder with train/CLASS/IMAGE and val/CLASS/IMAGE."""
    from knltrain.node.topology import read_node
    from knltrain.runlog.provenance import provenance

    console = Console(json=as_json)
    folder = out_folder(out)
    roots, prepared = prepare_formats(data, folder, console)
    rows = measure(
        roots, image_size, console, rounds=rounds or (2 if quick else 5), batches=batches or (1 if quick else 10)
    )
    result = {
        "image_size": image_size,
        "batch": BATCH,
        "loaders": rows,
        "prepared": prepared,
        **provenance(read_node()),
    }
    show(console, _table(rows))
    finish(result, _figure(rows), folder, console, as_json=as_json)


if __name__ == "__main__":
    main()
