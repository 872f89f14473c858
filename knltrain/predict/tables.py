"""Tables and sentences of a prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from knltrain.config import as_typed
from knltrain.predict.run import Prediction
from knltrain.runlog.tables import new_table


def duration(seconds: float) -> str:
    """Seconds, minutes, hours or days, with what is worth reading."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def summary(prediction: Prediction) -> list[str]:
    """Time, speed and cost of a run, in a few lines."""
    job, step = prediction.job, prediction.step
    config, nodes = job.config, "node" if job.nodes == 1 else "nodes"
    cost = "" if prediction.usd is None else f", {prediction.usd:,.0f} USD"
    energy = "" if prediction.kwh is None else f", {prediction.kwh:,.0f} kWh"
    return [
        f"{config.recipe or config.model}: {config.model}, {as_typed(config.epochs)} epochs "
        f"at batch {config.global_batch:,} on {job.nodes:,} {nodes} of {job.system.name} ({job.system.about})",
        f"{job.ranks:,} ranks x {prediction.accumulate} x {prediction.local_batch} images, {job.precision}, "
        f"gradients in {config.comm.dtype}, buckets of {as_typed(config.comm.bucket_mb_of(job.ranks))} MiB, "
        f"{job.algorithm or job.system.network.algorithm}{'' if job.overlap else ', after the backward pass'}",
        f"{duration(prediction.total_s)}: {prediction.steps:,} steps{_of(prediction)} {1e3 * step.seconds:.1f} ms, "
        f"evaluations {duration(prediction.evaluation_s)}, checkpoints {duration(prediction.checkpoint_s)}",
        f"{prediction.images_per_s:,.0f} img/s, {prediction.efficiency:.0%} of {job.nodes:,} single {nodes}; "
        f"{prediction.node_hours:,.1f} node-hours{cost}{energy}",
    ]


def _of(prediction: Prediction) -> str:
    schedule = prediction.job.config.schedule
    return ", the last of" if schedule.image_sizes or schedule.batches else " of"


def step_table(prediction: Prediction) -> Table:
    """Where the time of a step goes."""
    step = prediction.step
    table = new_table("where a step's time goes", names=("",), numbers=("ms", "of the step"))
    for name, seconds in (
        ("images", step.input_s), ("forward", step.forward_s), ("backward", step.backward_s),
        ("waiting for the slowest rank", step.straggler_s), ("communication that is not hidden", step.exposed_s),
        ("optimizer", step.optimizer_s),
    ):  # fmt: skip
        table.add_row(name, f"{1e3 * seconds:.1f}", f"{seconds / step.seconds:.1%}")
    table.add_section()
    table.add_row(f"gradients on the wire, {len(step.sizes)} buckets", f"{1e3 * step.on_wire_s:.1f}", "")
    return table


def scaling_table(predictions: Sequence[Prediction]) -> Table:
    """A line for each number of nodes and batch."""
    numbers = ["nodes", "batch", "images a rank", "step, ms", "img/s", "efficiency", "not hidden", "time", "node-hours"]
    priced, metered = predictions[0].usd is not None, predictions[0].kwh is not None
    numbers += ["USD"] * priced + ["kWh"] * metered
    table = new_table("over nodes and batches", numbers=numbers)
    for one in predictions:
        step = one.step
        table.add_row(
            f"{one.job.nodes:,}", f"{one.job.config.global_batch:,}", f"{one.accumulate * one.local_batch:,}",
            f"{1e3 * step.seconds:.1f}", f"{one.images_per_s:,.0f}", f"{one.efficiency:.0%}",
            f"{step.exposed_s / step.seconds:.0%}", duration(one.total_s), f"{one.node_hours:,.1f}",
            *([f"{one.usd:,.0f}"] if one.usd is not None else []),
            *([f"{one.kwh:,.0f}"] if one.kwh is not None else []),
        )  # fmt: skip
    return table


def validation_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Predicted against published."""
    table = new_table("minutes, predicted against published", names=("run", "system"),
                   numbers=("published", "predicted", "deviation", "role"))  # fmt: skip
    for row in rows:
        table.add_row(row["run"], row["system"], f"{row['published_min']:g}", f"{row['predicted_min']:.1f}",
                      f"{row['deviation']:+.1%}", row["role"])  # fmt: skip
    return table


def accounting_table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """Iterations, messages and bytes against the batch."""
    table = new_table(title, numbers=("batch", "iterations", "images a node", "messages a node", "TB a node sends",
                                   "operations a byte"))  # fmt: skip
    for row in rows:
        ratio = row["flops_per_byte"]
        table.add_row(f"{row['batch']:,}", f"{row['iterations']:,}", f"{row['images_per_node']:,.10g}",
                      f"{row['messages']:,}", f"{row['terabytes']:,.2f}",
                      "" if ratio is None else f"{ratio:,.0f}")  # fmt: skip
    return table


def phases_table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """Batch, image size and cost of each phase of a run."""
    table = new_table(title, numbers=("epochs", "pixels", "batch", "iterations", "images", "10^15 operations",
                                   "messages a node", "TB a node sends"))  # fmt: skip
    for row in rows:
        table.add_row(f"{row['first_epoch']:.4g}-{row['last_epoch']:.4g}", f"{row['image_size']}", f"{row['batch']:,}",
                      f"{row['iterations']:,}", f"{row['images']:,}", f"{row['flops'] / 1e15:,.1f}",
                      f"{row['messages']:,}", f"{row['terabytes']:,.2f}")  # fmt: skip
    table.add_section()
    total = {
        name: sum(row[name] for row in rows) for name in ("iterations", "images", "flops", "messages", "terabytes")
    }
    table.add_row("all", "", "", f"{total['iterations']:,}", f"{total['images']:,}", f"{total['flops'] / 1e15:,.1f}",
                  f"{total['messages']:,}", f"{total['terabytes']:,.2f}")  # fmt: skip
    return table
