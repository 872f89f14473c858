"""A long run, watched from outside: whether memory, files, threads and the time of a step stay as they are.

    python perf/soak.py --minutes 120
    python perf/soak.py --minutes 120 -- --recipe cifar-2k --data cifar10        any other run of knltrain train

The run is asked to end when the time is over. Slopes are least squares over the second half, when caches are full.
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from _common import finish, out_folder, output_options
from matplotlib.figure import Figure

from knltrain.bench.tune import last_message
from knltrain.errors import KnltrainError
from knltrain.node.topology import read_node
from knltrain.runlog.console import Console
from knltrain.runlog.metrics import read_metrics
from knltrain.runlog.provenance import provenance

_DEFAULT = ("--recipe", "quickstart", "--epochs", "100000")
_SHUTDOWN_TIMEOUT_S = 300.0
_STOPPED = 75
_MIB = 2**20


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--minutes", type=click.FloatRange(min=0.05), help="How long; default 120, with --quick 0.4.")
@click.argument("train", nargs=-1)
@output_options
def main(minutes: float | None, train: tuple[str, ...], out: str | None, as_json: bool, quick: bool) -> None:
    """Watch a run of knltrain train, whose options follow after --."""
    console = Console(json=as_json)
    folder = out_folder(out)
    minutes = minutes or (0.4 if quick else 120.0)
    words = [*(train or _DEFAULT), "--out", str(folder / "run")]
    samples = _watch([sys.executable, "-m", "knltrain", "train", *words], folder, 60 * minutes)
    steps = [row for row in read_metrics(folder / "run" / "metrics.jsonl") if "step_s" in row]
    if len(steps) < 2 or len(samples) < 2:
        raise KnltrainError(f"{len(steps)} steps and {len(samples)} looks in {minutes:g} minutes: too few; take longer")
    result = {"minutes": minutes, "command": words, **_trends(samples, steps), "samples": samples,
              **provenance(read_node())}  # fmt: skip
    console.line(
        f"{result['steps']:,} steps; over the second half: memory {result['rss_mib_per_hour']:+.1f} MiB an hour, open "
        f"files {result['files_range'][0]} to {result['files_range'][1]}, threads {result['threads_range'][0]} to "
        f"{result['threads_range'][1]}; median step {1e3 * result['step_s_quarters'][0]:.1f} ms in the first quarter, "
        f"{1e3 * result['step_s_quarters'][-1]:.1f} ms in the last"
    )
    finish(result, _figure(samples, steps), folder, console, as_json=as_json)


def _watch(command: list[str], folder: Path, seconds: float) -> list[dict[str, float]]:
    """Starts the run, looks at it now and then, and asks it to end."""
    samples = []
    with (folder / "said.txt").open("w+", encoding="utf-8") as said:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        try:
            started = time.monotonic()
            pause = min(5.0, seconds / 50)
            while (now := time.monotonic() - started) < seconds and process.poll() is None:
                with contextlib.suppress(OSError):
                    samples.append({"s": now, **_look(process.pid)})
                time.sleep(pause)
            process.send_signal(signal.SIGTERM)
            code = process.wait(_SHUTDOWN_TIMEOUT_S)
        finally:
            process.kill()
        if code not in (0, _STOPPED):
            said.seek(0)
            raise KnltrainError(f"the run ended with {code}: {last_message(said.read())}")
    return samples


def _look(pid: int) -> dict[str, float]:
    process = Path("/proc", str(pid))
    pages = int((process / "statm").read_text().split()[1])
    return {"rss_mib": pages * os.sysconf("SC_PAGESIZE") / _MIB, "files": len(list((process / "fd").iterdir())),
            "threads": len(list((process / "task").iterdir()))}  # fmt: skip


def _trends(samples: list[dict[str, float]], steps: list[dict[str, Any]]) -> dict[str, Any]:
    half = samples[len(samples) // 2 :]
    slope = float(np.polyfit([sample["s"] for sample in half], [sample["rss_mib"] for sample in half], 1)[0])
    quarters = np.array_split([row["step_s"] for row in steps], 4 if len(steps) >= 4 else 1)
    ranges = {f"{name}_range": [min(values), max(values)] for name in ("files", "threads")
              if (values := [int(sample[name]) for sample in half])}  # fmt: skip
    return {"steps": len(steps), "rss_mib_per_hour": 3600 * slope, "rss_mib_last": samples[-1]["rss_mib"], **ranges,
            "step_s_quarters": [statistics.median(quarter.tolist()) for quarter in quarters]}  # fmt: skip


def _figure(samples: list[dict[str, float]], steps: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(9, 8), layout="constrained")
    top, *middle, bottom = figure.subplots(4, 1)
    minutes = [sample["s"] / 60 for sample in samples]
    for axes, name, label in zip(
        (top, *middle), ("rss_mib", "files", "threads"), ("memory, MiB", "open files", "threads"), strict=True
    ):
        axes.plot(minutes, [sample[name] for sample in samples])
        axes.set(ylabel=label, ylim=(0, 1.15 * max(sample[name] for sample in samples)))
    top.set_xlabel("minutes")
    middle[-1].set_xlabel("minutes")
    times = [1e3 * row["step_s"] for row in steps]
    width = max(1, len(times) // 300)
    medians = [statistics.median(times[at : at + width]) for at in range(0, len(times), width)]
    bottom.plot([steps[at]["step"] for at in range(0, len(times), width)], medians)
    bottom.set(xlabel=f"step (medians of {width})", ylabel="step, ms", ylim=(0, 1.3 * max(medians)))
    return figure


if __name__ == "__main__":
    main()
