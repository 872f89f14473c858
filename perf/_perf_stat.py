"""Makes perf_stat.sh's JSON, table and flame graph out of what perf has written."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from _common import show
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from knltrain.runlog.console import Console

_NO_PMU = (
    "the processor's counters are not there, as in most virtual machines: run on the bare machine, or ask for a "
    "virtual PMU; times and software events are all there is"
)
# PyTorch's dispatcher calls every op through several of these.
_DISPATCH = re.compile(r"c10::impl::|at::_ops::|at::\(anonymous namespace\)::.*wrapper|torch::autograd::VariableType::")


def counters(text: str) -> dict[str, float | None]:
    """Events and their counts in the output of ``perf stat -x ';'``; None where the machine has no such counter.

    task-clock is in ms, and ``cpus_busy`` is how many processors it fills. A count is scaled by perf where several
    events shared a counter.
    """
    found: dict[str, float | None] = {}
    for line in text.splitlines():
        fields = line.split(";")
        if len(fields) > 2 and not line.startswith("#"):
            # With perf_event_paranoid 2, perf counts user code only and says so: "cycles:u".
            found[fields[2].removesuffix(":u")] = None if fields[0].startswith("<") else float(fields[0])
            if fields[-1] == "CPUs utilized":
                found["cpus_busy"] = float(fields[-2])
    return found


def derived(count: dict[str, float | None]) -> dict[str, float]:
    """Ratios that can be made of the counters that are there."""
    ratios = {
        "instructions_per_cycle": ("instructions", "cycles", 1.0),
        "clock_ghz": ("cycles", "task-clock", 1e-6),
        "cache_miss_share": ("cache-misses", "cache-references", 1.0),
        "branch_miss_share": ("branch-misses", "branches", 1.0),
        **{
            f"avx512_licence{level}_share": (f"core_power.lvl{level}_turbo_license", "cycles", 1.0)
            for level in range(3)
        },
    }
    return {
        name: factor * above / below
        for name, (numerator, denominator, factor) in ratios.items()
        if (above := count.get(numerator)) is not None and (below := count.get(denominator))
    }


def stacks(script: str) -> Counter[tuple[str, ...]]:
    """Samples by stack, outermost function first, in the output of ``perf script -F comm,pid,ip,sym,dso``.

    The interpreter's own functions are merged into "python", and PyTorch's dispatcher is left out.
    """
    samples: Counter[tuple[str, ...]] = Counter()
    for block in script.split("\n\n"):
        header, *lines = block.strip("\n").split("\n")
        if not header.strip():
            continue
        frames: list[str] = []
        for line in reversed(lines):
            frame = re.match(r"\s*[0-9a-f]+ (.*) \((.*)\)$", line)
            if frame is None or frame[2] == "[unknown]":
                continue
            name = frame[1]
            if "python3" in Path(frame[2]).name or "libpython" in frame[2]:
                name = "python"
            elif name == "[unknown]":
                name = "[generated code]" if re.search(r"perf-\d+\.map|anon", frame[2]) else f"[{Path(frame[2]).name}]"
            name = re.sub(r"^(jit_\w+)\.\d+$", r"\1", name)  # oneDNN numbers the kernels it generates
            if not _DISPATCH.match(name) and frames[-1:] != [name]:
                frames.append(name)
        samples[tuple(frames) or ("[no stack]",)] += 1
    return samples


def flame_graph(samples: Counter[tuple[str, ...]], title: str) -> Figure:
    """A bar for each function, as wide as its share of the samples, upon the function that called it.

    Brendan Gregg, "The flame graph", Communications of the ACM 59 (2016).
    """
    bars = list(_bars(samples))
    depth = 1 + max(level for level, *_ in bars)
    figure = Figure(figsize=(16, 1.5 + 0.2 * depth), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.barh([level for level, *_ in bars], [width for *_, width, _ in bars], left=[left for _, left, *_ in bars],
              height=0.95, color=[f"C{sum(name.encode()) % 10}" for *_, name in bars], alpha=0.6)  # fmt: skip
    for level, left, width, name in bars:
        letters = int(width * 2.3)
        if letters > 3:
            text = name if len(name) <= letters else name[: letters - 1] + "…"
            axes.text(left + 0.1, level, text, fontsize=6, va="center", clip_on=True)
    axes.set(xlim=(0, 100), ylim=(-0.6, depth), xlabel="samples, %", ylabel="calls: a function stands on its caller",
             yticks=[], title=title)  # fmt: skip
    return figure


def _bars(samples: Counter[tuple[str, ...]]) -> Iterator[tuple[int, float, float, str]]:
    """Level, left edge and width in % of all samples, and name of each bar wider than 0.1 %."""
    total = sum(samples.values())

    def above(prefix: tuple[str, ...], inside: list[tuple[tuple[str, ...], int]], left: float) -> Iterator[Any]:
        level = len(prefix)
        names = sorted({stack[level] for stack, _ in inside if len(stack) > level})
        for name in names:
            part = [(stack, count) for stack, count in inside if len(stack) > level and stack[level] == name]
            width = 100 * sum(count for _, count in part) / total
            if width > 0.1:
                yield level, left, width, name
                yield from above((*prefix, name), part, left)
            left += width

    yield from above((), list(samples.items()), 0.0)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--reason", default="", help="Why perf did not run.")
@click.option("--json", "as_json", is_flag=True)
def main(folder: Path, reason: str, as_json: bool) -> None:
    """Read FOLDER/{bench.json,stat.csv,script.txt}; write perf_stat.json, perf_stat.png and stacks.folded there."""
    console = Console(json=as_json)
    bench = json.loads((folder / "bench.json").read_text("utf-8").splitlines()[-1])
    result: dict[str, Any] = {"bench": bench, "counters": {}, "derived": {}, "hottest": [], "reasons": []}
    if reason:
        result["reasons"].append(reason)
    else:
        result["counters"] = counters((folder / "stat.csv").read_text("utf-8"))
        result["derived"] = derived(result["counters"])
        samples = stacks((folder / "script.txt").read_text("utf-8", errors="replace"))
        leaves: Counter[str] = Counter()
        for stack, count in samples.items():
            leaves[stack[-1]] += count
        total = samples.total()
        result["samples"] = total
        result["hottest"] = [{"function": name, "share": n / total} for name, n in leaves.most_common(20)]
        lines = sorted(f"{';'.join(name.replace(';', ':') for name in stack)} {n}" for stack, n in samples.items())
        (folder / "stacks.folded").write_text("\n".join(lines) + "\n", "utf-8")
        (folder / "script.txt").unlink()
        title = f"{bench['model']}, batch {bench['batch']}, {bench['precision']}, {bench['engine']}: {total} samples"
        flame_graph(samples, title).savefig(folder / "perf_stat.png", dpi=110)
        if result["counters"].get("cycles") is None:
            result["reasons"].append(_NO_PMU)
    (folder / "perf_stat.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    show(console, *_tables(result))
    for line in result["reasons"]:
        console.warn(line)
    if result["hottest"]:
        console.line(f"{folder}/perf_stat.png: flame graph; stacks.folded is the same for speedscope or flamegraph.pl")
    console.line(f"{folder}/perf_stat.json")
    if as_json:
        click.echo(json.dumps(result))


def _tables(result: dict[str, Any]) -> Iterator[Table]:
    step = result["bench"]["step_s"]
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, title="all steps, those of the warm-up included", title_justify="left"
    )
    table.add_column("event")
    table.add_column("count", justify="right")
    table.add_row("training step, median, ms", f"{1e3 * step['median']:.1f}")
    for name, value in {**result["counters"], **result["derived"]}.items():
        text = "not here" if value is None else f"{value:,.0f}" if value > 1000 else f"{value:.3g}"
        table.add_row(f"{name}, ms" if name == "task-clock" else name, text)
    yield table
    if result["hottest"]:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="hottest functions, by samples", title_justify="left")
        table.add_column("%", justify="right", no_wrap=True)
        table.add_column("function", overflow="fold")
        for row in result["hottest"]:
            table.add_row(f"{100 * row['share']:.1f}", row["function"][:120])
        yield table


if __name__ == "__main__":
    main()
