"""Outcomes of a sweep's runs, and the best learning rate of each method and batch."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from knltrain.config.schedule import make_schedule
from knltrain.files import naming, open_regular, says_absent
from knltrain.sweep.plan import Point, Sweep

Status = Literal["waiting", "stopped", "done", "diverged", "failed"]
COLUMNS = ("model", "optimizer", "batch", "lr", "lr_factor", "seed", "epochs", "top1", "best_top1", "steps", "seconds",
           "images_per_s", "status", "run")  # fmt: skip
# File in a run's folder that says how it ended, unless it finished training.
ENDED = "ended.json"
# What a row of metrics.jsonl about a step of training has.
TRAINING_KEYS = ("step", "loss", "images_per_s")
# A network that guesses among 22,000 classes has a loss of 10.
_MAX_LOSS = 100.0
# More bytes than the last rows of metrics.jsonl take.
_TAIL_BYTES = 8192


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run.

    Attributes:
        status: diverged runs are results; failed ones are tried again.
        summary: its summary.json, once it is done.
        seconds: of training and evaluation.
        reason: why it ended, in a line.
    """

    status: Status
    summary: Mapping[str, Any]
    seconds: float | None = None
    reason: str = ""

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to try."""
        return self.status in ("done", "diverged")

    @property
    def top1(self) -> float | None:
        """Per cent after the last step."""
        return self.summary.get("top1")


@dataclass(frozen=True)
class Best:
    """A method at a batch, with its best learning rate.

    Attributes:
        optimizer: the method.
        batch: images a step.
        factor: of the rule's learning rate.
        lr: the peak learning rate.
        top1: by seed, in per cent, of the runs that are done.
        diverged: seeds with which this learning rate diverged.
        searched: the rule's factors that were tried to the end, with the number of runs of each that are done and
            their mean top-1, or None where none is.
        complete: whether every learning rate was tried with every search seed.
    """

    optimizer: str
    batch: int
    factor: float
    lr: float
    top1: Mapping[int, float]
    diverged: tuple[int, ...]
    searched: Mapping[float, tuple[int, float | None]]
    complete: bool

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.top1.values())

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds; None of a single one."""
        return statistics.stdev(self.top1.values()) if len(self.top1) > 1 else None

    @property
    def at_edge(self) -> bool:
        """Whether a learning rate beyond those tried might be better."""
        factors = sorted(self.searched)
        return len(factors) > 1 and self.factor in (factors[0], factors[-1])


