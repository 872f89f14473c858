"""What Winograd's algorithm gains on each convolution of a network, and what it rounds."""

from __future__ import annotations

from typing import Any

import click
from _common import finish, out_folder, output_options, show, step_config
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from knltrain.config import RunConfig
from knltrain.console import Console

_CLASSES = 1000


def errors(convolution: Any) -> dict[str, dict[str, float]]:
    """How far both ways are from float64, on one image as after a ReLU, weights of He's initialisation.

    Returns:
        By result (forward, input, weight) and way (direct, winograd), the root of the mean square error over that of
        the values.
    """
    import torch
    import torch.nn.functional as F
    from torch.nn.grad import conv2d_input, conv2d_weight

    from knltrain.models.convolutions import RESULTS
    from knltrain.ops import winograd

    c = convolution
    torch.manual_seed(0)
    geometry: tuple[Any, ...] = (1, c.padding, 1, c.groups)
    x = torch.randn(1, c.channels, c.height, c.width).relu().to(memory_format=torch.channels_last)
    fan_in = c.weight[1] * c.weight[2] * c.weight[3]
    weight = (torch.randn(c.weight) * (2 / fan_in) ** 0.5).to(memory_format=torch.channels_last)
    dy = torch.randn_like(F.conv2d(x, weight, None, *geometry))

    def directly(x: torch.Tensor, weight: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
        return [
            F.conv2d(x, weight, None, *geometry),
            conv2d_input(x.shape, weight, dy, *geometry),
            conv2d_weight(x, weight.shape, dy, *geometry),
        ]

    exact = directly(x.double(), weight.double(), dy.double())
    by_winograd = [
        winograd.conv2d(x, weight, None, c.padding, c.groups),
        winograd.conv2d_input(dy, weight, c.padding, c.groups),
        winograd.conv2d_weight(x, dy, c.weight, c.padding, c.groups),
    ]
    return {
        result: {
            way: float((got.double() - true).square().mean().sqrt() / true.square().mean().sqrt())
            for way, got in (("direct", direct), ("winograd", ours))
        }
        for result, true, direct, ours in zip(RESULTS, exact, directly(x, weight, dy), by_winograd, strict=True)
    }


def rows_of(config: RunConfig, console: Console) -> list[dict[str, Any]]:
    """Measures every kind of convolution of a network that Winograd's algorithm computes, in the network's order."""
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
                "layers": paths,
                "gflop_per_image": convolution.gflop(1),
                **{
                    result: {
                        "direct_s": one.direct,
                        "winograd_s": one.winograd,
                        "gain": one.direct / one.winograd,
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
    for heading in ("convolution", "", "direct, GFLOP/s", "Winograd", "gain", "direct, error", "Winograd"):
        table.add_column(heading, justify="left" if heading in ("convolution", "") else "right")
    for row in rows:
        for result in ("forward", "input", "weight"):
            one = row[result]
            work = row["gflop_per_image"] * one["images"]
            table.add_row(row["convolution"] if result == "forward" else "", result, f"{work / one['direct_s']:.0f}",
                          f"{work / one['winograd_s']:.0f}", f"{one['gain']:.2f}", f"{one['direct_error']:.1e}",
                          f"{one['winograd_error']:.1e}")  # fmt: skip
    return table


def drawing_of(rows: list[dict[str, Any]]) -> Figure:
    """The gain of each result of each convolution."""
    figure = Figure(figsize=(6, 1 + 0.5 * len(rows)), layout="constrained")
    axis = figure.subplots()
    for offset, result in enumerate(("forward", "input", "weight")):
        places = [index + 0.25 * (offset - 1) for index in range(len(rows))]
        axis.barh(places, [row[result]["gain"] for row in rows], height=0.22, label=result)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_yticks(range(len(rows)), [row["convolution"].replace(", ", "\n", 1) for row in rows], fontsize=6)
    axis.invert_yaxis()
    axis.set_xlabel("times as fast as the direct sum")
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
    """Time every convolution that Winograd's algorithm computes, both ways in turns, and compare them with float64.

    KNLTRAIN_ISA=avx2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 shows it as on a processor with AVX2 alone.
    """
    import torch

    from knltrain.node.affinity import threads_per_rank
    from knltrain.node.memory import keep_freed_memory
    from knltrain.node.topology import read_node
    from knltrain.ops.native import isa
    from knltrain.provenance import provenance

    console, folder = Console(json=as_json), out_folder(out)
    config = step_config(model=model, batch=batch, image_size=image_size, precision="fp32", engine="fused", quick=quick)
    keep_freed_memory()
    node = read_node()
    threads = threads_per_rank(node, local_size=1)
    torch.set_num_threads(threads)
    rows = rows_of(config, console)
    show(console, table_of(rows, f"{config.model}, batch {config.global_batch}, {threads} threads, kernels {isa()}"))
    result = {"model": config.model, "batch": config.global_batch, "threads": threads, "kernels": isa(), "rows": rows,
              **provenance(node)}  # fmt: skip
    finish(result, drawing_of(rows), folder, console, as_json=as_json)


if __name__ == "__main__":
    main()
