"""The page of a report: tables and figures in one HTML file that loads nothing."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

import knltrain
from knltrain.errors import one_line
from knltrain.report.draw import Picture, colours
from knltrain.report.runs import Run


def _minutes(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _images(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


# Columns of the table of results: title, key of Run.results(), format, and which value is best.
_RESULTS: tuple[tuple[str, str, Callable[[float], str], Callable[..., float] | None], ...] = (
    ("top-1, %", "top1", "{:.2f}".format, max),
    ("best top-1, %", "best_top1", "{:.2f}".format, max),
    ("validation loss", "val_loss", "{:.3f}".format, min),
    ("training loss", "loss", "{:.3f}".format, None),
    ("epochs", "epochs", "{:.4g}".format, None),
    ("steps", "steps", "{:,.0f}".format, None),
    ("images/s", "images_per_s", _images, None),
    ("training", "train_s", _minutes, None),
    ("waiting for data", "data_fraction", "{:.1%}".format, None),
    ("communication not hidden", "exposed_comm_fraction", "{:.1%}".format, None),
    ("peak memory, MiB", "peak_rss_mb", "{:,.0f}".format, None),
    ("noise scale at the end, images", "noise_scale", _images, None),
    ("epochs to {target:g} %", "epochs_to_target", "{:.4g}".format, min),
    ("training to {target:g} %", "train_s_to_target", _minutes, min),
)
# Settings listed for each of several runs even if all have the same.
_ALWAYS = ("model", "global_batch", "optim.name", "optim.lr")


def page(runs: Sequence[Run], pictures: Sequence[Picture], target_top1: float | None = None) -> str:
    """The page, in which everything that a run says is escaped.

    Args:
        runs: at least one, of different names.
        pictures: of these.
        target_top1: in per cent; the table has what each run took to reach it.
    """
    environment = Environment(
        loader=PackageLoader("knltrain.report", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    values = {name: [run.settings.get(name, "–") for run in runs] for name in names}
    several = len(runs) > 1
    differing = [name for name in names if several and (name in _ALWAYS or len(set(values[name])) > 1)]
    return environment.get_template("page.html").render(
        version=knltrain.__version__,
        date=datetime.datetime.now().astimezone().strftime("%d %B %Y, %H:%M"),
        runs=[
            {"name": run.name, "path": one_line(str(run.path)), "colour": colour, "finished": run.finished}
            for run, colour in zip(runs, colours(len(runs)), strict=True)
        ],
        results=_results(runs, target_top1),
        differing=[(name, values[name]) for name in differing],
        common=[(name, values[name][0]) for name in names if name not in differing and values[name][0] != "–"],
        pictures=[{"title": one.title, "caption": one.caption, "wide": one.wide, "svg": one.svg} for one in pictures],
        missing=_missing(pictures),
        subject=" on ".join(values[name][0] for name in ("model", "data") if len(set(values.get(name, ()))) == 1),
    )


def _results(runs: Sequence[Run], target_top1: float | None) -> list[dict[str, Any]]:
    """The columns of the table of results: those for which some run has a number."""
    found = [run.results(target_top1) for run in runs]
    columns = []
    for title, key, write, best in _RESULTS:
        numbers = [results.get(key) for results in found]
        known = [number for number in numbers if number is not None]
        if not known:
            continue
        first = best(known) if best and len(known) > 1 and len(set(known)) > 1 else None
        cells = [
            {"text": "–" if number is None else write(number), "best": number is not None and number == first}
            for number in numbers
        ]
        columns.append({"title": title.format(target=target_top1), "cells": cells})
    return columns


def _missing(pictures: Sequence[Picture]) -> list[str]:
    """Hints at figures that are missing: which flag or setting logs them."""
    names = {picture.name.partition("-")[0] for picture in pictures}
    hints = {
        "trust": "No run has logged trust ratios: knltrain train --log-trust-ratios, with LARS.",
        "noise": "No run has a noise scale: it takes several ranks, or a local batch smaller than the rank’s share.",
        "accuracy": "No run has been evaluated yet.",
    }
    return [hint for name, hint in hints.items() if name not in names]
