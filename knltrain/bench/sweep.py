"""Speed of a training step over batch sizes and numbers of threads."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from knltrain.bench.process import Process
from knltrain.bench.step import summary
from knltrain.config import EngineName, RunConfig
from knltrain.errors import ConfigError, KnltrainError
from knltrain.files import naming
from knltrain.models import refuse_unbuildable
from knltrain.node.affinity import threads_per_rank
from knltrain.node.topology import read_node
from knltrain.runlog.console import Console
from knltrain.runlog.metrics import write_json
from knltrain.runlog.provenance import provenance
from knltrain.runlog.tables import new_table, shown
from knltrain.training.engine import choose_engine, choose_precision


def sweep(
    config: RunConfig, console: Console, *, batches: Sequence[int], threads: Sequence[int], steps: int, out: Path
) -> dict[str, Any]:
    """Times training steps at every batch with every number of threads, each point in a child process.

    Args:
        config: as for :func:`knltrain.bench.bench`; its batch is replaced.
        console: shows the table as it fills.
        batches: images per step; if empty, the configuration's.
        threads: compute threads; if empty, those of a single rank on this node.
        steps: timed steps of each point.
        out: folder of sweep.json and sweep.png.

    Returns:
        ``points``, by threads and then by batch: the result of ``bench`` for each, or the ``reason`` of an error.

    Raises:
        ConfigError: this machine does not support the configuration.
        KnltrainError: no point was measured.
    """
    node = read_node()
    batches = batches or [config.global_batch]
    threads = threads or [threads_per_rank(node, local_size=1)]
    if max(threads) > len(node.cpus):
        raise ConfigError(f"{max(threads)} threads: this process may use {len(node.cpus)} logical CPUs")
    precision = choose_precision(config.precision, node, force=config.force_bf16, warn=console.warn)
    engine = choose_engine(config.engine, model=config.model, precision=precision, node=node, threads=max(threads))
    config = dataclasses.replace(config, engine=typing.cast(EngineName, engine))  # the same engine at all points
    refuse_unbuildable(config)  # once, not at every point
    out.mkdir(parents=True, exist_ok=True)
    title = f"{config.model}, {config.image_size} px, {precision}, engine {engine}; {node.cpu_model}"
    waiting = ["waiting for data"] if config.data else []
    numbers = ["threads", "batch", "img/s", "step, ms", "quartiles", *waiting, "memory, MiB"]
    table = new_table(title, numbers=numbers)
    points = []
    with shown(console) as show:
        for count in threads:
            for batch in batches:
                point = _measure(dataclasses.replace(config, global_batch=batch), count, steps)
                points.append(point)
                if "reason" in point:
                    console.line(f"{count} threads, batch {batch}: {point['reason']}")
                table.add_row(*_cells(point))
                show(table)
    result = {"steps": steps, "points": points, **provenance(node)}
    write_json(out / "sweep.json", result)
    measured = [point for point in points if "step_s" in point]
    if not measured:
        raise KnltrainError(f"no point could be measured; the reasons are in {out}/sweep.json")
    draw(measured, out / "sweep.png", title)
    return {**result, "out": str(out)}


def _measure(config: RunConfig, threads: int, steps: int) -> dict[str, Any]:
    point: dict[str, Any] = {"threads": threads, "batch": config.global_batch}
    try:
        with Process(config, threads) as process:
            times, peak = process.measure(steps)
            return {**process.settings, "warmup_s": process.warmup_s, **summary(times, process.settings),
                    "peak_rss_mb": peak}  # fmt: skip
    except KnltrainError as error:
        return {**point, "reason": str(error)}


def _cells(point: dict[str, Any]) -> list[str]:
    cells = [str(point["threads"]), str(point["batch"])]
    if "reason" in point:
        return [*cells, "not measured"]
    step = {key: f"{1e3 * value:.1f}" for key, value in point["step_s"].items()}
    waiting = [f"{point['data_fraction']:.1%}"] if "data_fraction" in point else []
    return [*cells, f"{point['images_per_s']:.1f}", step["median"], f"{step['quartile1']}-{step['quartile3']}",
            *waiting, f"{point['peak_rss_mb']:.0f}"]  # fmt: skip


def draw(points: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Plots images/s of the median step to a PNG, with quartiles as error bars.

    The plot has a line for each number of threads, over the batch; with a single batch, one line over the threads.

    Args:
        points: dictionaries with ``threads``, ``batch``, ``images_per_s`` and ``step_s``.
        path: the PNG file.
        title: title of the plot.
    """
    one_batch = len({point["batch"] for point in points}) == 1
    x, line = ("threads", "batch") if one_batch else ("batch", "threads")
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for value in sorted({point[line] for point in points}):
        row = sorted((point for point in points if point[line] == value), key=lambda point: point[x])
        rates = [point["images_per_s"] for point in row]
        below = [rate - point["batch"] / point["step_s"]["quartile3"] for rate, point in zip(rates, row, strict=True)]
        above = [point["batch"] / point["step_s"]["quartile1"] - rate for rate, point in zip(rates, row, strict=True)]
        label = f"{value} thread{'s' if value > 1 else ''}" if line == "threads" else f"batch {value}"
        axes.errorbar([point[x] for point in row], rates, (below, above), fmt="o-", ms=4, capsize=3, label=label)
    ticks = sorted({point[x] for point in points})
    if x == "batch" and ticks[0] * 4 <= ticks[-1]:
        axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel="images a step" if x == "batch" else "threads", ylabel="images/s", ylim=(0, None))
    axes.set_title(title, fontsize=9)
    axes.legend()
    axes.grid(alpha=0.3)
    with naming(path):
        figure.savefig(path, dpi=120)
