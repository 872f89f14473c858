"""Metadata of a file of weights, written by ``export``. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from knltrain.config import RunConfig, override
from knltrain.errors import ConfigError
from knltrain.files import naming, open_regular

# safetensors' own bound.
_MAX_HEADER_BYTES = 100_000_000


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
    """Reads the metadata of a safetensors file; None if it has none.

    Raises:
        ConfigError: it is no file of weights.
        OSError: it cannot be read now.
    """
    with naming(path), open_regular(path) as opened:
        start = opened.read(9)
    if not is_safetensors(path):
        # torch.save writes a zip file, or before version 1.6 a pickle, which begins with its protocol.
        if not start.startswith((b"PK", b"\x80")):
            what = "not weights: neither safetensors nor a file by torch.save" if start else "empty"
            raise ConfigError(f"{path} is {what}; give a run's folder, a checkpoint, or a file of weights")
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


def is_safetensors(path: Path) -> bool:
    """Whether a file is to be read as safetensors: by its suffix, or by how it begins."""
    if path.suffix == ".safetensors":
        return True
    with naming(path), open_regular(path) as file:
        start = file.read(9)
    return start[8:] == b"{" and 2 <= int.from_bytes(start[:8], "little") <= _MAX_HEADER_BYTES


def as_trained(config: RunConfig, state: dict[str, Any]) -> RunConfig:
    """Returns the configuration with the network and image sizes of a checkpoint's state.json."""
    fields = {"model": state["model"], "image_size": state["image_size"], "augment.resize": state["resize"]}
    return override(config, {**fields, "dropout": state["dropout"]})
