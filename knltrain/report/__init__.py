"""`knltrain report`: the logs of runs as one HTML page and as figures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from knltrain.errors import KnltrainError, one_line
from knltrain.files import naming, replacing
from knltrain.report.draw import Picture, draw
from knltrain.report.page import page
from knltrain.report.runs import Run, name_apart, read_run
from knltrain.runlog.console import Console

# Figures that a report writes; an earlier report's are deleted.
_FIGURE_NAMES = re.compile(
    r"(accuracy|loss|learning-rate|throughput|time|memory|noise-scale|trust-ratios(-[0-9]+)?)\.(svg|png)"
)


def report(folders: Sequence[Path], out: Path, console: Console, target_top1: float | None = None) -> dict[str, Any]:
    """Writes OUT/report.html, which needs nothing beside it, and OUT/figures/NAME.svg and NAME.png.

    Args:
        folders: of runs, finished or not.
        out: where to; what an earlier report wrote there is overwritten.
        console: where to warn of what is left out, and why.
        target_top1: in per cent; results have what each run took to reach it.

    Returns:
        ``page``, ``figures``, ``runs`` with their results, and ``left_out`` with the reasons.

    Raises:
        KnltrainError: none of the folders is that of a run.
    """
    runs, left_out = _read_runs(folders, console)
    if not runs:
        raise KnltrainError(left_out[0]["why"] if len(left_out) == 1 else f"none of {len(folders)} folders is a run's")
    runs = name_apart(runs)
    pictures = draw(runs)
    figures = _write_figures(pictures, out / "figures")
    with replacing(out / "report.html", sync=False) as file:
        file.write(page(runs, pictures, target_top1).encode())
    return {
        "page": str(out / "report.html"),
        "figures": figures,
        "runs": [
            {"name": run.name, "path": one_line(str(run.path)), "finished": run.finished, **run.results(target_top1)}
            for run in runs
        ],
        "left_out": left_out,
    }


def _read_runs(folders: Sequence[Path], console: Console) -> tuple[list[Run], list[dict[str, str]]]:
    """The runs, each once, and which folders are left out, and why."""
    runs: list[Run] = []
    left_out: list[dict[str, str]] = []
    seen: set[Path] = set()
    for folder in folders:
        if folder.resolve() in seen:
            console.warn(f"{folder} is named twice; it is drawn once")
            continue
        seen.add(folder.resolve())
        try:
            run, problems = read_run(folder)
        except KnltrainError as error:
            left_out.append({"path": one_line(str(folder)), "why": str(error)})
            if len(folders) > 1:
                console.warn(f"{error}; it is left out")
            continue
        for problem in problems:
            console.warn(problem)
        runs.append(run)
    return runs, left_out


def _write_figures(pictures: Sequence[Picture], folder: Path) -> list[str]:
    """Writes each figure in each of its formats; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if _FIGURE_NAMES.fullmatch(path.name):  # an earlier report may have had others
            path.unlink()
    figures = []
    for picture in pictures:
        for suffix, content in picture.files.items():
            path = folder / f"{picture.name}.{suffix}"
            with naming(path):
                path.write_bytes(content)
            figures.append(str(path))
    return figures
