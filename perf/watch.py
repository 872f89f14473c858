"""What it costs a training step to have its gradient's norm taken, and now and then its weights compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import click
from _common import finish, out_folder, output_options, show
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from knltrain.config import RunConfig, override
from knltrain.runlog.console import Console

_CASES = {"alexnet": (227, 128), "resnet50": (224, 32)}
_QUICK = {"alexnet_bn_small": (32, 8)}


def measure(model: str, image_size: int, batch: int, rounds: int) -> dict[str, Any]:
    """Times a step on noise and, after each, the norm of its gradient and the fingerprint of its weights.

    Returns:
        Of each, ``step_s``, ``norm_s`` and ``fingerprint_s``, a list of seconds.
    """
    from knltrain.bench.step import TrainingStep
    from knltrain.training.gradient_norm import norm_of
    from knltrain.training.replica_check import fingerprint

    config = override(RunConfig(), {"model": model, "image_size": image_size, "global_batch": batch})
    step = TrainingStep(config)
    step.warm_up()

    def seconds(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    times: dict[str, list[float]] = {"step_s": [], "norm_s": [], "fingerprint_s": []}
    for _ in range(rounds):
        times["step_s"].append(step().step_s)
        times["norm_s"].append(seconds(lambda: norm_of(step.engine.gradients().values())))
        times["fingerprint_s"].append(seconds(lambda: fingerprint(step.engine.weights().values())))
    return {**step.settings, **times}


@click.command(context_settings={"max_content_width": 110})
@click.option("--rounds", type=click.IntRange(min=1), help="Steps of each network; default 10, with --quick 2.")
@output_options
def main(rounds: int | None, out: str | None, quick: bool, as_json: bool) -> None:
    """Time the norm of the gradient and the fingerprint of the weights beside a step of AlexNet and of ResNet-50."""
    from knltrain.node.topology import read_node
    from knltrain.runlog.provenance import provenance

    console = Console(json=as_json)
    folder = out_folder(out)
    rows = [
        measure(model, size, batch, rounds or (2 if quick else 10))
        for model, (size, batch) in (_QUICK if quick else _CASES).items()
    ]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("medians, ms", "step", "norm", "of a step", "fingerprint", "of 100 steps"):
        table.add_column(heading, justify="left" if "," in heading else "right")
    for row in rows:
        step, norm, prints = (1e3 * statistics.median(row[key]) for key in ("step_s", "norm_s", "fingerprint_s"))
        name = f"{row['model']}, {row['precision']}, batch {row['batch']}"
        table.add_row(
            name, f"{step:.0f}", f"{norm:.2f}", f"{norm / step:.2%}", f"{prints:.2f}", f"{prints / step / 100:.4%}"
        )
    show(console, table)
    figure = Figure(figsize=(6, 2.4), layout="constrained")
    axis = figure.subplots()
    for place, row in enumerate(rows):
        for key, colour in (("norm_s", "#c1440e"), ("fingerprint_s", "#1b4965")):
            shares = [100 * value / statistics.median(row["step_s"]) for value in row[key]]
            axis.scatter(shares, [place] * len(shares), color=colour, label=key if place == 0 else None)
    axis.set_yticks(range(len(rows)), [row["model"] for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlim(left=0)
    axis.set_xlabel("% of a step")
    axis.legend()
    axis.spines[["top", "right"]].set_visible(False)
    finish({"rows": rows, **provenance(read_node())}, figure, folder, console, as_json=as_json)


if __name__ == "__main__":
    main()
