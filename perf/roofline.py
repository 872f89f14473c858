"""How far each layer of a training step is from what this machine can do, in milliseconds.

    python perf/roofline.py --model resnet50 --batch 32
    python perf/roofline.py --kernels                       the optimizer's and the input's kernels instead

Two ceilings are measured, before and after the step: the rate of large matrix products and convolutions, and the
bandwidth of a copy. No operation can be faster than its arithmetic at the one, or than its operands, each read or
written once, at the other (Williams, Waterman and Patterson 2009). One training step is run with every operation that
PyTorch dispatches, forward, backward and optimizer, timed again on its own arguments, and booked on the layer that it
belongs to. What an operation takes beyond its bound is lost; layers are sorted by that. Operands that are still in the
cache can make an operation faster than its bound, and so can Winograd's algorithm: convolutions count as direct sums.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click
import torch
import torch.nn.functional as F
from _common import WARMUP_STEPS, build_step, finish, out_folder, output_options, show, step_config, step_options
from _kernels import draw_kernels, measure_kernels, table_of_kernels
from _operations import InStep, Operation, Timing, timed
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from knltrain.errors import ConfigError
from knltrain.node.affinity import threads_per_rank
from knltrain.node.memory import keep_freed_memory
from knltrain.node.topology import read_node
from knltrain.runlog.console import Console

if TYPE_CHECKING:
    from knltrain.config import RunConfig

_SHOWN = 25
_OURS, _OTHERS = "#c1440e", "#8a99a8"


@dataclass
class Ceilings:
    """What the machine does at best.

    Attributes:
        gflops: matrix products and convolutions, GFLOP/s by type.
        gb_per_s: copy, bytes read and bytes written together, GB/s.
    """

    gflops: dict[torch.dtype, float]
    gb_per_s: float

    def bound_s(self, flop: float, dtype: torch.dtype, num_bytes: float) -> float:
        """The least time for so much arithmetic and so much traffic."""
        return max(flop / (1e9 * self.gflops.get(dtype, self.gflops[torch.float32])), num_bytes / (1e9 * self.gb_per_s))


def better(one: Ceilings, other: Ceilings) -> Ceilings:
    """The higher of each: nothing makes a machine faster than it is, and other processes make it slower."""
    gflops = {dtype: max(rate, other.gflops[dtype]) for dtype, rate in one.gflops.items()}
    return Ceilings(gflops, max(one.gb_per_s, other.gb_per_s))


def fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of five runs."""
    return min(timed(work, 5))


def measure_ceilings(*, quick: bool) -> Ceilings:
    """Measures both ceilings on all threads, each as the best of a few shapes."""
    gflops = {}
    sizes = (256, 512) if quick else (1024, 2048, 4096)
    for dtype in (torch.float32, torch.bfloat16):
        rates = []
        for size in sizes:
            a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
            rates.append(2 * size**3 / fastest(lambda a=a, b=b: a @ b))  # type: ignore[misc]
        for channels, pixels in ((64, 56), (128, 28), (256, 14)):
            x = torch.randn(2 if quick else 32, channels, pixels, pixels)
            x = x.to(dtype, memory_format=torch.channels_last)
            w = torch.randn(channels, channels, 3, 3).to(dtype, memory_format=torch.channels_last)
            flop = 2 * x.numel() * w[0].numel()
            rates.append(flop / fastest(lambda x=x, w=w: F.conv2d(x, w, padding=1)))  # type: ignore[misc]
        gflops[dtype] = max(rates) / 1e9
    rates = []
    for mib in (16,) if quick else (64, 256, 512):
        source, target = torch.ones(2, mib * 2**18).unbind()
        rates.append(2 * source.nbytes / fastest(lambda s=source, t=target: t.copy_(s)))  # type: ignore[misc]
    return Ceilings(gflops, max(rates) / 1e9)


def summed(operations: Sequence[Operation], ceilings: Ceilings, *keys: str) -> list[dict[str, Any]]:
    """Adds up operations that agree in ``keys``: seconds, bound, what is lost, and rates; the most lost first."""
    groups: dict[tuple[str, ...], list[Operation]] = defaultdict(list)
    for operation in operations:
        groups[tuple(getattr(operation, key) for key in keys)].append(operation)
    rows = []
    for group, members in groups.items():
        seconds = sum(one.seconds for one in members)
        bound_s = sum(ceilings.bound_s(one.flop, one.dtype, one.num_bytes) for one in members)
        rows.append(
            {
                **dict(zip(keys, group, strict=True)),
                "seconds": seconds,
                "bound_s": bound_s,
                "lost_s": seconds - bound_s,
                "gflop_per_s": sum(one.flop for one in members) / seconds / 1e9,
                "gb_per_s": sum(one.num_bytes for one in members) / seconds / 1e9,
            }
        )
    return sorted(rows, key=lambda row: -row["lost_s"])


