"""The figures of a report."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from knltrain.report.runs import Column, Run, TrustRatios

# Distinct for colour-blind readers too, in this order; more runs take colours from a scale.
_COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2", "#b91c1c", "#65a30d", "#475569")
_DATA, _COMPUTE, _COMM = "#d97706", "#2563eb", "#db2777"
# Longer curves are averaged down to as many points as a figure can show.
_MAX_POINTS = 300
# Points of a curve up to which each has a marker.
_MAX_MARKERS = 30
# A run whose loss rises to so many times its first one has diverged: the axis ends before its curve does.
_DIVERGED_FACTOR = 2.0
# Characters of a run's name, and number of layer names, in a figure.
_MAX_NAME_LENGTH = 40
_MAX_LAYER_NAMES = 24
_STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names of runs are not formulas
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#94a3b8",
    "axes.labelcolor": "#334155",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.titlesize": 9.5,
    "axes.titlecolor": "#334155",
    "grid.color": "#e2e8f0",
    "grid.linewidth": 0.8,
    "xtick.color": "#475569",
    "ytick.color": "#475569",
    "lines.linewidth": 1.5,
    "lines.solid_capstyle": "round",
}
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure of a report.

    Attributes:
        name: of its files, without a suffix.
        title: above it.
        caption: what it shows, and how to read it.
        svg: for a page: without a legend, what belongs to run i in groups of the class ``run-i``.
        files: the whole figure with its legend, by suffix.
        wide: it has two parts beside each other.
    """

    name: str
    title: str
    caption: str
    svg: str
    files: dict[str, bytes]
    wide: bool = False


def colours(count: int) -> list[str]:
    """A colour for each run."""
    if count <= len(_COLOURS):
        return list(_COLOURS[:count])
    return [to_hex(colour) for colour in colormaps["turbo"](np.linspace(0.05, 0.95, count))]


def draw(runs: Sequence[Run]) -> list[Picture]:
    """Draws what the runs have logged; a figure for which none has anything is left out."""
    loss_limit = _loss_limit(runs)
    beyond = "" if loss_limit is None else " A triangle at the upper edge: a run's first loss beyond the axis."
    found = [
        _curves(runs, "accuracy", "Validation accuracy", "Top-1 of each evaluation.", _accuracy),
        _curves(runs, "loss", "Loss", "Training loss as a line, of many steps their mean; validation loss as points."
                f"{beyond}", functools.partial(_loss, limit=loss_limit)),
        _curves(runs, "learning-rate", "Learning rate", "The global rate, before any layer's trust ratio.",
                _series("lr", "learning rate")),
        _curves(runs, "throughput", "Throughput", "Images trained on per second over all ranks, evaluations and "
                "checkpoints not counted; of many steps the mean.", _series("images_per_s", "images/s"),
                from_zero=True),
        _time_split(runs),
        _curves(runs, "memory", "Memory", "Resident memory of the first rank.",
                _series("rss_mb", "MiB"), from_zero=True),
        _curves(runs, "noise-scale", "Noise scale against the batch", "The simple noise scale; dashed, the batch that "
                "the run used. While the scale is well above the batch, a larger batch needs almost proportionally "
                "fewer steps; where it is below, a larger batch saves hardly any.", _noise),
        *(_trust(run, index, len(runs)) for index, run in enumerate(runs)),
    ]  # fmt: skip
    return [picture for picture in found if picture]


