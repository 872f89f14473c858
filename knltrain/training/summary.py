"""What a run says when it begins, and the summary that it leaves when it ends."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from knltrain import config as configuration
from knltrain.node.contention import CpuContention
from knltrain.node.memory import peak_resident_mb
from knltrain.runlog.metrics import read_metrics, write_json
from knltrain.training.state import Run


def log_run_header(run: Run) -> None:
    """Says what is about to run, in a few lines."""
    config, plan, console = run.config, run.plan, run.console
    console.line(
        f"{config.model} on {config.data}: {len(run.train_set):,} + {len(run.val_loader):,} images, "
        f"{len(run.train_set.classes)} classes"
    )
    console.line(
        f"{config.optim.name}/{config.optim.variant}, batch {config.global_batch:,} = {plan['world_size']} rank(s) x "
        f"{plan['accumulate']} x {plan['local_batch']}, peak lr {config.peak_lr:g}, {config.epochs:g} epochs = "
        f"{run.schedule.total_steps:,} steps"
    )
    for phase in run.schedule.phases if len(run.schedule.phases) > 1 else ():
        console.line(
            f"epochs {run.epoch(phase.first_step):.4g} to {run.epoch(phase.last_step):.4g}: batch {phase.batch:,}, "
            f"{phase.image_size} pixels" + ("" if phase.augmented else ", no augmentation")
        )
    console.line(
        f"{plan['precision']}, engine {plan['engine']}, {plan['threads']} threads and {plan['workers']} decoders a rank"
    )
    if plan["convolutions"]:
        console.line(f"convolutions: {len(plan['convolutions'])} by Winograd's algorithm, as config.json lists them")
    _log_communication(run)
    if run.start.folder:
        console.line(f"resumed from {run.start.folder} (epoch {run.epoch(run.state.step):.2f})")


def _log_communication(run: Run) -> None:
    comm, backend, console = run.config.comm, run.group.backend, run.console
    if backend:
        console.line(
            f"gradients are all-reduced in {comm.dtype} over {backend.name} ({backend.version}, {backend.transport})"
        )
        if backend.note:
            console.line(backend.note)
        if run.start.folder and comm.compression == "powersgd":
            console.warn("PowerSGD's error feedback is not in checkpoints: it starts at zero")
    elif dataclasses.replace(comm, timeout_s=0.1) != configuration.CommConfig(timeout_s=0.1):
        console.warn("of comm.*, timeout-s alone has an effect on a single rank")


def finished_summary(run: Run) -> dict[str, Any]:
    """The summary of a finished run as it is on disk, or made now if the run was killed before it was there."""
    try:
        summary: dict[str, Any] = json.loads((run.out / "summary.json").read_text("utf-8"))
        if summary["steps"] == run.state.step and summary["finished"]:
            return {**summary, "out": str(run.out)}  # the folder may have been moved
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass
    return summarize(run, run.state.wall_s, 0, None, finished=True)


def summarize(
    run: Run, wall_s: float, skipped: int, contention: CpuContention | None, *, finished: bool
) -> dict[str, Any]:
    """Writes OUT/summary.json and OUT/curves.png from the run's metrics, and returns the former.

    Args:
        run: what was trained.
        wall_s: seconds of it, of earlier starts as well.
        skipped: images that could not be decoded.
        contention: of all ranks' CPUs, since the last start; None where that is not known.
        finished: whether nothing is left to train.
    """
    rows = read_metrics(run.out / "metrics.jsonl", run.console.warn)
    steps = [row for row in rows if {"step_s", "data_s", "comm_s", "exposed_comm_s"} <= row.keys()]
    evaluations = [row for row in rows if "top1" in row]
    train_s = sum(row["step_s"] for row in steps)
    last: dict[str, Any] = evaluations[-1] if evaluations else {}
    state = run.state
    summary = {
        "recipe": run.config.recipe,
        "model": run.config.model,
        "finished": finished,
        "top1": last.get("top1"),
        "top5": last.get("top5"),
        "best_top1": state.evaluations.best_top1,
        "epochs": run.epoch(state.step),
        "steps": state.step,
        "images_per_s": sum(run.rank_batch(row["step"] - 1).global_batch for row in steps) / train_s if steps else None,
        "data_fraction": sum(row["data_s"] for row in steps) / train_s if steps else None,
        "comm_fraction": sum(row["comm_s"] for row in steps) / train_s if steps else None,
        "exposed_comm_fraction": sum(row["exposed_comm_s"] for row in steps) / train_s if steps else None,
        "skipped_images": skipped,
        "skipped_steps": state.guard.skipped_steps,
        "rewinds": state.guard.rewinds,
        "peak_rss_mb": peak_resident_mb(),
        "other_cpus": contention and contention.other,
        "stolen_cpus": contention and contention.steal,
        "train_s": train_s,
        "wall_s": wall_s,
        "engine": run.plan["engine"],
        "precision": run.plan["precision"],
        "world_size": run.plan["world_size"],
        "global_batch": run.config.global_batch,
        "out": str(run.out),
    }
    write_json(run.out / "summary.json", summary)
    from knltrain.runlog.curves import draw_curves  # late: one rank draws, once, and matplotlib takes a second to load

    title = f"{run.config.recipe or run.config.model}, batch {run.config.global_batch:,}"
    try:
        draw_curves(rows, run.out / "curves.png", title)
    except OSError as error:  # the run is on disk, and the curves can be drawn of it again
        run.console.warn(f"{error.filename}: {error.strerror}: the curves are not drawn; `knltrain report` draws them")
    return summary
