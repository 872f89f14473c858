"""Measures what can be measured only here, and keeps the result for ``auto``."""

from __future__ import annotations

import datetime
from typing import Any

from knltrain.bench.compare import compare
from knltrain.config import RunConfig
from knltrain.console import Console
from knltrain.node.measured import check_writable, settings_of, store
from knltrain.node.topology import read_node


def tune(config: RunConfig, console: Console, *, steps: int) -> dict[str, Any]:
    """Measures every engine that runs on this node and stores the fastest.

    Args:
        config: model, image size, global batch and precision.
        console: where to show the table while it fills.
        steps: how many steps of each engine are timed.

    Returns:
        What :func:`knltrain.bench.compare.compare` returns, ``fastest``, the engine of the shortest median step, and
        ``stored``, the file that now knows it.

    Raises:
        ConfigError: this machine cannot do what was asked for.
        KnltrainError: no engine runs here, or the cache folder cannot be written.
    """
    check_writable()
    result = compare(config, console, steps=steps)
    measured = [row for row in result["engines"] if "images_per_s" in row]
    fastest = max(measured, key=lambda row: row["images_per_s"])["engine"]
    settings = {
        **settings_of(config.model, result["precision"], read_node(), result["threads"]),
        "batch": result["batch"],
        "image_size": result["image_size"],
        "optimizer": result["optimizer"],
    }
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    path = store(settings, {"fastest": fastest, "engines": result["engines"], "steps": steps, "time": now})
    return {**result, "fastest": fastest, "stored": str(path)}