@contextlib.contextmanager
def _styled() -> Iterator[None]:
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # A name may have letters that the font of figures lacks; a page shows them in the reader's.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        yield


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _curves(
    runs: Sequence[Run],
    name: str,
    title: str,
    caption: str,
    plot: Callable[[Axes, Run, str, str], bool],
    *,
    from_zero: bool = False,
) -> Picture | None:
    """A figure with a curve of each run over the epochs; ``plot`` says whether the run has one."""
    with _styled():
        figure = _figure(4.9, 3.1)
        axes = figure.subplots()
        drawn = [
            (run, colour)
            for index, (run, colour) in enumerate(zip(runs, colours(len(runs)), strict=True))
            if plot(axes, run, colour, f"run-{index}")
        ]
        if not drawn:
            return None
        axes.set_xlabel("epoch")
        axes.margins(x=0.02)
        if from_zero:
            axes.set_ylim(0, 1.06 * max(axes.dataLim.intervaly[1], 1e-9))
        if axes.get_yscale() == "log":
            _number_decades(axes.yaxis, *axes.get_ylim())
        svg = _svg(figure, name, runs)
        if len(runs) > 1:
            handles = [Line2D([], [], color=colour) for _, colour in drawn]
            # matplotlib leaves labels that begin with an underscore out of a legend.
            labels = [f" {_short(run.name)}" for run, _ in drawn]
            rows = -(-len(drawn) // 2)
            figure.set_figheight(3.1 + 0.19 * rows)
            figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
        return Picture(name, title, caption, svg, _files(figure, title))


def _accuracy(axes: Axes, run: Run, colour: str, gid: str) -> bool:
    axes.set_ylabel("top-1, %")
    epochs, top1 = _known(run.evaluations["epoch"], run.evaluations["top1"])
    axes.plot(epochs, top1, color=colour, gid=gid, **_dots(epochs))
    return bool(len(epochs))


def _loss_limit(runs: Sequence[Run]) -> float | None:
    """Upper end of the loss axis that keeps the other runs readable if one diverged; None if all losses fit."""
    highest, limit = 0.0, 0.0
    for run in runs:
        _, training = _thinned(run.steps["epoch"], run.steps["loss"])
        _, validation = _known(run.evaluations["epoch"], run.evaluations["val_loss"])
        if len(training):
            most = float(training.max())
            limit = max(limit, most if most <= _DIVERGED_FACTOR * training[0] else float(training[0]))
        highest = max([highest, *training, *validation])
    return 1.15 * limit if 0 < _DIVERGED_FACTOR * limit < highest else None


def _loss(axes: Axes, run: Run, colour: str, gid: str, *, limit: float | None) -> bool:
    axes.set_ylabel("loss")
    epochs, loss = _thinned(run.steps["epoch"], run.steps["loss"])
    axes.plot(epochs, loss, color=colour, lw=1.1, alpha=0.75, gid=gid, **_dots(epochs))
    evaluated, validation = _known(run.evaluations["epoch"], run.evaluations["val_loss"])
    axes.plot(evaluated, validation, "o", color=colour, ms=3.2, mfc="white", mew=1.1, gid=gid)
    if limit is not None:
        axes.set_ylim(0, limit)
        for x, y, face in ((epochs, loss, colour), (evaluated, validation, "white")):
            left = x[y > limit][:1]
            axes.plot(left, [0.975 * limit] * len(left), "^", color=colour, ms=6, mfc=face, gid=gid)
    return bool(len(epochs) or len(evaluated))


def _series(column: str, label: str) -> Callable[[Axes, Run, str, str], bool]:
    def plot(axes: Axes, run: Run, colour: str, gid: str) -> bool:
        epochs, values = _thinned(run.steps["epoch"], run.steps[column])
        axes.plot(epochs, values, color=colour, gid=gid, **_dots(epochs))
        axes.set_ylabel(label)
        return bool(len(epochs))

    return plot


def _noise(axes: Axes, run: Run, colour: str, gid: str) -> bool:
    axes.set_yscale("log")
    axes.set_ylabel("images")
    epochs, scale = _thinned(run.steps["epoch"], run.steps["noise_scale"], logarithmic=True)
    axes.plot(epochs, scale, color=colour, gid=gid, **_dots(epochs))
    ended, batches = _known(run.steps["epoch"], run.batches)
    if len(epochs) and len(batches):
        last = np.flatnonzero(np.diff(batches, append=np.nan))  # steps of a batch
        corners = np.append(0.0, ended[last]), np.append(batches[0], batches[last])
        axes.plot(*corners, color=colour, lw=1.1, ls=(0, (4, 3)), alpha=0.8, gid=gid, drawstyle="steps-pre")
    return bool(len(epochs))


def _time_split(runs: Sequence[Run]) -> Picture | None:
    known = [(run, run.results()) for run in runs]
    known = [(run, results) for run, results in known if results["train_s"]]
    if not known:
        return None
    title = "Where the time of a step goes"
    caption = ("Waiting for images, computing, and communication that computing does not hide; communication during "
               "the backward pass is part of computing.")  # fmt: skip
    with _styled():
        figure = _figure(4.9, max(3.1, 1.0 + 0.28 * len(known)))
        axes = figure.subplots()
        for row, (run, results) in enumerate(known):
            data, comm = results["data_fraction"] or 0.0, results["exposed_comm_fraction"] or 0.0
            left = 0.0
            for share, colour in ((data, _DATA), (1 - data - comm, _COMPUTE), (comm, _COMM)):
                axes.barh(row, 100 * share, left=left, height=min(0.62, 0.2 * len(known)), color=colour)
                left += 100 * share
            step = (results["train_s"] or 0.0) / len(run.steps["step"])
            axes.text(101.5, row, f"{step:.3g} s", va="center", fontsize=8, color="#475569")
        axes.set_yticks(range(len(known)), [_short(run.name, 22) for run, _ in known])
        axes.set(xlabel="% of a step; on the right, its mean time", xlim=(0, 100), ylim=(len(known) - 0.4, -0.6))
        axes.grid(axis="y", visible=False)
        kinds = {"data": _DATA, "computing": _COMPUTE, "communication": _COMM}
        handles = [Patch(color=colour, label=kind) for kind, colour in kinds.items()]
        figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=8.5, frameon=False)
        svg = _svg(figure, "time", runs)
        return Picture("time", title, caption, svg, _files(figure, title))


