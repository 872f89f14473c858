"""Cache of measurements on this kind of node.

``knltrain tune`` stores the fastest engine and layout of ranks; any run stores the fastest algorithm of each
convolution.

A file is a list of measurements, each with its settings and results. A measurement is used if its settings include
those requested, so settings that a later version adds do not invalidate it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import knltrain
from knltrain.errors import KnltrainError
from knltrain.files import cache_folder, open_regular, replacing, says_absent
from knltrain.node.layouts import Layout
from knltrain.node.topology import Node

# Bound of the numbers in a layout that is read.
_MAX_LAYOUT_NUMBER = 1 << 31


def measured_file() -> Path:
    """Returns the file of tuning measurements."""
    return cache_folder() / "measured.json"


def convolutions_file() -> Path:
    """Returns the file of convolution measurements."""
    return cache_folder() / "convolutions.json"


def settings_of(model: str, precision: str, node: Node, threads: int) -> dict[str, object]:
    """Returns the settings that a measurement depends on: it does not apply if one of them differs."""
    return {
        "model": model,
        "precision": precision,
        "cpu": node.cpu_model,
        "isa": os.environ.get("KNLTRAIN_ISA") or node.isa,
        "threads": threads,
        # Not torch.__version__: on a login node torch is not loaded.
        "torch": importlib.metadata.version("torch"),
        "knltrain": knltrain.__version__,
    }


def stored_engine(model: str, precision: str, node: Node, threads: int) -> str | None:
    """Returns the fastest engine in the last measurement of ``knltrain tune`` with these settings, or None.

    A file that cannot be read, or was not written by knltrain, is ignored with a warning.

    Args:
        model: as a configuration names it.
        precision: bf16 or fp32.
        node: the node that it will run on.
        threads: compute threads of a rank.
    """
    settings = settings_of(model, precision, node, threads)
    found = [one["fastest"] for one in _tuned() if settings.items() <= one["settings"].items()]
    return str(found[-1]) if found else None


def measured_rates(precision: str, node: Node, threads: int) -> dict[str, float]:
    """Returns images/s, with the fastest engine, of each model that ``knltrain tune`` has measured."""
    rates = {}
    for one in _tuned():
        model = str(one["settings"].get("model"))
        if settings_of(model, precision, node, threads).items() <= one["settings"].items():
            rows = one.get("engines")
            rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
            found = [row.get("images_per_s") for row in rows if row.get("engine") == one["fastest"]]
            if found and isinstance(found[0], float):
                rates[model] = found[0]
    return rates


@dataclass(frozen=True)
class MeasuredLayout:
    """The fastest layout, and its measurement.

    Attributes:
        layout: ranks, threads, cores for communication, local batch.
        of: model, batch and day of the measurement, for people.
    """

    layout: Layout
    of: str


def layout_settings(model: str, precision: str, node: Node, layout: Layout) -> dict[str, object]:
    """Returns the settings of a layout measurement: those of :func:`settings_of`, and the node's topology."""
    return {
        **settings_of(model, precision, node, layout.threads),
        "ranks_per_node": layout.ranks_per_node,
        "cores": len(node.cores),
        "domains": len(node.domains),
    }


def stored_layout(node: Node) -> MeasuredLayout | None:
    """Returns the fastest layout in the last measurement of ``knltrain tune`` on such a node, or None.

    The model does not matter: ranks are placed before it is known.
    """
    for one in reversed(_tuned()):
        try:
            layout = Layout(**one["layout"])
            settings, here = one["settings"], layout_settings("", "", node, layout)
        except (KeyError, TypeError, importlib.metadata.PackageNotFoundError):
            continue  # from a version without layouts; malformed; or torch is not installed
        good = all(isinstance(number, int) and 0 <= number < _MAX_LAYOUT_NUMBER for number in vars(layout).values())
        wanted = {name: value for name, value in here.items() if name not in ("model", "precision")}
        if good and layout.ranks_per_node and layout.threads and wanted.items() <= settings.items():
            of = f"{settings.get('model')} at batch {settings.get('batch')} ({str(one.get('time'))[:10]})"
            return MeasuredLayout(layout, of)
    return None


def check_writable() -> None:
    """Checks that :func:`store` will be able to write, before anything is measured.

    Raises:
        KnltrainError: the cache folder cannot be written.
    """
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        _require_readable(measured_file())
    except OSError as error:
        raise KnltrainError(f"{folder}: {error.strerror}; set KNLTRAIN_CACHE to a folder that can be written") from None


def store(settings: Mapping[str, object], result: Mapping[str, object]) -> Path:
    """Adds a measurement, or replaces the one with the same settings. The file is replaced atomically.

    Args:
        settings: those of :func:`settings_of`, and others that distinguish measurements.
        result: the measured values; ``fastest`` names the engine.

    Returns:
        The file.
    """
    path = measured_file()
    _add(path, _tuned(), settings, result)
    return path


def stored_convolutions(settings: Mapping[str, object]) -> dict[str, list[str]] | None:
    """Returns, by convolution, the results that knltrain's kernels compute faster with these settings, or None.

    Args:
        settings: those of :func:`settings_of`, and others that distinguish measurements.
    """
    measured = _read(convolutions_file(), "native", dict, "the next run")
    found = [one["native"] for one in measured if one["settings"] == settings]
    return found[-1] if found else None


def store_convolutions(settings: Mapping[str, object], native: Mapping[str, Sequence[str]]) -> None:
    """Adds a measurement of convolutions; if it cannot be written, warns that each run will measure again.

    Args:
        settings: as for :func:`stored_convolutions`.
        native: by convolution, the results that knltrain's kernels compute faster.
    """
    path = convolutions_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _add(path, _read(path, "native", dict, "this run"), settings, {"native": dict(native)})
    except OSError as error:
        warnings.warn(f"{path}: {error.strerror}: convolutions are measured again at each start; set KNLTRAIN_CACHE to "
                      "a folder that can be written", stacklevel=2)  # fmt: skip


def _add(
    path: Path, before: Sequence[Mapping[str, Any]], settings: Mapping[str, object], result: Mapping[str, object]
) -> None:
    _require_readable(path)
    kept = [one for one in before if one["settings"] != settings]
    text = json.dumps([*kept, {"settings": dict(settings), **result}], indent=2) + "\n"
    with replacing(path) as file:
        file.write(text.encode())


def _require_readable(path: Path) -> None:
    """Raises OSError for a file that cannot be read now: what it holds would be lost with a new one in its place."""
    try:
        open_regular(path).close()
    except OSError as error:
        if not says_absent(error):
            raise


def _tuned() -> list[dict[str, Any]]:
    return _read(measured_file(), "fastest", str, "`knltrain tune`")


def _read(path: Path, result: str, kind: type, writer: str) -> list[dict[str, Any]]:
    try:
        with open_regular(path) as file:
            measurements = json.loads(file.read())
        if isinstance(measurements, list) and all(
            isinstance(one["settings"], dict) and isinstance(one[result], kind) for one in measurements
        ):
            return measurements
        problem = "not what knltrain writes"
    except FileNotFoundError:
        return []
    except OSError as error:
        if not says_absent(error):
            warnings.warn(f"{path}: {error.strerror}: it is not used", stacklevel=3)
            return []
        problem = str(error.strerror)
    except (ValueError, TypeError, KeyError, RecursionError):
        problem = "damaged, or not what knltrain writes"
    warnings.warn(f"{path}: {problem}; ignored. {writer} writes it anew", stacklevel=3)
    return []
