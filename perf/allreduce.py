"""How long an all-reduce takes between the ranks, by back end, message size and type, and at which bandwidth.

    torchrun --nproc-per-node 2 perf/allreduce.py
    mpiexec -n 2 python perf/allreduce.py --dtypes bf16

Every back end that is there takes turns with the others in the same processes: gloo, ccl, and beside ccl a program that
is nothing but oneCCL (ccl_allreduce.cpp, compiled here with g++; one process a rank, on that rank's cores, with its
environment). Each call is in place and begins when a barrier of the same back end has ended.

Bandwidths are those of nccl-tests (doc/PERFORMANCE.md there): with S bytes in t seconds over n ranks,
``algbw = S / t`` and ``busbw = algbw * 2 (n - 1) / n``, which is what each rank must at least send and receive, so that
it can be compared with the speed of the link whatever n is.

At the largest size it is also seen what computing loses: matrix products by all compute threads run until the sum has
arrived, and those that are missing are the time that communication took from them.
"""

from __future__ import annotations

import contextlib
import select
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from _common import finish, out_folder, output_options, show
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from knltrain.errors import ConfigError, KnltrainError
from knltrain.runlog.console import Console

_BYTES = {"fp32": 4, "bf16": 2}
_SIZES = tuple(4**power for power in range(1, 15))  # 4 B to 256 MiB
_QUICK_SIZES = (4**6, 4**8, 4**10)
_ELEMENTS = 25_600_000  # ResNet-50's gradient
_WARMUP = 2
_ROUNDS = 4
_CEILING = "oneCCL alone"
_COMMAND_TIMEOUT_S = 120.0
_PRODUCT = 192  # rows of the matrices: a product takes some 50 us of a core, from its caches
_PRODUCTS = 40

# Times so many calls on so many elements of a type, after those that are not timed; seconds of each call on this rank.
Calls = Callable[[str, int, int], list[float]]


def bandwidth(size: int, seconds: float, ranks: int) -> tuple[float, float]:
    """Algorithm and bus bandwidth of an all-reduce of ``size`` bytes, in GB/s (10^9)."""
    algbw = 1e-9 * size / seconds
    return algbw, algbw * 2 * (ranks - 1) / ranks


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--sizes", help="Message sizes in bytes, separated by commas; default 4 B to 256 MiB and ResNet-50's.")
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
    from knltrain.launch.placement import bind_rank
    from knltrain.node.binding import running_on

    place = bind_rank()  # before torch is loaded

    import torch
    import torch.distributed as dist

    from knltrain.comm.group import Group
    from knltrain.runlog.provenance import provenance

    ranks, plan = place.ranks, place.plan
    torch.set_num_threads(plan.threads)
    with contextlib.ExitStack() as cleanup:
        with running_on(plan.comm):
            group = Group(ranks)
        cleanup.callback(lambda: dist.is_initialized() and dist.destroy_process_group())
        console = Console(json=as_json, silent=not group.is_first)
        for problem in place.warnings:
            console.warn(problem)
        if group.world_size == 1:
            # One rank times the call itself: nothing is communicated.
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group("gloo", store=store, rank=0, world_size=1)
            console.warn("one rank: nothing is communicated, these are the times of the calls only; start several")
        backends: dict[str, Calls] = {}
        if group.backend and group.backend.name == "ccl":
            backends["ccl"] = _torch_calls(None)
            with running_on(plan.comm):
                backends["gloo"] = _torch_calls(dist.new_group(backend="gloo"))
            try:
                backends[_CEILING] = cleanup.enter_context(_program(group))
            except _NoProgramError as reason:
                console.warn(f"without {_CEILING}: {reason}")
        else:
            backends["gloo"] = _torch_calls(None)
            if group.backend and group.backend.note:
                console.warn(group.backend.note)
        console.line(
            f"{group.world_size} ranks, {ranks.local_size} on this node, {plan.threads} threads each; "
            f"in turns: {', '.join(backends)}"
        )
        rows = []
        with group.report_lost_ranks():
            for name in types:
                counts = {size // _BYTES[name] for size in chosen} | (set() if sizes or quick else {_ELEMENTS})
                for count in sorted(counts):
                    rows += _measure(backends, name, count, repeats, group.world_size)
            beside = _beside_computing(max(chosen), repeats)
    if not group.is_first:
        return
    result = {
        "world_size": group.world_size,
        "ranks_per_node": ranks.local_size,
        "threads": plan.threads,
        "backends": list(backends),
        "transport": group.backend.transport if group.backend else "none",
        "oneccl": group.backend.version if "ccl" in backends and group.backend else None,
        "repeats": repeats,
        "rows": rows,
        "beside_computing": {"backend": next(iter(backends)), "bytes": max(chosen), **beside},
        **provenance(place.node),
    }
    folder = out_folder(out)
    show(console, _table(rows, list(backends)))
    console.line(
        f"{max(chosen) / 2**20:.3g} MiB in float32 take {1e3 * beside['seconds']:.1f} ms beside computing, which loses "
        f"{1e3 * beside['computing_lost_s']:.1f} ms by it"
    )
    finish(result, _figure(result), folder, console, as_json=as_json)


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in text.split(","))
    except ValueError:
        raise ConfigError(f"--sizes {text}: bytes, separated by commas, for example 4096,1048576") from None
    if bad := [size for size in sizes if size < 4 or size % 4]:
        raise ConfigError(f"--sizes: {bad[0]} is not a positive multiple of 4 bytes")
    return sizes


