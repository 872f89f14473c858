"""What is made of a race: a table for the terminal, Markdown, JSON and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from _common import show
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from knltrain.runlog.console import Console

_COLUMNS = ("contestant", "img/s", "quartiles", "/ stock", "/ best peer", "MiB", "loss", "what it is")
_OURS, _PEER = "#c1440e", "#8a99a8"


def present(raced: dict[str, Any], console: Console) -> None:
    """Shows a race on the terminal."""
    table = Table(title=title(raced), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in _COLUMNS[:-1]:  # what a contestant is takes too much room here
        table.add_column(column, justify="left" if column == "contestant" else "right", no_wrap=True)
    for row in _rows(raced):
        table.add_row(*row[:-1])
    show(console, table)
    for line in _oddities(raced):
        console.warn(line)


def write(result: dict[str, Any], folder: Path) -> None:
    """Writes vs_peers.json, .md and .png, whole."""
    (folder / "vs_peers.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "vs_peers.md").write_text(_markdown(result))
    _draw(result, folder / "vs_peers.png")


def title(raced: dict[str, Any]) -> str:
    """What was raced at, in words."""
    return f"{raced['model']}, batch {raced['batch']}, {raced['image_size']} px, {raced['precision']}"


def _rows(raced: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for one in raced["contestants"]:
        name = f"{one['name']} ({one['engine']})" if one["recipe"] == "knltrain" and "engine" in one else one["name"]
        if "reason" in one:
            rows.append((name, "–", "–", "–", "–", "–", "–", f"does not run: {one['reason']}"))
            continue
        ratios = (f"{one[key]:.2f}" if key in one else "–" for key in ("ratio_to_stock", "ratio_to_best_peer"))
        rows.append(
            (
                name,
                f"{one['images_per_s']:.1f}",
                f"{one['quartile1']:.1f}–{one['quartile3']:.1f}",
                *ratios,
                f"{one['peak_mib']:.0f}",
                f"{one['first_loss']:.3f} → {one['last_loss']:.3f}",
                one["about"],
            )
        )
    return rows


def _oddities(raced: dict[str, Any]) -> list[str]:
    return [f"{one['name']}: {odd}" for one in raced["contestants"] for odd in one.get("odd", [])]


def _markdown(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        "# Training steps of knltrain and its peers",
        "",
        f"`{' '.join(result['command'])}`, {result['cores']} cores of {result['cpu']} ({result['isa']}); {versions}; "
        f"revision {result['revision']}. {_libraries(result)}",
        "",
        f"Medians and quartiles of the rounds (at most {result['rounds']}), {result['steps']} timed steps a turn, all "
        "contestants in turn within a round. Ratios are medians of the ratio within a round; the best peer is the "
        "fastest that is not knltrain. MiB is the peak of the process. The loss is that of the first step and of the "
        "last. Nobody else ships the AlexNets: the peers train knltrain's plain modules.",
    ]
    for raced in result["races"]:
        count = max((len(one["rounds"]) for one in raced["contestants"] if "rounds" in one), default=0)
        lines += ["", f"## {title(raced)}", "", f"{count} rounds.", "", "| " + " | ".join(_COLUMNS) + " |"]
        lines += ["|" + "---|" * len(_COLUMNS), *("| " + " | ".join(row) + " |" for row in _rows(raced))]
        odd = _oddities(raced)
        if odd:
            lines += ["", *(f"- {line}" for line in odd)]
    if result["not_run"]:
        lines += ["", "Not run, the budget being spent: " + "; ".join(map(title, result["not_run"])) + "."]
    return "\n".join(lines) + "\n"


def _libraries(result: dict[str, Any]) -> str:
    """Which oneDNN each PyTorch of the race has."""
    found = {
        f"torch {one['torch']} has oneDNN {one['onednn']}"
        for raced in result["races"]
        for one in raced["contestants"]
        if "onednn" in one
    }
    return "; ".join(sorted(found)) + "." if found else ""


def _draw(result: dict[str, Any], path: Path) -> None:
    races = result["races"]
    names = list(dict.fromkeys(one["name"] for raced in races for one in raced["contestants"]))
    columns = min(2, len(races))
    rows = -(-len(races) // columns)
    figure = Figure(figsize=(6.5 * columns, rows * (1.1 + 0.3 * len(names))), layout="constrained")
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axis, raced in zip(axes.flat, races, strict=False):
        finished = [one for one in raced["contestants"] if "reason" not in one]
        rates = [one["images_per_s"] for one in finished]
        whiskers = [
            [one["images_per_s"] - one["quartile1"] for one in finished],
            [one["quartile3"] - one["images_per_s"] for one in finished],
        ]
        axis.barh(
            [names.index(one["name"]) for one in finished],
            rates,
            xerr=whiskers,
            capsize=3,
            color=[_OURS if one["recipe"] == "knltrain" else _PEER for one in finished],
        )
        for one in finished:
            axis.text(one["quartile3"], names.index(one["name"]), f"  {one['images_per_s']:.1f}", va="center")
        axis.set_xlim(0, 1.18 * max(rates, default=1.0))
        axis.set_title(title(raced), loc="left", fontsize=10)
        axis.set_xlabel("img/s")
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(races) :]:
        axis.set_visible(False)
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].invert_yaxis()
    figure.savefig(path, dpi=120)
