"""What a file of weights says of itself: the metadata that ``export`` gives it. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from knltrain.config import RunConfig, override


class About(NamedTuple):
    """The network that weights are of, and the images that it is evaluated on.

    Attributes:
        model: its name.
        classes: their names, in the order of the logits.
        image_size: pixels of an image.
        resize: short side, in pixels, that images are scaled to before they are cropped.
    """

    model: str
    classes: Sequence[str]
    image_size: int
    resize: int

    def as_metadata(self) -> dict[str, str]:
        """As text, which is all that safetensors and ONNX have place for."""
        return {"model": self.model, "classes": json.dumps(list(self.classes)), "image_size": str(self.image_size),
                "resize": str(self.resize)}  # fmt: skip


def about(path: Path) -> About | None:
    """Reads it from a safetensors file; None where there is none, as in files of others."""
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, "numpy") as file:
            said = file.metadata() or {}
        classes = json.loads(said["classes"])
        if not isinstance(classes, list):
            return None
        return About(said["model"], classes, int(said["image_size"]), int(said["resize"]))
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError):
        return None


def as_trained(config: RunConfig, state: dict[str, Any]) -> RunConfig:
    """The configuration with what a checkpoint's state.json says of its network and of the images that it sees."""
    fields = {"model": state["model"], "image_size": state["image_size"], "augment.resize": state["resize"]}
    return override(config, {**fields, "dropout": state["dropout"]})