def _measure(backends: dict[str, Calls], name: str, count: int, repeats: int, world_size: int) -> list[dict[str, Any]]:
    """Times one size and type, back ends in turns; the time of a call is that of its slowest rank."""
    import torch
    import torch.distributed as dist

    rounds = min(_ROUNDS, repeats)
    seconds: dict[str, list[float]] = {backend: [] for backend in backends}
    for turn in range(rounds):
        for backend, calls in backends.items():
            mine = torch.tensor(calls(name, count, repeats * (turn + 1) // rounds - repeats * turn // rounds))
            dist.all_reduce(mine, dist.ReduceOp.MAX)
            seconds[backend] += mine.tolist()
    rows = []
    for backend, timed in seconds.items():
        timed.sort()
        size, median = count * _BYTES[name], statistics.median(timed)
        algbw, busbw = bandwidth(size, median, world_size)
        rows.append({"backend": backend, "dtype": name, "bytes": size, "min_s": timed[0], "median_s": median,
                     "max_s": timed[-1], "algbw_gb_per_s": algbw, "busbw_gb_per_s": busbw})  # fmt: skip
    return rows


def _beside_computing(size: int, repeats: int) -> dict[str, float]:
    """All-reduces of the first back end in float32 while this rank computes; medians, averaged over the ranks."""
    import torch
    import torch.distributed as dist

    tensor, matrix = torch.zeros(size // 4), torch.ones(_PRODUCT, _PRODUCT)
    result = torch.empty_like(matrix)

    def products_s() -> float:
        start = time.perf_counter()
        for _ in range(_PRODUCTS):
            torch.mm(matrix, matrix, out=result)
        return (time.perf_counter() - start) / _PRODUCTS

    products_s()
    seconds, lost = [], []
    for _ in range(_WARMUP + repeats):
        before_s = products_s()
        dist.barrier()
        start, count = time.perf_counter(), 0
        work = dist.all_reduce(tensor, async_op=True)
        assert work is not None
        while not work.is_completed():
            torch.mm(matrix, matrix, out=result)
            count += 1
        seconds.append(time.perf_counter() - start)
        work.wait()
        dist.barrier()
        lost.append(seconds[-1] - count * (before_s + products_s()) / 2)
    medians = torch.tensor([statistics.median(seconds[_WARMUP:]), max(0.0, statistics.median(lost[_WARMUP:]))])
    dist.all_reduce(medians)
    both = (medians / dist.get_world_size()).tolist()
    return {"seconds": both[0], "computing_lost_s": both[1]}


def _torch_calls(channel: Any) -> Calls:
    """All-reduces of ``torch.distributed`` over a group, by default the first."""
    import torch
    import torch.distributed as dist

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    first = dist.get_rank() == 0

    def calls(name: str, count: int, times: int) -> list[float]:
        tensor, seconds = torch.empty(count, dtype=dtypes[name]), []
        for _ in range(_WARMUP + times):
            tensor.fill_(first)  # a sum that bf16 holds exactly, however many ranks there are
            dist.barrier(group=channel)
            start = time.perf_counter()
            dist.all_reduce(tensor, group=channel)
            seconds.append(time.perf_counter() - start)
        if (tensor != 1).any():
            raise KnltrainError(
                f"{dist.get_backend(channel)}, {name}, {count} elements: the sum over the ranks is wrong; "
                "do not train on this"
            )
        return seconds[_WARMUP:]

    return calls


class _NoProgramError(Exception):
    """The C++ program cannot be had on all ranks; the message says why."""


@contextlib.contextmanager
def _program(group: Any) -> Iterator[Calls]:
    """Starts the C++ program on every rank, and ends it.

    Raises:
        _NoProgramError: it cannot be compiled or run, here or on another rank.
    """
    import torch
    import torch.distributed as dist

    with tempfile.TemporaryDirectory() as folder:
        reason = _compile(Path(folder, "program"))
        if group.backend.transport == "mpi":
            reason = "over mpi it would need places of its own under mpiexec; unset CCL_ATL_TRANSPORT"
        (failed,) = group.sum(bool(reason))
        if failed:
            raise _NoProgramError(reason or "another rank cannot compile it")
        process = subprocess.Popen(
            [f"{folder}/program", str(group.world_size), str(group.rank)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        questions, answers = process.stdin, process.stdout

        def answer() -> str:
            ready, _, _ = select.select([answers], [], [], _COMMAND_TIMEOUT_S)
            # oneCCL's remarks come on stdout too; neither an address nor times have a colon.
            while ready and (line := answers.readline()):
                if ":" not in line:
                    return line
            raise KnltrainError(f"{_CEILING} (ccl_allreduce.cpp) does not answer; it ended with {process.poll()}")

        def calls(name: str, count: int, times: int) -> list[float]:
            questions.write(f"{list(_BYTES).index(name)} {count} {_WARMUP + times}\n")
            return [float(word) for word in answer().split()][_WARMUP:]

        try:
            address = torch.zeros(256, dtype=torch.uint8)
            if group.is_first:
                address = torch.frombuffer(bytearray.fromhex(answer()), dtype=torch.uint8)
            dist.broadcast(address, 0)
            if not group.is_first:
                questions.write(bytes(address.tolist()).hex() + "\n")
            yield calls
            questions.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_COMMAND_TIMEOUT_S)
        finally:
            process.kill()
            process.wait()
            answers.close()


def _compile(program: Path) -> str:
    """Compiles ccl_allreduce.cpp against the oneCCL that ``ccl`` uses; returns why it cannot be, or nothing."""
    from knltrain.comm.oneccl import find_library

    compiler, library = shutil.which("g++"), find_library()
    include = next((up / "include" for up in library.parents if (up / "include/oneapi/ccl.hpp").exists()), None)
    if compiler is None or include is None:
        return "g++ is not installed" if compiler is None else f"no headers beside {library}"
    source = Path(__file__).with_name("ccl_allreduce.cpp")
    command = [compiler, "-std=c++17", "-O2", f"-I{include}", source, library, f"-Wl,-rpath,{library.parent}"]
    try:
        made = subprocess.run([*command, "-o", program], capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"g++ took longer than {_COMMAND_TIMEOUT_S:g} s"
    return f"g++: {made.stderr.strip().splitlines()[0]}" if made.returncode else ""


def _table(rows: list[dict[str, Any]], backends: list[str]) -> Table:
    """A line for each type and size: the medians, bandwidths, and how the back ends compare."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("type")
    for name in ("MiB", "elements", *(f"{backend}, ms" for backend in backends),
                 *(f"{backend}, GB/s" for backend in backends)):  # fmt: skip
        table.add_column(name, justify="right", no_wrap=True)
    if "ccl" in backends:
        table.add_column("gloo / ccl", justify="right", no_wrap=True)
    if _CEILING in backends:
        table.add_column("alone / ccl", justify="right", no_wrap=True)
    for dtype, size in dict.fromkeys((row["dtype"], row["bytes"]) for row in rows):
        of = {row["backend"]: row for row in rows if (row["dtype"], row["bytes"]) == (dtype, size)}
        median = {backend: of[backend]["median_s"] for backend in backends}
        table.add_row(
            dtype,
            f"{size / 2**20:.3g}",
            f"{size // _BYTES[dtype]:,}",
            *(f"{1e3 * median[backend]:.3f}" for backend in backends),
            *(f"{of[backend]['busbw_gb_per_s']:.3g}" for backend in backends),
            *([f"{median['gloo'] / median['ccl']:.2f}"] if "ccl" in backends else []),
            *([f"{median[_CEILING] / median['ccl']:.0%}"] if _CEILING in backends else []),
        )
    return table


def _figure(result: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(f"all-reduce, {result['world_size']} ranks, {result['ranks_per_node']} a node")
    times, rates = figure.subplots(1, 2)
    for dtype, style in zip(dict.fromkeys(row["dtype"] for row in result["rows"]), ("o-", "s--"), strict=False):
        for index, backend in enumerate(result["backends"]):
            rows = [row for row in result["rows"] if (row["dtype"], row["backend"]) == (dtype, backend)]
            sizes, color = [row["bytes"] / 2**20 for row in rows], f"C{index}"
            label = f"{backend}, {dtype}"
            times.plot(sizes, [1e3 * row["median_s"] for row in rows], style, ms=4, label=label, color=color)
            times.fill_between(sizes, [1e3 * row["min_s"] for row in rows], [1e3 * row["max_s"] for row in rows],
                               color=color, alpha=0.1, lw=0)  # fmt: skip
            rates.plot(sizes, [row["busbw_gb_per_s"] for row in rows], style, ms=4, label=label, color=color)
    times.set(xlabel="message, MiB", ylabel="ms: median, and from fastest to slowest call", xscale="log", yscale="log")
    rates.set(xlabel="message, MiB", ylabel="bus bandwidth, GB/s", xscale="log", ylim=(0, None))
    for axes in (times, rates):
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


if __name__ == "__main__":
    main()
