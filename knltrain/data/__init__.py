"""Images in, batches out."""

from __future__ import annotations

from pathlib import Path

from knltrain.config import RunConfig
from knltrain.data.folder import DataError, Folder
from knltrain.data.loader import Dataset
from knltrain.data.shapes import shapes_folder
from knltrain.data.synthetic import Synthetic
from knltrain.errors import ConfigError

# Decoded at start-up: enough to notice a data set that is bad throughout, too few to delay a start.
_CHECKED = {"train": 256, "val": 64}


def open_part(config: RunConfig, part: str) -> Dataset:
    """Opens the ``train`` or ``val`` part of the data that a configuration names, and decodes a sample of it.

    Raises:
        ConfigError: no data was named.
        DataError: it is missing, empty, or holds an image that is none.
    """
    if not config.data:
        raise ConfigError("no data: give --data FOLDER (with train/CLASS and val/CLASS in it), synthetic or shapes")
    if config.data == "synthetic":
        return Synthetic(part, config.resize)
    dataset = Folder((shapes_folder() if config.data == "shapes" else Path(config.data)) / part)
    dataset.check(_CHECKED[part])
    return dataset


def open_data(config: RunConfig) -> tuple[Dataset, Dataset]:
    """Opens both parts.

    Raises:
        ConfigError: no data was named.
        DataError: a part cannot be used, or the two have different classes.
    """
    train, val = open_part(config, "train"), open_part(config, "val")
    if train.classes != val.classes:
        only_train, only_val = set(train.classes) - set(val.classes), set(val.classes) - set(train.classes)
        name, part, other = (min(only_train), "train", "val") if only_train else (min(only_val), "val", "train")
        raise DataError(
            f"{config.data}: train has {len(train.classes)} classes, val {len(val.classes)}; "
            f"{name!r} is in {part} and not in {other}"
        )
    return train, val