class Results:
    """Reads a sweep's folder, anew at each call.

    Args:
        sweep: which.
        out: its folder.
        num_images: of the training set.
    """

    def __init__(self, sweep: Sweep, out: Path, num_images: int) -> None:
        self.sweep, self.out, self._num_images = sweep, out, num_images

    def steps(self, point: Point) -> int:
        """How many a run has."""
        config = point.config
        steps = make_schedule(config, self._num_images).total_steps
        return min(steps, config.max_steps or steps)

    def record(self, point: Point) -> dict[str, Any]:
        """The run's config.json; empty before it has begun."""
        return _read(point.folder(self.out) / "config.json")

    def outcome(self, point: Point) -> Outcome:
        """The outcome of a run so far."""
        folder = point.folder(self.out)
        summary, ended = _read(folder / "summary.json"), _read(folder / ENDED)
        if summary.get("finished") and (summary.get("steps") or 0) >= self.steps(point):
            if reason := _senseless_loss(folder / "metrics.jsonl"):
                return Outcome("diverged", {}, summary.get("wall_s"), reason)
            return Outcome("done", summary, summary.get("wall_s"))
        health = dataclasses.asdict(point.config.health)
        if ended.get("status") in ("diverged", "failed") and ended.get("health", health) == health:
            return Outcome(ended["status"], {}, ended.get("seconds"), str(ended.get("reason")))
        return Outcome("stopped" if (folder / "metrics.jsonl").exists() else "waiting", {})

    def best(self, optimizer: str, batch: int) -> Best | None:
        """The best learning rate of a method at a batch: first by runs that diverged, then by the mean top-1.

        Both are counted over the search seeds, which every learning rate was tried with. None if no run is done.
        """
        sweep, found = self.sweep, {}
        complete = True
        for factor in sweep.factors(optimizer, batch):
            outcomes = [self.outcome(sweep.point(optimizer, batch, factor, seed)) for seed in sweep.search_seeds]
            complete &= all(outcome.ended for outcome in outcomes)
            reached = [outcome.top1 for outcome in outcomes if outcome.top1 is not None]
            if any(outcome.ended for outcome in outcomes):
                found[factor] = (sum(outcome.status == "diverged" for outcome in outcomes), reached)
        done = {factor: row for factor, row in found.items() if row[1]}
        if not done:
            return None
        factor = min(done, key=lambda factor: (done[factor][0], -statistics.fmean(done[factor][1])))
        points = [sweep.point(optimizer, batch, factor, seed) for seed in sweep.seeds]
        outcomes = [self.outcome(point) for point in points]
        top1 = {point.seed: outcome.top1 for point, outcome in zip(points, outcomes, strict=True)
                if outcome.top1 is not None}  # fmt: skip
        diverged = tuple(point.seed for point, outcome in zip(points, outcomes, strict=True)
                         if outcome.status == "diverged")  # fmt: skip
        searched = {one: (len(reached), statistics.fmean(reached) if reached else None)
                    for one, (_, reached) in found.items()}  # fmt: skip
        return Best(optimizer, batch, factor, points[0].lr, top1, diverged, searched, complete)

    def num_diverged(self, optimizer: str, batch: int) -> int:
        """Runs of the search of a method at a batch that have diverged."""
        return sum(self.outcome(point).status == "diverged" for point in self.sweep.search((optimizer, batch)))

    def chosen(self) -> list[Best]:
        """The best of each method and batch that has any, by batch."""
        found = (self.best(optimizer, batch) for optimizer, batch in self.sweep.cells)
        return [best for best in found if best]

    def reference(self) -> Best | None:
        """What the others are compared with: SGD at the smallest batch, or the first method without SGD."""
        optimizer = "sgd" if "sgd" in self.sweep.optimizers else self.sweep.optimizers[0]
        return self.best(optimizer, min(self.sweep.batches))

    def later(self) -> list[Point | None]:
        """The runs of the best learning rates with the later seeds; None where the search is not over yet."""
        points: list[Point | None] = []
        for optimizer, batch in self.sweep.cells:
            best = self.best(optimizer, batch)
            for seed in self.sweep.later_seeds:
                over = best is not None and best.complete
                points.append(self.sweep.point(optimizer, batch, best.factor, seed) if best and over else None)
        return points

    def points(self) -> list[Point]:
        """Every run that is known: those of the search, and those of later seeds at any learning rate, if on disk."""
        sweep = self.sweep
        later = [
            sweep.point(optimizer, batch, factor, seed)
            for optimizer, batch in sweep.cells
            for factor in sweep.factors(optimizer, batch)
            for seed in sweep.later_seeds
        ]
        return sweep.search() + [point for point in later if self.outcome(point).status != "waiting"]

    def rows(self) -> list[dict[str, Any]]:
        """A row for each run that has begun: what sweep.csv has."""
        rows = []
        for point in self.points():
            outcome = self.outcome(point)
            if outcome.status != "waiting":
                values = (point.config.model, point.optimizer, point.batch, point.lr, point.factor, point.seed,
                          point.config.epochs, outcome.top1, outcome.summary.get("best_top1"),
                          outcome.summary.get("steps"), outcome.seconds, outcome.summary.get("images_per_s"),
                          outcome.status, str(point.folder(self.out).relative_to(self.out)))  # fmt: skip
                rows.append(dict(zip(COLUMNS, values, strict=True)))
        return rows


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as the text of sweep.csv: numbers as they are, nothing where there is none."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def last_row(path: Path, *keys: str) -> dict[str, Any]:
    """Returns the last row with these keys of a metrics.jsonl that may be growing; an empty one if there is none."""
    try:
        with open_regular(path) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return {}
    for line in reversed(lines):
        with contextlib.suppress(ValueError, RecursionError):  # a damaged row, or one that the tail begins within
            row = json.loads(line)
            if isinstance(row, dict) and row.keys() >= set(keys):
                return row
    return {}


def _senseless_loss(metrics: Path) -> str:
    """Returns what is said of a loss at the end of a run that none has that has learnt anything; '' if it has sense."""
    for what, key in (("validation", "val_loss"), ("training", "loss")):
        row = last_row(metrics, "step", key)
        loss = row.get(key)
        if row and not (isinstance(loss, int | float) and math.isfinite(loss) and loss < _MAX_LOSS):
            value = f"{loss:.4g}" if isinstance(loss, int | float) else "NaN or Inf"
            return f"the {what} loss is {value} at its end, step {row['step']}"
        if row:
            break  # the last step may be one that was skipped, and the weights be sound
    return ""


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no such file, or none that is whole.

    Raises:
        OSError: it cannot be read now; a run that has ended would be trained again.
    """
    try:
        with naming(path), open_regular(path) as file:
            value = json.loads(file.read())
    except OSError as error:
        if not says_absent(error):
            raise
        return {}
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
