"""What the kernels gain on each float32 convolution of a network, and what they round."""

from __future__ import annotations

import statistics
import time
from typing import Any

import click
from _common import finish, out_folder, output_options, show, step_config
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from knltrain.config import RunConfig
from knltrain.runlog.console import Console

_CLASSES = 1000
_RESULTS = ("forward", "input", "weight")
_TURNS = 9  # of a convolution with its batch norm


def errors(convolution: Any) -> dict[str, dict[str, float]]:
    """How far both ways are from float64, on one image as after a ReLU, weights of He's initialisation.

    Returns:
        By result (forward, input, weight) and way (direct: PyTorch's; native: the kernels'), the root of the mean
        square error over that of the values.
    """
    import torch
    import torch.nn.functional as F
    from torch.nn.grad import conv2d_input, conv2d_weight

    from knltrain.models.convolutions import RESULTS
    from knltrain.ops import convgrad

    c = convolution
    torch.manual_seed(0)
    x = torch.randn(1, c.channels, c.height, c.width).relu().to(memory_format=torch.channels_last)
    fan_in = c.weight[1] * c.weight[2] * c.weight[3]
    weight = (torch.randn(c.weight) * (2 / fan_in) ** 0.5).to(memory_format=torch.channels_last)
    dy = torch.randn_like(F.conv2d(x, weight, None, *c.geometry))

    def directly(x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
        return [
            F.conv2d(x, weight, None, *c.geometry),
            conv2d_input(x.shape, weight, dy, *c.geometry),
            conv2d_weight(x, weight.shape, dy, *c.geometry),
        ]

    exact = directly(x.double(), weight.double(), dy.double())
    needs = (c.native().input, c.native().weight, False)
    y = convgrad.forward(x, weight, None, c.geometry, c.native())
    by_kernels = (y, *convgrad.backward(dy, x, weight, None, c.geometry, needs, c.native())[:2])
    return {
        result: {
            way: float((got.double() - true).square().mean().sqrt() / true.square().mean().sqrt())
            for way, got in (("direct", direct), ("native", ours))
        }
        for result, there_is, true, direct, ours in zip(
            RESULTS, c.native(), exact, directly(x, weight, dy), by_kernels, strict=True
        )
        if there_is
    }


def with_batch_norm(convolution: Any, images: int) -> dict[str, float]:
    """Times the kernels' convolution and the batch norm after it, forward, in turns: the medians of both ways.

    Returns:
        ``apart_s``, where the batch norm reads the result once more for its statistics, and ``together_s``, where the
        convolution has taken them.
    """
    import torch

    from knltrain.ops.batchnorm import batch_norm_act
    from knltrain.ops.convgrad import conv2d_and_statistics, forward

    c = convolution
    x = torch.randn(images, c.channels, c.height, c.width).to(memory_format=torch.channels_last)
    weight = torch.randn(c.weight).to(memory_format=torch.channels_last)
    mean, var = torch.zeros(c.weight[0]), torch.ones(c.weight[0])

    def apart() -> None:
        batch_norm_act(forward(x, weight, None, c.geometry, c.native()), var, mean, None, None, training=True)

    def together() -> None:
        y, *known = conv2d_and_statistics(x, weight, mean, c.geometry, c.native())
        batch_norm_act(y, var, mean, None, None, training=True, statistics=(known[0], known[1]))

    ways = {"apart_s": apart, "together_s": together}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    with torch.no_grad():
        for turn in range(_TURNS):
            for way in sorted(ways, reverse=turn % 2 == 1):
                start = time.perf_counter()
                ways[way]()
                seconds[way].append(time.perf_counter() - start)
    return {way: statistics.median(taken) for way, taken in seconds.items()}


def rows_of(config: RunConfig, console: Console) -> list[dict[str, Any]]:
    """Measures every kind of convolution of a network that there are kernels for, in the network's order."""
    from knltrain.models.convolutions import eligible, measure

    rows = []
    kinds: dict[Any, list[str]] = {}
    for path, convolution in eligible(config, _CLASSES).items():
        kinds.setdefault(convolution, []).append(path)
    for convolution, paths in kinds.items():
        console.line(f"{convolution}")
        times, off = measure(convolution, config.global_batch), errors(convolution)
        rows.append(
            {
                "convolution": str(convolution),
                "winograd": convolution.has_winograd(),
                "layers": paths,
                "gflop_per_image": convolution.gflop(1),
                "batch_norm": with_batch_norm(convolution, config.global_batch)
                if convolution.native().forward
                else None,
                **{
                    result: {
                        "direct_s": one.direct,
                        "native_s": one.native,
                        "gain": one.direct / one.native,
                        "images": one.images,
                        **{f"{way}_error": error for way, error in off[result].items()},
                    }
                    for result, one in times.items()
                },
            }
        )
    return rows


def table_of(rows: list[dict[str, Any]], title: str) -> Table:
    """GFLOP/s, counted as direct sums, and errors."""
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("convolution", "", "PyTorch's, GFLOP/s", "kernels'", "gain", "PyTorch's, error", "kernels'"):
        table.add_column(heading, justify="left" if heading in ("convolution", "") else "right")
    for row in rows:
        name = row["convolution"]
        for result in (result for result in _RESULTS if result in row):
            one = row[result]
            work = row["gflop_per_image"] * one["images"]
            table.add_row(name, result, f"{work / one['direct_s']:.0f}", f"{work / one['native_s']:.0f}",
                          f"{one['gain']:.2f}", f"{one['direct_error']:.1e}", f"{one['native_error']:.1e}")  # fmt: skip
            name = ""
    return table


def batch_norms_of(rows: list[dict[str, Any]]) -> Table:
    """Convolution and batch norm forward, and their sum over the network's layers."""
    table = Table(title="with a batch norm after it, forward, ms", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("kernels' convolution", "layers", "statistics apart", "on the way", "gain"):
        table.add_column(heading, justify="left" if heading == "kernels' convolution" else "right")
    totals = [0.0, 0.0]
    for row in (row for row in rows if row["batch_norm"]):
        apart, together = (1e3 * row["batch_norm"][way] for way in ("apart_s", "together_s"))
        count = len(row["layers"])
        totals = [totals[0] + count * apart, totals[1] + count * together]
        table.add_row(row["convolution"], f"{count}", f"{apart:.1f}", f"{together:.1f}", f"{apart / together:.2f}")
    table.add_row("all layers", "", f"{totals[0]:.0f}", f"{totals[1]:.0f}", f"{totals[0] / totals[1]:.2f}")
    return table


def drawing_of(rows: list[dict[str, Any]]) -> Figure:
    """The gain of each result of each convolution."""
    figure = Figure(figsize=(6, 1 + 0.5 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for offset, result in enumerate(_RESULTS):
        places = [index + 0.25 * (offset - 1) for index, row in enumerate(rows) if result in row]
        axis.barh(places, [row[result]["gain"] for row in rows if result in row], height=0.22, label=result)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [row["convolution"].replace(", ", "\n", 1) for row in rows], fontsize=6)
    axis.invert_yaxis()
    axis.set_xlabel("times as fast as PyTorch's")
    axis.legend(fontsize=7)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


@click.command(context_settings={"max_content_width": 110})
@click.option("--model", help="Network; default resnet50, with --quick alexnet_bn_small.")
@click.option("--batch", type=click.IntRange(min=1), help="Images of a micro-batch; default 32, with --quick 8.")
@click.option("--image-size", type=click.IntRange(min=8), help="Pixels; default as knltrain bench.")
@output_options
def main(
    model: str | None, batch: int | None, image_size: int | None, out: str | None, quick: bool, as_json: bool
) -> None:
    """Time every float32 convolution that there is a kernel for, both ways in turns, and compare them with float64.

    KNLTRAIN_ISA=avx2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 shows it as on a processor with AVX2 alone.
    """
    import torch

    from knltrain.node.affinity import threads_per_rank
    from knltrain.node.memory import keep_freed_memory
    from knltrain.node.topology import read_node
    from knltrain.ops.native import isa
    from knltrain.runlog.provenance import provenance

    console, folder = Console(json=as_json), out_folder(out)
    config = step_config(model=model, batch=batch, image_size=image_size, precision="fp32", engine="fused", quick=quick)
    keep_freed_memory()
    node = read_node()
    threads = threads_per_rank(node, local_size=1)
    torch.set_num_threads(threads)
    rows = rows_of(config, console)
    show(console, table_of(rows, f"{config.model}, batch {config.global_batch}, {threads} threads, kernels {isa()}"))
    if any(row["batch_norm"] for row in rows):
        show(console, batch_norms_of(rows))
    result = {"model": config.model, "batch": config.global_batch, "threads": threads, "kernels": isa(), "rows": rows,
              **provenance(node)}  # fmt: skip
    finish(result, drawing_of(rows), folder, console, as_json=as_json)


if __name__ == "__main__":
    main()
