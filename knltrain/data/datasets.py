"""Opening the data set of a configuration, in any format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from knltrain.config import RunConfig
from knltrain.data.classes import ALL_CLASSES, ClassChoice, look, read_choice, some
from knltrain.data.folder import DataError, Folder
from knltrain.data.manifest import read_manifest
from knltrain.data.packed import Packed
from knltrain.data.parts import find_part, nothing_found
from knltrain.data.shapes import shapes_folder
from knltrain.data.synthetic import Synthetic
from knltrain.data.tar import Tar
from knltrain.errors import ConfigError

if TYPE_CHECKING:  # its module loads torch, which prepare does without
    from knltrain.data.loader import Dataset

# Images decoded at start-up: enough to detect a data set that is mostly bad, without a noticeable delay.
_NUM_CHECKED = {"train": 256, "val": 64}


def open_part(config: RunConfig, part: str, choice: ClassChoice | None = None) -> Dataset:
    """Opens the ``train`` or ``val`` part of a configuration's data, and decodes a sample of it.

    Args:
        config: names the data, and which classes of it are used.
        part: ``train`` or ``val``.
        choice: the classes, instead of those that the configuration names.

    Raises:
        ConfigError: no data was given, it has not the classes that are asked for, or prepared images are too small.
        DataError: it is missing, empty, or an image cannot be decoded.
    """
    if not config.data:
        raise ConfigError(
            "no data: give --data FOLDER (train/CLASS and val/CLASS, tar shards, or output of knltrain prepare), "
            "synthetic or shapes"
        )
    choice = choice or read_choice(config.class_order, config.classes)
    if config.data == "synthetic":
        if choice.order or choice.only is not None:
            raise ConfigError("classes and class-order have no effect on synthetic data, whose labels are arbitrary")
        synthetic = Synthetic(part, config.resize)
        choice.arrange(synthetic.classes, "synthetic")  # refuses a network of other classes
        return synthetic
    root = shapes_folder() if config.data == "shapes" else Path(config.data)
    dataset = open_folder(root, part, choice)
    if isinstance(dataset, Packed) and dataset.size < config.image_size:
        raise ConfigError(
            f"{root} holds images of {dataset.size} pixels, smaller than image-size {config.image_size}; prepare it "
            "again with a larger --size"
        )
    if config.on_bad == "fail":
        dataset.check(_NUM_CHECKED[part])
    return dataset


def open_folder(root: Path, part: str, choice: ClassChoice = ALL_CLASSES) -> Folder | Packed | Tar:
    """Opens one part of a folder: output of ``knltrain prepare``, tar shards, or a folder for each class.

    Raises:
        ConfigError: it has not the classes that are asked for.
        DataError: it is missing, empty, damaged or incomplete.
    """
    manifest = read_manifest(root)
    if manifest is not None:
        return Packed(root, part, manifest, choice) if manifest.format == "raw" else Tar(root, part, choice)
    place = find_part(root, part) if root.is_dir() else None
    if place is None:
        raise nothing_found(root, part)
    if place.shards or place.folder is None:
        return Tar(root, part, choice)
    return Folder(place.folder, choice, place.remarks)


def open_data(config: RunConfig) -> tuple[Dataset, Dataset]:
    """Opens both parts.

    Raises:
        ConfigError: no data was given, or it has not the classes that are asked for.
        DataError: a part cannot be used, or the two have different classes.
    """
    train, val = open_part(config, "train"), open_part(config, "val")
    refuse_other_classes(config.data, train.classes, val.classes)
    return train, val


def refuse_other_classes(where: object, train: Sequence[str], val: Sequence[str]) -> None:
    """Compares the classes of both parts.

    Args:
        where: the data, for the message.
        train: names in the order of their numbers.
        val: names in the order of their numbers.

    Raises:
        DataError: they differ; says in what.
    """
    if list(train) == list(val):
        return
    parts = (("train", train, "val", val), ("val", val, "train", train))
    lacking = [(sorted({*one} - {*other}), part, others) for part, one, others, other in parts]
    said = [
        f"{some(names)} {'is' if len(names) == 1 else 'are'} in {part} and not in {other}"
        for names, part, other in lacking if names
    ]  # fmt: skip
    if not said:
        raise DataError(f"{where}: train and val have the same classes in another order; --class-order gives one")
    looks = {look(name): name for name in lacking[1][0]}
    if alike := [(name, looks[look(name)]) for name in lacking[0][0] if look(name) in looks]:
        said.append(f"{alike[0][0]!a} and {alike[0][1]!a} look alike: rename one")
    raise DataError(
        f"{where}: train has {len(train):,} classes, val {len(val):,}; {'; '.join(said)}; --classes FILE restricts "
        "both to the classes that it lists"
    )


def remarks_of(*datasets: Dataset) -> list[str]:
    """Returns what people should know of open data sets, each sentence once."""
    return list(dict.fromkeys(remark for dataset in datasets for remark in dataset.remarks))
