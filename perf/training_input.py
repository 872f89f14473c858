"""What input costs a training step: the same step fed with noise, from every format, and by torchvision's loader.

Each contestant trains in a process of its own, in turns. Besides the step's threads there are as many decoders as
cores; of torchvision's worker processes every count in WORKERS is tried, and the best is what counts.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
from _common import finish, out_folder, output_options, show, step_config, take_turns
from _loaders import bars, prepare_formats, torchvision_transform
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from knltrain.config import RunConfig, override
from knltrain.runlog.console import Console

WORKERS = (1, 2, 4)
# Of our own: where the images are, and how they are cut.
_FORMATS = {
    "noise": ("", "none"),
    "raw, crop-flip": ("raw", "crop-flip"),
    "tar of 256 px, crop-flip": ("tar", "crop-flip"),
    "folder, rrc": ("folder", "rrc"),
    "tar of originals, rrc": ("originals", "rrc"),
}


def _torchvision_batches(root: Path, config: RunConfig, dtype: Any, workers: int) -> Iterator[Any]:
    import torch
    from torchvision.datasets import ImageFolder

    from knltrain.data.loader import Batch

    dataset = ImageFolder(str(root / "train"), torchvision_transform(config.image_size, "rrc"))
    loader = torch.utils.data.DataLoader(
        dataset, config.global_batch, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=True
    )
    while True:
        for images, labels in loader:
            yield Batch(images.to(dtype, memory_format=torch.channels_last), labels)


def _serve(pipe: Connection, config: RunConfig, torchvision_root: Path | None, workers: int) -> None:
    """A contestant's process: says ``None`` or why it does not run, then trains whenever it is asked to."""
    from knltrain.bench.step import TrainingStep

    try:
        step = TrainingStep(config)
        if torchvision_root is not None:
            step._batches = _torchvision_batches(torchvision_root, config, step.engine.dtype, workers)
        step.warm_up()
    except Exception as error:  # whatever a library raises where it does not run
        pipe.send(f"{type(error).__name__}: {error}")
        return
    pipe.send(None)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            count = pipe.recv()
            for _ in range(2 * workers + 3):  # what was read ahead while the others trained
                step()
            times = [step() for _ in range(count)]
            pipe.send((statistics.median(time.step_s for time in times), sum(time.data_s for time in times) / count))


def measure(
    config: RunConfig, roots: dict[str, Path], console: Console, *, workers: Sequence[int], rounds: int, steps: int
) -> list[dict[str, Any]]:
    """Training steps of every contestant, all in turn in each round.

    Returns:
        For each its ``name``, ``images_per_s`` (of the median step of each round, and the median of these),
        ``of_noise`` (the median of its ratio to noise within a round) and ``data_s`` (waited for images in a step);
        or the ``reason`` why it does not run.
    """
    contestants: dict[str, tuple[Any, ...]] = {}
    for name, (root, augment) in _FORMATS.items():
        fields: dict[str, object] = {"data": str(roots[root]) if root else ""}
        if root:
            fields |= {"augment.name": augment, "augment.resize": round(config.image_size * 256 / 224)}
        contestants[name] = (override(config, fields), None, 0)
    for count in workers:
        contestants[f"torchvision, folder, rrc, {count} worker{'s' * (count > 1)}"] = (config, roots["folder"], count)
    answers, reasons = take_turns(_serve, contestants, console, rounds=rounds, count=steps)
    noise = answers["noise"]
    rows: list[dict[str, Any]] = []
    for name, turns in answers.items():
        rates = [config.global_batch / step_s for step_s, _ in turns]
        rows.append({
            "name": name,
            "rounds": rates,
            "images_per_s": statistics.median(rates),
            "of_noise": statistics.median(plain / step_s for (plain, _), (step_s, _) in zip(noise, turns, strict=True)),
            "data_s": statistics.median(data_s for _, data_s in turns),
        })  # fmt: skip
    return rows + [{"name": name, "reason": reason} for name, reason in reasons.items()]


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("fed with", no_wrap=True)
    for heading in ("img/s", "lowest", "highest", "of noise", "waited a step"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if "reason" in row:
            table.add_row(row["name"], "does not run", style="dim")
            continue
        rates = (row["images_per_s"], min(row["rounds"]), max(row["rounds"]))
        table.add_row(
            row["name"], *(f"{x:,.1f}" for x in rates), f"{row['of_noise']:.1%}", f"{1000 * row['data_s']:,.1f} ms"
        )
    return table


def _figure(rows: list[dict[str, Any]]) -> Figure:
    shares = {row["name"]: row["of_noise"] for row in rows if "rounds" in row}
    figure = Figure(figsize=(9, 1 + 0.4 * len(shares)), layout="constrained")
    bars(shares, ".1%", _FORMATS, "training speed, of that with noise", figure).set_xlim(0, 1.15)
    return figure


@click.command(context_settings={"max_content_width": 110})
@click.argument("data")
@click.option("--model", help="Network; default alexnet_bn, the fastest, with --quick alexnet_bn_small.")
@click.option("--batch", type=click.IntRange(min=1), help="Images a step; default 128, with --quick 8.")
@click.option("--rounds", type=click.IntRange(min=1), help="Turns of each; default 3, with --quick 1.")
@click.option("--steps", type=click.IntRange(min=1), help="Timed in a turn; default 8, with --quick 1.")
@output_options
def main(
    data: str, model: str | None, batch: int | None, rounds: int | None, steps: int | None, out: str | None,
    quick: bool, as_json: bool,
) -> None:  # fmt: skip
    """Train on the images of DATA, a folder with train/CLASS/IMAGE and val/CLASS/IMAGE."""
    from knltrain.node.topology import read_node
    from knltrain.runlog.provenance import provenance

    console = Console(json=as_json)
    folder = out_folder(out)
    roots, _ = prepare_formats(data, folder, console)
    model = model or ("alexnet_bn_small" if quick else "alexnet_bn")
    config = step_config(
        model=model, batch=batch or (8 if quick else 128), image_size=None, precision="auto", engine="auto", quick=quick
    )
    rows = measure(
        config, roots, console, workers=WORKERS[:1] if quick else WORKERS, rounds=rounds or (1 if quick else 3),
        steps=steps or (1 if quick else 8),
    )  # fmt: skip
    result = {
        "model": model, "batch": config.global_batch, "image_size": config.image_size, "steps": rows,
        **provenance(read_node()),
    }  # fmt: skip
    show(console, _table(rows))
    finish(result, _figure(rows), folder, console, as_json=as_json)


if __name__ == "__main__":
    main()
