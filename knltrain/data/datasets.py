"""Opening the data set of a configuration, in any format."""

from __future__ import annotations

from pathlib import Path

from knltrain.config import RunConfig
from knltrain.data.folder import DataError, Folder
from knltrain.data.loader import Dataset
from knltrain.data.manifest import read_manifest
from knltrain.data.packed import Packed
from knltrain.data.shapes import shapes_folder
from knltrain.data.synthetic import Synthetic
from knltrain.data.tar import Tar, shards_of
from knltrain.errors import ConfigError

# Images decoded at start-up: enough to detect a data set that is mostly bad, without a noticeable delay.
_NUM_CHECKED = {"train": 256, "val": 64}


def open_part(config: RunConfig, part: str) -> Dataset:
    """Opens the ``train`` or ``val`` part of a configuration's data, and decodes a sample of it.

    Raises:
        ConfigError: no data was given, or prepared images are too small.
        DataError: it is missing, empty, or an image cannot be decoded.
    """
    if not config.data:
        raise ConfigError(
            "no data: give --data FOLDER (train/CLASS and val/CLASS, tar shards, or output of knltrain prepare), "
            "synthetic or shapes"
        )
    if config.data == "synthetic":
        return Synthetic(part, config.resize)
    root = shapes_folder() if config.data == "shapes" else Path(config.data)
    dataset = open_folder(root, part)
    if isinstance(dataset, Packed) and dataset.size < config.image_size:
        raise ConfigError(
            f"{root} holds images of {dataset.size} pixels, smaller than image-size {config.image_size}; prepare it "
            "again with a larger --size"
        )
    if config.on_bad == "fail":
        dataset.check(_NUM_CHECKED[part])
    return dataset


def open_folder(root: Path, part: str) -> Folder | Packed | Tar:
    """Opens one part of a folder: output of ``knltrain prepare``, tar shards, or a folder for each class.

    Raises:
        DataError: it is missing, empty, damaged or incomplete.
    """
    manifest = read_manifest(root)
    if manifest is not None and manifest.format == "raw":
        return Packed(root, part, manifest)
    if manifest is not None or shards_of(root, part):
        return Tar(root, part)
    return Folder(root / part)


def open_data(config: RunConfig) -> tuple[Dataset, Dataset]:
    """Opens both parts.

    Raises:
        ConfigError: no data was given.
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
