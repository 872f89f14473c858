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
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
from _common import finish, out_folder, output_options, show, take_turns
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from knltrain.console import Console
from knltrain.data.manifest import Format
from knltrain.errors import KnltrainError

_OURS, _OTHERS = "#c1440e", "#8a99a8"
_BATCH = 64
_WARMUP_BATCHES = 2


def _knltrain(root: Path, size: int, augment: str) -> Iterator[int]:
    """The loader of training, one decode thread, batches in bf16."""
    import sys

    import torch

    from knltrain.config import AugmentConfig, RunConfig
    from knltrain.data.datasets import open_folder
    from knltrain.data.loader import Loader, Share

    resize = round(size * 256 / 224)
    config = RunConfig(image_size=size, augment=AugmentConfig(name=augment, resize=resize))  # type: ignore[arg-type]
    loader = Loader(open_folder(root, "train"), config, dtype=torch.bfloat16, workers=1)
    for _, labels in loader.training(Share(_BATCH, _BATCH, 0, 1), 0, sys.maxsize):
        yield len(labels)


def _decode_all(root: Path, size: int, augment: str) -> Iterator[int]:
    """The same, every image decoded at its full size before anything is cut out of it."""
    from knltrain.data import loader

    loader._smallest = lambda *_: (0, 0)
    yield from _knltrain(root, size, augment)


def _torchvision(root: Path, size: int, augment: str) -> Iterator[int]:
    """ImageFolder and DataLoader as torchvision's reference training has them, in this process."""
    import torch
    from torchvision import datasets, transforms

    cut = (
        [transforms.RandomResizedCrop(size)]
        if augment == "rrc"
        else [transforms.Resize(round(size * 256 / 224)), transforms.RandomCrop(size)]
    )
    rest = [
        transforms.RandomHorizontalFlip(), transforms.PILToTensor(), transforms.ConvertImageDtype(torch.float),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]  # fmt: skip
    dataset = datasets.ImageFolder(str(root / "train"), transforms.Compose([*cut, *rest]))
    while True:
        for _, labels in torch.utils.data.DataLoader(dataset, _BATCH, shuffle=True, num_workers=0):
            yield len(labels)


def _webdataset(root: Path, size: int, augment: str) -> Iterator[int]:
    """WebDataset's own loader over the same tar files, with torchvision's transforms."""
    import webdataset
    from torchvision import transforms

    cut = transforms.RandomResizedCrop(size) if augment == "rrc" else transforms.RandomCrop(size, pad_if_needed=True)
    seen = transforms.Compose([
        cut, transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])  # fmt: skip
    shards = [str(path) for path in sorted(root.glob("train-*.tar"))]
    dataset = webdataset.WebDataset(shards, shardshuffle=False).shuffle(200).decode("pil").to_tuple("jpg", "cls")
    dataset = dataset.map_tuple(seen, lambda label: label).batched(_BATCH, partial=True)
    while True:
        for _, labels in dataset:
            yield len(labels)


# Name: what reads, of what, and how it is cut.
CONTESTANTS: dict[str, tuple[Callable[[Path, int, str], Iterator[int]], str, str]] = {
    "raw, crop-flip": (_knltrain, "raw", "crop-flip"),
    "tar of 256 px, crop-flip": (_knltrain, "tar", "crop-flip"),
    "WebDataset, tar of 256 px, crop-flip": (_webdataset, "tar", "crop-flip"),
    "folder, rrc": (_knltrain, "folder", "rrc"),
    "tar of originals, rrc": (_knltrain, "originals", "rrc"),
    "tar of originals, all decoded, rrc": (_decode_all, "originals", "rrc"),
    "torchvision, folder, rrc": (_torchvision, "folder", "rrc"),
    "WebDataset, tar of originals, rrc": (_webdataset, "originals", "rrc"),
}


def _serve(pipe: Connection, name: str, root: Path, size: int, cpu: int) -> None:
    """A contestant's process: says ``None`` or why it does not run, then reads batches whenever it is asked."""
    os.sched_setaffinity(0, [cpu])
    make, _, augment = CONTESTANTS[name]
    try:
        batches = make(root, size, augment)
        next(batches)
    except (ImportError, RuntimeError) as error:
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
    ran = [row for row in rows if "rounds" in row]
    figure = Figure(figsize=(9, 1 + 0.35 * len(ran)), layout="constrained")
    axis = figure.subplots()
    colours = [_OURS if CONTESTANTS[row["name"]][0] is _knltrain else _OTHERS for row in ran]
    axis.barh([row["name"] for row in ran], [row["images_per_s"] for row in ran], color=colours)
    for place, row in enumerate(ran):
        axis.text(row["images_per_s"], place, f"  {row['images_per_s']:,.0f}", va="center")
    axis.set_xscale("log")
    axis.set_xlabel("img/s on one core")
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    return figure


@click.command(context_settings={"max_content_width": 110})
@click.argument("data")
@click.option("--image-size", type=click.IntRange(min=8), default=224, show_default=True, help="Pixels of the batch.")
@click.option("--rounds", type=click.IntRange(min=1), help="Turns of each; default 5, with --quick 2.")
@click.option(
    "--batches", type=click.IntRange(min=1), help=f"Of {_BATCH} images in a turn; default 10, with --quick 1."
)
@output_options
def main(
    data: str, image_size: int, rounds: int | None, batches: int | None, out: str | None, quick: bool, as_json: bool
) -> None:
    """Time loaders on the images of DATA, a folder with train/CLASS/IMAGE and val/CLASS/IMAGE."""
    from knltrain.node.topology import read_node
    from knltrain.prepare import prepare
    from knltrain.provenance import provenance

    console = Console(json=as_json)
    folder, root = out_folder(out), Path(data)
    if not (root / "train").is_dir():
        raise KnltrainError(f"{root / 'train'}: no such folder")
    roots, prepared = {"folder": root}, {}
    packed: tuple[tuple[str, Format, int], ...] = (("raw", "raw", 256), ("tar", "tar", 256), ("originals", "tar", 0))
    for name, kind, size in packed:
        roots[name] = folder / name
        console.line(f"preparing {name}")
        prepared[name] = prepare(
            root,
            roots[name],
            console,
            format=kind,
            size=size,
            workers=None,
            on_bad="fail",  # type: ignore[arg-type]
        )
    rows = measure(
        roots, image_size, console, rounds=rounds or (2 if quick else 5), batches=batches or (1 if quick else 10)
    )
    result = {
        "image_size": image_size,
        "batch": _BATCH,
        "loaders": rows,
        "prepared": prepared,
        **provenance(read_node()),
    }
    show(console, _table(rows))
    finish(result, _figure(rows), folder, console, as_json=as_json)


if __name__ == "__main__":
    main()
