"""What bf16 gradients lose where PyTorch has no bf16 of oneDNN, and what computing them in float32 costs."""

from __future__ import annotations

import statistics
import time
from typing import Any

import click
from _common import finish, out_folder, output_options, show
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from knltrain.runlog.console import Console

_IMAGES = (64, 256, 512, 1024)
_WAYS = ("PyTorch, bf16", "engine fused, bf16", "PyTorch, fp32")


def measure(images: int, rounds: int) -> dict[str, Any]:
    """A 3x3 convolution, 16 to 32 channels, of 8 x 8 pixels, forward and backward, in each way in turns.

    Inputs and gradients are of one sign, as behind a ReLU, the case in which sums grow the most.

    Returns:
        For each way: ``error``, the norm of the weight gradient's difference from float64 over its norm; ``norm``, its
        norm over the true one; ``seconds``, a list.
    """
    import torch
    import torch.nn.functional as F

    from knltrain.ops.convgrad import conv2d

    torch.manual_seed(0)
    x, weight = torch.rand(images, 16, 8, 8).bfloat16(), torch.rand(32, 16, 3, 3).bfloat16()
    dy = torch.rand(images, 32, 8, 8).bfloat16()
    exact = torch.nn.grad.conv2d_weight(x.double(), weight.shape, dy.double(), padding=1)
    ways = {
        _WAYS[0]: (torch.bfloat16, lambda x, weight: F.conv2d(x, weight, padding=1)),
        _WAYS[1]: (torch.bfloat16, lambda x, weight: conv2d(x, weight, padding=(1, 1))),
        _WAYS[2]: (torch.float32, lambda x, weight: F.conv2d(x, weight, padding=1)),
    }
    result: dict[str, Any] = {name: {"seconds": []} for name in ways}
    for _ in range(rounds + 1):
        for name, (dtype, convolve) in ways.items():
            given = [t.to(dtype, memory_format=torch.channels_last).requires_grad_() for t in (x, weight)]
            cotangent = dy.to(dtype, memory_format=torch.channels_last)
            start = time.perf_counter()
            _, got = torch.autograd.grad(convolve(*given), given, cotangent)
            result[name]["seconds"].append(time.perf_counter() - start)
            result[name]["error"] = float((got.double() - exact).norm() / exact.norm())
            result[name]["norm"] = float(got.double().norm() / exact.norm())
    for row in result.values():
        del row["seconds"][0]  # the first allocates and chooses primitives
    return {"images": images, **result}


@click.command(context_settings={"max_content_width": 110})
@click.option("--rounds", type=click.IntRange(min=1), help="Timed turns of each way; default 7, with --quick 2.")
@output_options
def main(rounds: int | None, out: str | None, quick: bool, as_json: bool) -> None:
    """Compare bf16 weight gradients with float64, by images in a micro-batch, and time them.

    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 shows it as on a processor with AVX2 alone.
    """
    from knltrain.node.topology import read_node
    from knltrain.ops.bf16 import onednn_computes_bf16
    from knltrain.runlog.provenance import provenance

    console = Console(json=as_json)
    folder = out_folder(out)
    rows = [measure(images, rounds or (2 if quick else 7)) for images in (_IMAGES[:1] if quick else _IMAGES)]
    title = f"oneDNN computes bf16: {'yes' if onednn_computes_bf16() else 'no'}"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("images", "", "error", "norm / true", "ms"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in rows:
        for name in _WAYS:
            of = row[name]
            milliseconds = f"{1e3 * statistics.median(of['seconds']):.1f}"
            table.add_row(str(row["images"]), name, f"{of['error']:.2%}", f"{of['norm']:.3f}", milliseconds)
    show(console, table)
    figure = Figure(figsize=(5, 3), layout="constrained")
    axis = figure.subplots()
    for name in _WAYS:
        axis.loglog([row["images"] for row in rows], [100 * row[name]["error"] for row in rows], "o-", label=name)
    axis.set_xlabel("images in a micro-batch")
    axis.set_ylabel("error of the weight gradient, %")
    axis.legend()
    axis.spines[["top", "right"]].set_visible(False)
    result = {"onednn_computes_bf16": onednn_computes_bf16(), "rows": rows, **provenance(read_node())}
    finish(result, figure, folder, console, as_json=as_json)


if __name__ == "__main__":
    main()