def _trust(run: Run, index: int, count: int) -> Picture | None:
    trust = run.trust_ratios
    if trust is None or not any((values > 0).any() for values in trust.ratios.values()):
        return None
    of_run = f" of {_short(run.name)}" if count > 1 else ""
    title = f"Trust ratios by layer{of_run}"
    caption = ("What LARS scales each layer's learning rate by. Left, weights alone, from the first layer (dark) to "
               "the last (light); right, all that is adapted, in the order of the network. White where a norm is zero, "
               "and the rate the global one.")  # fmt: skip
    rows = sum(len(names) for names in trust.names.values())
    with _styled():
        figure = _figure(10.2, min(7.0, max(3.3, 1.2 + 0.11 * rows)))
        lines, *maps = _trust_axes(figure, trust)
        shades = colormaps["viridis"](np.linspace(0, 0.92, len(trust.names.get("weight", []))))
        for column, colour in enumerate(shades):
            ratios = trust.ratios["weight"][:, column]
            epochs, ratios = _thinned(trust.epochs, ratios, logarithmic=True)
            lines.plot(epochs, ratios, color=colour, lw=1.2, **_dots(epochs))
        lines.set_yscale("log")
        lines.set(xlabel="epoch", ylabel="trust ratio", title="weights")
        lines.margins(x=0.02)
        known = np.concatenate([values[values > 0] for values in trust.ratios.values()])
        low, high = np.percentile(known, (1, 99))
        scale = LogNorm(low, max(high, low * 1.01))
        for axes, (kind, names) in zip(maps, trust.names.items(), strict=True):
            epochs, values = _binned(trust, kind)
            mesh = axes.pcolormesh(epochs, np.arange(len(names) + 1), values.T, norm=scale, cmap="viridis",
                                   rasterized=True)  # fmt: skip
            every = -(-len(names) // max(2, _MAX_LAYER_NAMES * len(names) // rows))
            axes.set_yticks(np.arange(0, len(names), every) + 0.5,
                            [_short(name, 28) for name in names[::every]], fontsize=7)  # fmt: skip
            axes.tick_params(axis="y", length=0)
            axes.invert_yaxis()
            axes.grid(visible=False)
            axes.set_ylabel(kind, fontsize=8)
            axes.tick_params(axis="x", labelbottom=axes is maps[-1])
        maps[-1].set_xlabel("epoch")
        bar = figure.colorbar(mesh, ax=maps, pad=0.015, aspect=30)
        bar.outline.set_visible(False)
        _number_decades(bar.ax.yaxis, low, high)
        _number_decades(lines.yaxis, *lines.get_ylim())
        name = f"trust-ratios-{index + 1}" if count > 1 else "trust-ratios"
        return Picture(name, title, caption, _svg(figure, name, [run]), _files(figure, title), wide=True)


def _trust_axes(figure: Figure, trust: TrustRatios) -> list[Axes]:
    """The axes of the lines, and under each other those of the kinds, as high as they have parameters."""
    heights = [max(len(names), 4) for names in trust.names.values()]
    grid = figure.add_gridspec(len(heights), 2, width_ratios=(1, 1.25), height_ratios=heights)
    lines = figure.add_subplot(grid[:, 0])
    first = figure.add_subplot(grid[0, 1])
    return [lines, first, *(figure.add_subplot(grid[row, 1], sharex=first) for row in range(1, len(heights)))]


def _binned(trust: TrustRatios, kind: str) -> tuple[Column, Column]:
    """Edges of epochs and the geometric means between them: no more columns than a picture has."""
    values = np.where(trust.ratios[kind] > 0, trust.ratios[kind], np.nan)
    parts = np.array_split(np.arange(len(trust.epochs)), min(_MAX_POINTS, len(trust.epochs)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        means = np.array([np.exp(np.nanmean(np.log(values[part]), axis=0)) for part in parts])
    return np.array([0.0, *(trust.epochs[part[-1]] for part in parts)]), np.ma.masked_invalid(means)


def _number_decades(axis: Axis, low: float, high: float) -> None:
    """Numbers a logarithmic axis in figures, since formulas are not set; within few decades 2 and 5 too."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axis.set_minor_formatter(NullFormatter())


def _known(x: Column, y: Column) -> tuple[Column, Column]:
    known = np.isfinite(x) & np.isfinite(y)
    return x[known], y[known]


def _thinned(x: Column, y: Column, *, logarithmic: bool = False) -> tuple[Column, Column]:
    """The points that are known, or where they are many, means of neighbours; geometric ones of what is positive."""
    x, y = _known(x, y)
    if logarithmic:
        x, y = x[y > 0], np.log(y[y > 0])
    if len(x) > _MAX_POINTS:
        x, y = (np.array([part.mean() for part in np.array_split(column, _MAX_POINTS)]) for column in (x, y))
    return x, np.exp(y) if logarithmic else y


def _dots(x: Column) -> dict[str, Any]:
    # A line through one point shows nothing.
    return {"marker": "o", "markersize": 3.5} if len(x) <= _MAX_MARKERS else {}


def _short(name: str, longest: int = _MAX_NAME_LENGTH) -> str:
    return name if len(name) <= longest else f"{name[: longest // 2 - 1]}…{name[-longest // 2 :]}"


def _files(figure: Figure, title: str) -> dict[str, bytes]:
    figure.suptitle(title, fontsize=10.5, color="#0f172a")
    files = {}
    for kind in ("svg", "png"):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else {})
        files[kind] = buffer.getvalue()
    return files


def _svg(figure: Figure, name: str, runs: Sequence[Run]) -> str:
    """The figure as an element for a page that has others: its ids are its own, and groups of runs have a class."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == f"{{{_SVG}}}metadata":
                parent.remove(child)
    for element in root.iter():
        own = element.get("id", "")
        if own.startswith("run-"):
            element.set("class", own)
            del element.attrib["id"]
            tip = ElementTree.Element(f"{{{_SVG}}}title")
            tip.text = runs[int(own.removeprefix("run-"))].name
            element.insert(0, tip)
        for key, value in element.attrib.items():
            if key == "id":
                element.set(key, f"{name}-{value}")
            elif key == f"{{{_XLINK}}}href" and value.startswith("#"):
                element.set(key, f"#{name}-{value[1:]}")
            elif "url(#" in value:
                element.set(key, value.replace("url(#", f"url(#{name}-"))
    del root.attrib["width"], root.attrib["height"]
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    return ElementTree.tostring(root, encoding="unicode")
