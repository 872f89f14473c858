"""Metadata of a file of weights, written by ``export``. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from knltrain.config import RunConfig, override


class About(NamedTuple):
    """The network of a file of weights, and the images that it is evaluated on.

    Attributes:
        model: name of the network.
        classes: names of the classes, in the order of the logits.
        image_size: height and width of an image, pixels.
        resize: short side, in pixels, to which images are scaled before cropping.
    """

    model: str
    classes: Sequence[str]
    image_size: int
    resize: int

    def as_metadata(self) -> dict[str, str]:
        """Returns the fields as strings, the only type that safetensors and ONNX support."""
        return {"model": self.model, "classes": json.dumps(list(self.classes)), "image_size": str(self.image_size),
                "resize": str(self.resize)}  # fmt: skip


def about(path: Path) -> About | None:
    """Reads the metadata of a safetensors file; None if it has none."""
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
        classes = json.loads(metadata["classes"])
        if not isinstance(classes, list):
            return None
        return About(metadata["model"], classes, int(metadata["image_size"]), int(metadata["resize"]))
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError):
        return None


def as_trained(config: RunConfig, state: dict[str, Any]) -> RunConfig:
    """Returns the configuration with the network and image sizes of a checkpoint's state.json."""
    fields = {"model": state["model"], "image_size": state["image_size"], "augment.resize": state["resize"]}
    return override(config, {**fields, "dropout": state["dropout"]})
