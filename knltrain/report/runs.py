"""Reads the folders of runs for drawing. Everything in them is untrusted."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from knltrain.config import flatten
from knltrain.errors import KnltrainError, one_line
from knltrain.files import open_regular, says_absent
from knltrain.runlog.metrics import left_out

Column = NDArray[np.float64]

# Bytes of a JSON file, and of a row; ResNet-50's trust ratios take 6 kB.
_MAX_FILE_BYTES, _MAX_ROW_BYTES = 1 << 24, 1 << 20
# Lines that are no rows, after which a file is no longer read: it may be endless.
_MAX_BAD_LINES = 1000
# Larger values are read as NaN: no run has them, and no axis can show them.
_MAX_VALUE = 1e15
# Characters of a setting's value on the page.
_MAX_VALUE_LENGTH = 120
# The noise scale of a run is the median over this last part of its steps.
_NOISE_PART = 0.2


class _Row(msgspec.Struct):
    """A line of metrics.jsonl: of a step if it has a loss, of an evaluation if it has a top-1."""

    step: int
    epoch: float
    loss: float | None = None
    lr: float | None = None
    images_per_s: float | None = None
    data_s: float | None = None
    step_s: float | None = None
    comm_s: float | None = None
    exposed_comm_s: float | None = None
    rss_mb: float | None = None
    noise_scale: float | None = None
    top1: float | None = None
    top5: float | None = None
    val_loss: float | None = None


_FIELDS = _Row.__struct_fields__


class _RatioRow(msgspec.Struct):
    """A line of trust_ratios.jsonl."""

    step: int
    epoch: Annotated[float, msgspec.Meta(ge=0, le=_MAX_VALUE)]
    weight: dict[str, float | None] = {}
    norm: dict[str, float | None] = {}
    bias: dict[str, float | None] = {}


@dataclasses.dataclass(frozen=True)
class TrustRatios:
    """Trust ratios of a run.

    Attributes:
        epochs: when, T numbers.
        names: of the parameters, for people, by kind (weight, norm, bias), in the network's order; kinds without any
            are not there.
        ratios: by kind, T x parameters; NaN where the rate was the global one.
    """

    epochs: Column
    names: dict[str, list[str]]
    ratios: dict[str, Column]


@dataclasses.dataclass(frozen=True)
class Run:
    """A run, read from its folder.

    Attributes:
        path: the folder, as it was named.
        name: a short one, of printable characters; different for each run of a report.
        settings: what it was made with, by dotted name, for people: configuration, plan, processor and versions.
        finished: whether summary.json says so.
        peak_rss_mb: what summary.json says, MiB.
        steps: by the names of metrics.jsonl, a number for each step; NaN where there is none.
        evaluations: likewise for each evaluation.
        trust_ratios: None where none were logged.
    """

    path: Path
    name: str
    settings: dict[str, str]
    finished: bool
    peak_rss_mb: float | None
    steps: dict[str, Column]
    evaluations: dict[str, Column]
    trust_ratios: TrustRatios | None

    @property
    def batches(self) -> Column:
        """Images of each step, which may change during a run; NaN where there are no times."""
        return np.round(self.steps["images_per_s"] * self.steps["step_s"])

    def results(self, target_top1: float | None = None) -> dict[str, float | None]:
        """Results by the names of summary.json; None where the folder has none.

        Args:
            target_top1: in per cent. ``epochs_to_target`` and ``train_s_to_target`` go up to the first evaluation that
                reached it.
        """
        steps, evaluations = self.steps, self.evaluations
        train_s = _sum(steps["step_s"])
        noise = steps["noise_scale"][-max(1, round(_NOISE_PART * len(steps["step"]))) :]
        noise = noise[np.isfinite(noise)]
        rss = _last(steps["rss_mb"], np.nanmax)
        timed_s = _sum(np.where(np.isfinite(self.batches), steps["step_s"], np.nan))
        return {
            "top1": _last(evaluations["top1"]),
            "best_top1": _last(evaluations["top1"], np.nanmax),
            "top5": _last(evaluations["top5"]),
            "val_loss": _last(evaluations["val_loss"]),
            "loss": _last(steps["loss"]),
            "epochs": _last(steps["epoch"]),
            "steps": _last(steps["step"]),
            "images_per_s": float(np.nansum(self.batches)) / timed_s if timed_s else None,
            "train_s": train_s,
            "data_fraction": _fraction(steps["data_s"], train_s),
            "comm_fraction": _fraction(steps["comm_s"], train_s),
            "exposed_comm_fraction": _fraction(steps["exposed_comm_s"], train_s),
            "peak_rss_mb": self.peak_rss_mb or rss,
            "noise_scale": float(np.median(noise)) if len(noise) else None,
        } | (self._to(target_top1) if target_top1 is not None else {})

    def _to(self, target_top1: float) -> dict[str, float | None]:
        reached = np.flatnonzero(self.evaluations["top1"] >= target_top1)
        if not len(reached):
            return {"epochs_to_target": None, "train_s_to_target": None}
        step, epoch = (float(self.evaluations[name][reached[0]]) for name in ("step", "epoch"))
        return {
            "epochs_to_target": epoch,
            "train_s_to_target": _sum(self.steps["step_s"][self.steps["step"] <= step]),
        }


def _last(values: Column, choose: Any = lambda known: known[-1]) -> float | None:
    known = values[np.isfinite(values)]
    return float(choose(known)) if len(known) else None


def _sum(values: Column) -> float | None:
    return float(np.nansum(values)) or None


def _fraction(values: Column, whole: float | None) -> float | None:
    return float(np.nansum(values)) / whole if whole and np.isfinite(values).any() else None


def read_run(path: Path) -> tuple[Run, list[str]]:
    """Reads a run's folder.

    Returns:
        The run, and a line for each part of it that cannot be read and is left out.

    Raises:
        KnltrainError: it is no run's folder.
    """
    if not path.is_dir():
        raise KnltrainError(f"{path}: {'no folder' if path.exists() else 'no such folder'}; give the folders of runs")
    record = _object(path / "config.json")
    if record is None or not isinstance(record.get("config"), dict):
        why = "its config.json is not that of a run" if (path / "config.json").exists() else "no config.json in it"
        raise KnltrainError(f"{path}: not the folder of a run: {why}")
    problems: list[str] = []
    summary = _object(path / "summary.json") or {}
    if not summary and (path / "summary.json").exists():
        problems.append(f"{path}/summary.json cannot be read, and is left out")
    rows: list[tuple[Any, ...]] = []
    for row in _rows(path / "metrics.jsonl", _Row, problems):
        rows.append(tuple(getattr(row, name) for name in _FIELDS))
    if not rows:
        problems.append(f"{path} has no step in its metrics.jsonl yet")
    numbers = _sane(np.array(rows, dtype=np.float64)).reshape(len(rows), len(_FIELDS))
    loss, top1 = (numbers[:, _FIELDS.index(name)] for name in ("loss", "top1"))
    # A step without a finite loss has null for it.
    evaluation = np.isfinite(top1)
    peak = summary.get("peak_rss_mb")
    return Run(
        path,
        one_line(path.name or str(path)),
        _settings(record),
        summary.get("finished") is True,
        float(peak) if isinstance(peak, int | float) and math.isfinite(peak) else None,
        _columns(numbers[~evaluation | np.isfinite(loss)]),
        _columns(numbers[evaluation]),
        _trust_ratios(path / "trust_ratios.jsonl", problems),
    ), problems


def name_apart(runs: Sequence[Run]) -> list[Run]:
    """Gives runs whose folders have the same name as much of their paths as tells them apart."""
    parts = [Path(os.path.abspath(run.path)).parts for run in runs]
    named = []
    for run, own in zip(runs, parts, strict=True):
        others = [other for other in parts if other is not own]
        length = next((n for n in range(1, len(own)) if not any(other[-n:] == own[-n:] for other in others)), len(own))
        named.append(dataclasses.replace(run, name=one_line("/".join(own[-length:]))))
    return named


def _columns(numbers: Column) -> dict[str, Column]:
    return {name: numbers[:, index] for index, name in enumerate(_FIELDS)}


def _object(path: Path) -> dict[str, Any] | None:
    """A JSON object that a file holds; None where there is none.

    Raises:
        KnltrainError: it cannot be read now.
    """
    try:
        with open_regular(path) as file:
            value = json.loads(file.read(_MAX_FILE_BYTES))
    except OSError as error:
        if not says_absent(error):
            raise KnltrainError(f"{path}: {error.strerror}") from None
        return None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _rows(path: Path, kind: type[Any], problems: list[str]) -> Iterator[Any]:
    """The rows of a file; lines that are none are left out. The last line may be incomplete after a crash."""
    decode = msgspec.json.Decoder(kind).decode
    bad: list[int] = []
    try:
        with open_regular(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(_MAX_ROW_BYTES), b""), 1):
                try:
                    yield decode(line.strip(b"\0\n"))
                except (ValueError, RecursionError):
                    if line.endswith(b"\n") or len(line) == _MAX_ROW_BYTES:
                        bad.append(number)
                    if len(bad) == _MAX_BAD_LINES:
                        problems.append(f"{path}: line {bad[0]} and many others are no rows; the rest is left out")
                        return
    except FileNotFoundError:
        return
    except OSError as error:
        problems.append(f"{path} cannot be read ({error.strerror}), and is left out")
    if bad:
        problems.append(left_out(path, bad[0], len(bad)))


def _settings(record: Mapping[str, Any]) -> dict[str, str]:
    plan = record.get("plan")
    versions = record.get("versions")
    chosen = {
        **{name: value for name, value in flatten(record["config"]).items() if name not in ("out", "resume")},
        **{f"plan.{name}": plan.get(name) for name in _PLAN if isinstance(plan, dict)},
        "cpu": record.get("cpu"),
        **{f"versions.{name}": versions.get(name) for name in ("knltrain", "torch") if isinstance(versions, dict)},
    }
    return {one_line(str(name)): _for_people(value) for name, value in chosen.items()}


_PLAN = ("world_size", "ranks_per_node", "threads", "local_batch", "accumulate", "precision", "engine", "kernels",
         "backend")  # fmt: skip


def _for_people(value: object) -> str:
    if value is None or value == "":
        return "–"
    text = value if isinstance(value, str) else f"{value:,}" if type(value) is int else json.dumps(value)
    text = one_line(text)
    return text if len(text) <= _MAX_VALUE_LENGTH else f"{text[:_MAX_VALUE_LENGTH]}…"


def _trust_ratios(path: Path, problems: list[str]) -> TrustRatios | None:
    rows = list(_rows(path, _RatioRow, problems))
    if not rows:
        return None
    names = {kind: list(getattr(rows[0], kind)) for kind in ("weight", "norm", "bias") if getattr(rows[0], kind)}
    ratios = {
        kind: _sane(np.array([[getattr(row, kind).get(name) for name in listed] for row in rows], dtype=np.float64))
        for kind, listed in names.items()
    }
    shown = {kind: [one_line(name) for name in listed] for kind, listed in names.items()}
    return TrustRatios(np.array([row.epoch for row in rows]), shown, ratios) if names else None


def _sane(numbers: Column) -> Column:
    return np.where(np.abs(numbers) <= _MAX_VALUE, numbers, np.nan)
