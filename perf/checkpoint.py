"""What writing checkpoints in the background costs training: steps while one is under way beside steps while none is.

    python perf/checkpoint.py --model resnet50
    python perf/checkpoint.py --model alexnet_bn --batch 128

In each round some steps are timed without a checkpoint, then one is begun and steps are timed until it is on disk.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from _common import RankStep, build_step, finish, out_folder, output_options, show, step_config, step_options
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from knltrain.errors import KnltrainError
from knltrain.runlog.console import Console

# No run would wait longer for a checkpoint.
_CHECKPOINT_TIMEOUT_S = 300.0


def measure(step: RankStep, folder: Path, *, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Writes a checkpoint in each round.

    Args:
        step: what is trained.
        folder: on the disk that is written to.
        rounds: how many checkpoints.
        steps: timed before each.

    Returns:
        For each round: ``without_s`` and ``while_s``, the times of steps in seconds; ``copy_s``, for which training
        stands still at the beginning; ``write_s`` from there to the end; ``mib``, what was written.

    Raises:
        KnltrainError: a checkpoint could not be written.
    """
    from knltrain.checkpoint import CheckpointWriter, Progress, folder_of

    rows = []
    # Decoders' cores are nobody's here, as nothing is decoded: the writer runs where training does, which is the worst.
    with CheckpointWriter(folder, keep=1, cpus=(), warn=click.echo, timeout_s=_CHECKPOINT_TIMEOUT_S) as writer:
        for number in range(rounds):
            without = [step().step_s for _ in range(steps)]
            began, start = time.time(), time.perf_counter()
            writer.begin(Progress(step=number), step.engine.state_dict(), step.engine.optimizer, meta={}, last=True)
            copy_s = time.perf_counter() - start
            meanwhile = [step().step_s]
            while writer.writing and time.perf_counter() - start < _CHECKPOINT_TIMEOUT_S:
                meanwhile.append(step().step_s)
            if failure := writer.finish():
                raise failure
            written = folder_of(folder, number)
            rows.append({
                "without_s": without,
                "while_s": meanwhile,
                "copy_s": copy_s,
                "write_s": written.stat().st_ctime - began,
                "mib": sum(path.stat().st_size for path in written.iterdir()) / 2**20,
            })  # fmt: skip
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds, and of the ratio within each."""
    median = statistics.median
    ratios = [median(row["while_s"]) / median(row["without_s"]) for row in rows]
    return {
        "ratio": median(ratios),
        "ratios": ratios,
        "without_s": median(median(row["without_s"]) for row in rows),
        "while_s": median(median(row["while_s"]) for row in rows),
        **{name: median(row[name] for row in rows) for name in ("copy_s", "write_s", "mib")},
    }


def _table(result: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("median of the rounds", ""):
        table.add_column(heading, justify="right" if not heading else "left")
    spread = f"{min(result['ratios']):.3f} to {max(result['ratios']):.3f}"
    for name, text in (
        ("step, no checkpoint under way", f"{1000 * result['without_s']:,.0f} ms"),
        ("step, one under way", f"{1000 * result['while_s']:,.0f} ms"),
        ("ratio within a round", f"{result['ratio']:.3f} ({spread})"),
        ("training stands still for the copy", f"{1000 * result['copy_s']:,.0f} ms"),
        ("until it is on disk", f"{result['write_s']:,.1f} s"),
        ("size", f"{result['mib']:,.0f} MiB"),
    ):
        table.add_row(name, text)
    return table


def _figure(rows: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(9, 3), layout="constrained")
    axis = figure.subplots()
    place = 0
    for row in rows:
        for key, colour in (("without_s", "#7f8c8d"), ("while_s", "#c1440e")):
            axis.plot(range(place, place + len(row[key])), row[key], "o", ms=4, color=colour)
            place += len(row[key])
    axis.plot([], [], "o", color="#7f8c8d", label="no checkpoint under way")
    axis.plot([], [], "o", color="#c1440e", label="one under way")
    axis.set(xlabel="step", ylabel="seconds")
    axis.set_ylim(bottom=0)
    axis.legend(loc="lower right")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


@click.command(context_settings={"max_content_width": 110})
@click.option("--rounds", type=click.IntRange(min=1), help="Checkpoints written; default 5, with --quick 1.")
@step_options
@output_options
def main(
    rounds: int | None, model: str | None, batch: int | None, image_size: int | None, precision: str, engine: str,
    steps: int | None, out: str | None, quick: bool, as_json: bool,
) -> None:  # fmt: skip
    """Time training steps on noise with and without a checkpoint being written."""
    console = Console(json=as_json)
    config = step_config(
        model=model, batch=batch, image_size=image_size, precision=precision, engine=engine, quick=quick
    )
    folder = out_folder(out)
    with contextlib.closing(build_step(config)) as step:
        if step.group.world_size > 1:
            raise KnltrainError("one process writes; start it alone")
        console.line(str(step))
        step.bench.warm_up()
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            rows = measure(step, Path(aside), rounds=rounds or (1 if quick else 5), steps=steps or (2 if quick else 5))
        result = {**summary(rows), "rounds": rows, **step.describe()}
    show(console, _table(result))
    finish(result, _figure(rows), folder, console, as_json=as_json)


if __name__ == "__main__":
    main()
