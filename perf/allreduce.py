"""How long an all-reduce takes between the ranks, by message size and type, and at which bandwidth.

    torchrun --nproc-per-node 2 perf/allreduce.py
    mpiexec -n 2 python perf/allreduce.py --dtypes bf16

Bandwidths are those of nccl-tests (doc/PERFORMANCE.md there): with S bytes in t seconds over n ranks,
``algbw = S / t`` and ``busbw = algbw * 2 (n - 1) / n``, which is what each rank must at least send and receive, so that
it can be compared with the speed of the link whatever n is.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import click
from _common import finish, out_folder, output_options, show
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from knltrain.console import Console
from knltrain.errors import ConfigError, KnltrainError

_BYTES = {"fp32": 4, "bf16": 2}
_SIZES = tuple(4**power for power in range(6, 15))  # 4 KiB to 256 MiB
_QUICK_SIZES = (4**6, 4**8, 4**10)
_WARMUP = 2


def bandwidth(size: int, seconds: float, ranks: int) -> tuple[float, float]:
    """Algorithm and bus bandwidth of an all-reduce of ``size`` bytes, in GB/s (10^9)."""
    algbw = 1e-9 * size / seconds
    return algbw, algbw * 2 * (ranks - 1) / ranks


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--sizes", help="Message sizes in bytes, separated by commas; default 4 KiB to 256 MiB, fourfold.")
@click.option("--dtypes", default="fp32,bf16", show_default=True, help="Types, separated by commas.")
@click.option("--repeats", type=click.IntRange(min=1), help="Calls timed of each; default 20, with --quick 5.")
@output_options
def main(sizes: str | None, dtypes: str, repeats: int | None, out: str | None, as_json: bool, quick: bool) -> None:
    """Time all-reduces over the ranks that torchrun or mpiexec started."""
    chosen = _sizes(sizes) if sizes else _QUICK_SIZES if quick else _SIZES
    types = dtypes.split(",")
    if unknown := set(types) - set(_BYTES):
        raise ConfigError(f"--dtypes: no {', '.join(sorted(unknown))}; there are {', '.join(_BYTES)}")
    repeats = repeats or (5 if quick else 20)

    import torch
    import torch.distributed as dist

    from knltrain.comm.group import Group
    from knltrain.node.affinity import threads_per_rank
    from knltrain.node.ranks import discover
    from knltrain.node.topology import read_node
    from knltrain.provenance import provenance

    ranks, node = discover(), read_node()
    threads = threads_per_rank(node, ranks.local_size)
    torch.set_num_threads(threads)
    group = Group(ranks)
    console = Console(json=as_json, silent=not group.is_first)
    if group.world_size == 1:
        # So that the call itself is timed: nothing travels.
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        console.warn("one rank: nothing travels, these are the times of the calls alone; start several with torchrun")
    console.line(
        f"{group.world_size} ranks, {ranks.local_size} on this node, {threads} threads each, {dist.get_backend()}"
    )
    with group.names_lost_ranks():
        rows = [_measure(size, name, repeats, group) for name in types for size in chosen]
    dist.destroy_process_group()
    if not group.is_first:
        return
    result = {
        "world_size": group.world_size,
        "ranks_per_node": ranks.local_size,
        "threads": threads,
        "backend": group.backend.name if group.backend else "gloo",
        "repeats": repeats,
        "rows": rows,
        **provenance(node),
    }
    folder = out_folder(out)
    show(console, _table(rows))
    finish(result, _figure(result), folder, console, as_json=as_json)


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in text.split(","))
    except ValueError:
        raise ConfigError(f"--sizes {text}: bytes, separated by commas, for example 4096,1048576") from None
    if bad := [size for size in sizes if size < 4 or size % 4]:
        raise ConfigError(f"--sizes: {bad[0]} is not a positive multiple of 4 bytes")
    return sizes


def _measure(size: int, name: str, repeats: int, group: Any) -> dict[str, Any]:
    """Times one size and type; the time of a call is that of its slowest rank."""
    import torch
    import torch.distributed as dist

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
    tensor = torch.empty(size // _BYTES[name], dtype=dtype)
    seconds = torch.empty(_WARMUP + repeats, dtype=torch.float64)
    for repeat in range(_WARMUP + repeats):
        tensor.fill_(group.is_first)  # a sum that bf16 holds exactly, however many ranks there are
        group.barrier()
        start = time.perf_counter()
        dist.all_reduce(tensor)
        seconds[repeat] = time.perf_counter() - start
    if (tensor != 1).any():
        raise KnltrainError(
            f"{name}, {size} bytes: the sum over {group.world_size} ranks is wrong; do not train on this"
        )
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    timed = sorted(seconds[_WARMUP:].tolist())
    median = statistics.median(timed)
    algbw, busbw = bandwidth(size, median, group.world_size)
    return {"dtype": name, "bytes": size, "min_s": timed[0], "median_s": median, "max_s": timed[-1],
            "algbw_gb_per_s": algbw, "busbw_gb_per_s": busbw}  # fmt: skip


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("type")
    for name in ("MiB", "elements", "min, ms", "median", "max", "algbw, GB/s", "busbw, GB/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["dtype"],
            f"{row['bytes'] / 2**20:.3g}",
            f"{row['bytes'] // _BYTES[row['dtype']]:,}",
            *(f"{1e3 * row[name]:.3f}" for name in ("min_s", "median_s", "max_s")),
            *(f"{row[name]:.3g}" for name in ("algbw_gb_per_s", "busbw_gb_per_s")),
        )
    return table


def _figure(result: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(f"all-reduce, {result['world_size']} ranks, {result['ranks_per_node']} a node, {result['backend']}")
    times, rates = figure.subplots(1, 2)
    for name in dict.fromkeys(row["dtype"] for row in result["rows"]):
        rows = sorted((row for row in result["rows"] if row["dtype"] == name), key=lambda row: row["bytes"])
        sizes = [row["bytes"] / 2**20 for row in rows]
        (line,) = times.plot(sizes, [1e3 * row["median_s"] for row in rows], "o-", ms=4, label=name)
        times.fill_between(sizes, [1e3 * row["min_s"] for row in rows], [1e3 * row["max_s"] for row in rows],
                           color=line.get_color(), alpha=0.2, lw=0)  # fmt: skip
        rates.plot(sizes, [row["busbw_gb_per_s"] for row in rows], "o-", ms=4, label=name)
    times.set(xlabel="message, MiB", ylabel="ms: median, and from fastest to slowest call", xscale="log", yscale="log")
    rates.set(xlabel="message, MiB", ylabel="bus bandwidth, GB/s", xscale="log", ylim=(0, None))
    for axes in (times, rates):
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


if __name__ == "__main__":
    main()
