"""What a data set of ImageNet's size costs a process before its first image: opening the index, and shuffling."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import click
from _common import finish, out_folder, output_options, show
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from knltrain.runlog.console import Console

_IMAGENET = 1_281_167
_SAMPLE_BYTES = 1024  # what is between two samples' beginnings; nothing is there but a hole in the file

# Measured in a process that has loaded what every run has: NumPy, and the modules of the loader.
_OPEN = """
import sys, time
from pathlib import Path
from knltrain.data import order
from knltrain.data.tar import Tar
def mib(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) / 1024
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew: importing had one of its own
before, start = mib("VmRSS"), time.perf_counter()
tar = Tar(Path(sys.argv[1]), "train")
opened = time.perf_counter()
order.permutation(0, 0, len(tar))
shuffled = time.perf_counter()
print(len(tar), opened - start, shuffled - opened, mib("VmHWM") - before)
"""


def generate(folder: Path, count: int) -> None:
    """A tar file of ``count`` samples that takes no room on the disk, and the index of it."""
    import numpy as np

    from knltrain.data import tar_index

    path = folder / "train-00000.tar"
    with open(path, "wb") as file:
        file.truncate(count * _SAMPLE_BYTES)
    at = np.arange(count)
    offsets, sizes = at * _SAMPLE_BYTES + tarfile.BLOCKSIZE, np.full(count, 400)  # behind a header each
    index = tar_index.Index(tar_index.TarIndex(np.zeros(count, np.int32), offsets, sizes, at % 1000), ())
    names, stamps = np.array([path.name]), tar_index._stamps([path])
    where = folder / f"train-index-v{tar_index._VERSION}.npz"
    if not tar_index._write_index(where, [path], names, stamps, index):
        raise OSError(f"{folder}: the index could not be written")


def measure(count: int, rounds: int) -> list[dict[str, float]]:
    """Opens an index of ``count`` samples in a new process for each round.

    Returns:
        For each ``images``, ``open_s``, ``shuffle_s`` and ``mib``, the memory that both added at its peak.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder), count)
        for _ in range(rounds):
            command = [sys.executable, "-c", _OPEN, folder]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            rows.append(dict(zip(("images", "open_s", "shuffle_s", "mib"), map(float, printed), strict=True)))
    return rows


@click.command(context_settings={"max_content_width": 110})
@click.option("--images", type=click.IntRange(min=1), default=_IMAGENET, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), help="Processes that open it; default 5, with --quick 1.")
@output_options
def main(images: int, rounds: int | None, out: str | None, quick: bool, as_json: bool) -> None:
    """Time opening the index of a generated data set, and the first shuffle of it."""
    from knltrain.node.topology import read_node
    from knltrain.runlog.provenance import provenance

    console = Console(json=as_json)
    folder = out_folder(out)
    rows = measure(images, rounds or (1 if quick else 5))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in (f"{images:,} images", "median", "lowest", "highest"):
        table.add_column(heading, justify="left" if "images" in heading else "right")
    for name, key, unit in (("index opened", "open_s", "s"), ("shuffled", "shuffle_s", "s"), ("memory", "mib", "MiB")):
        values = [row[key] for row in rows]
        numbers = (statistics.median(values), min(values), max(values))
        table.add_row(name, *(f"{x:,.0f} {unit}" if unit == "MiB" else f"{x:.3f} {unit}" for x in numbers))
    show(console, table)
    figure = Figure(figsize=(6, 2.2), layout="constrained")
    axis = figure.subplots()
    for place, key in enumerate(("open_s", "shuffle_s")):
        axis.scatter([row[key] for row in rows], [place] * len(rows), color="#c1440e")
    axis.set_yticks([0, 1], ["index opened", "shuffled"])
    axis.set_ylim(1.5, -0.5)
    axis.set_xlim(left=0)
    axis.set_xlabel(f"seconds, {images:,} images")
    axis.spines[["top", "right"]].set_visible(False)
    result: dict[str, Any] = {"images": images, "rounds": rows, **provenance(read_node())}
    finish(result, figure, folder, console, as_json=as_json)


if __name__ == "__main__":
    main()