def measure_step(config: RunConfig, console: Console, *, steps: int) -> tuple[dict[str, Any], list[Operation]]:
    """Times whole steps, in turn with steps in which the products are timed, then every operation of one step.

    Returns:
        What was measured, ``step_s`` (median), ``products_s`` (convolutions and matrix products within a step, median)
        and ``operations_s`` (all operations, one by one); and the operations.

    Raises:
        ConfigError: an engine whose operations cannot be told apart.
    """
    step = build_step(config)
    if step.engine.name not in ("eager", "fused"):
        raise ConfigError(f"engine {step.engine.name}: its operations are not PyTorch's; take eager or fused")
    console.line(str(step))
    for _ in range(WARMUP_STEPS):
        step()
    seconds, products = [], []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
        with InStep() as in_step:
            step()
        products.append(in_step.seconds)
    with Timing(step.engine.model) as timing:
        step()
    step_s, products_s = statistics.median(seconds), statistics.median(products)
    result = {
        **step.describe(),
        "step_s": step_s,
        "products_s": products_s,
        "step_to_products": step_s / products_s,
        "operations_s": sum(one.seconds for one in timing.operations),
    }
    return result, timing.operations


def _table(title: str, rows: Sequence[dict[str, Any]], keys: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for key in keys:
        table.add_column(key, no_wrap=True)
    for heading in ("ms", "bound, ms", "lost, ms", "GFLOP/s", "GB/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        milliseconds = (f"{1e3 * row[key]:.2f}" for key in ("seconds", "bound_s", "lost_s"))
        gflops = f"{row['gflop_per_s']:.0f}" if row["gflop_per_s"] else ""
        table.add_row(*(row[key] for key in keys), *milliseconds, gflops, f"{row['gb_per_s']:.1f}")
    return table


def _figure(result: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    kinds, layers = figure.subplots(1, 2)
    rows = sorted(result["kinds"], key=lambda row: -row["seconds"])
    names = [f"{row['kind']}, {row['part']}" for row in rows]
    kinds.barh(names, [1e3 * row["seconds"] for row in rows], color=_OTHERS, label="measured")
    kinds.barh(names, [1e3 * row["bound_s"] for row in rows], color=_OURS, height=0.35, label="bound")
    kinds.set_xlabel("ms of a step")
    kinds.legend(loc="lower right")
    rows = result["layers"][:_SHOWN]
    layers.barh([f"{row['layer']}: {row['kind']}, {row['part']}" for row in rows],
                [1e3 * row["lost_s"] for row in rows], color=_OTHERS)  # fmt: skip
    layers.set_xlabel("ms beyond the bound")
    for axis in (kinds, layers):
        axis.invert_yaxis()
        axis.tick_params(axis="y", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{result['model']}, batch {result['batch']}, {result['precision']}, engine {result['engine']}: "
                    f"{1e3 * result['step_s']:.0f} ms a step")  # fmt: skip
    return figure


@click.command(context_settings={"max_content_width": 110})
@click.option("--kernels", is_flag=True, help="Measure the LARS step and the input's normalisation in place of layers.")
@step_options
@output_options
def main(kernels: bool, steps: int | None, out: str | None, as_json: bool, quick: bool, **asked: Any) -> None:
    """Say, layer by layer, how far a training step is from what this machine can do."""
    console, folder = Console(json=as_json), out_folder(out)
    config = step_config(quick=quick, **asked)
    keep_freed_memory()
    torch.set_num_threads(threads_per_rank(read_node(), local_size=1))
    ceilings = measure_ceilings(quick=quick)
    steps = steps or (2 if quick else 5)
    if kernels:
        result = measure_kernels(ceilings.gb_per_s, console, rounds=steps, quick=quick)
        figure, tables = draw_kernels(result), [table_of_kernels(result)]
    else:
        result, operations = measure_step(config, console, steps=steps)
        ceilings = better(ceilings, measure_ceilings(quick=quick))
        result["layers"] = summed(operations, ceilings, "layer", "kind", "part")
        result["kinds"] = summed(operations, ceilings, "kind", "part")
        figure = _figure(result)
        tables = [
            _table("by kind", result["kinds"], ("kind", "part")),
            _table(f"the {_SHOWN} layers that lose most", result["layers"][:_SHOWN], ("layer", "kind", "part")),
        ]
    show(console, *tables)
    rates = {str(dtype).removeprefix("torch."): rate for dtype, rate in ceilings.gflops.items()}
    result["ceilings"] = {"gflop_per_s": rates, "copy_gb_per_s": ceilings.gb_per_s}
    console.line("ceilings: " + ", ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in rates.items())
                 + f", copy {ceilings.gb_per_s:.1f} GB/s, read and write")  # fmt: skip
    if not kernels:
        console.line(
            f"step {1e3 * result['step_s']:.1f} ms, of which convolutions and matrix products "
            f"{1e3 * result['products_s']:.1f} ms: it takes {result['step_to_products']:.2f} times these; "
            f"all operations one by one, each at its fastest: {1e3 * result['operations_s']:.1f} ms"
        )
    finish(result, figure, folder, console, as_json=as_json)


if __name__ == "__main__":
    main()
