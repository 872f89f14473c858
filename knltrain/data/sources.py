"""Sources of ``knltrain prepare``: folders of images, WebDataset's tar files, and ImageNet's archives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from knltrain.data.classes import ALL_CLASSES, ClassChoice
from knltrain.data.datasets import open_folder, refuse_other_classes
from knltrain.data.folder import SUFFIXES
from knltrain.data.left_out import LeftOut, ignored_in
from knltrain.data.manifest import read_manifest
from knltrain.data.packed import Packed
from knltrain.data.parts import IMAGENET, NAMES, find_part, instead
from knltrain.data.tar_index import Member, members
from knltrain.data.truth import find_truth, no_truth
from knltrain.errors import ConfigError, DataError
from knltrain.files import open_regular


@dataclass(frozen=True)
class Source:
    """The encoded images of one part.

    Attributes:
        classes: names, in the order of their numbers.
        labels: class number of every image.
        where: function from an image's index to its file, offset and size in bytes; -1 for the rest of the file.
        name: function from an image's index to its name for messages.
        remarks: what of the source is left out, for people.
    """

    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    where: Callable[[int], tuple[str, int, int]]
    name: Callable[[int], str]
    remarks: tuple[str, ...] = ()


def find_sources(root: Path, choice: ClassChoice = ALL_CLASSES) -> dict[str, Source]:
    """Returns the sources in a folder, by part.

    Args:
        root: the folder.
        choice: which classes are used, and their order.

    Raises:
        ConfigError: there is no such folder, no known format in it, or it has not the classes that are asked for.
        DataError: its contents are damaged or inconsistent.
    """
    if not root.is_dir():
        raise ConfigError(f"{root}: a file; give a folder" if root.exists() else f"{root}: no such folder")
    manifest = read_manifest(root)
    if manifest is not None and manifest.format == "raw":
        raise ConfigError(f"{root} holds images of {manifest.size} pixels already; prepare their source instead")
    parts: dict[str, Source] = {}
    for part in NAMES:
        if (root / IMAGENET[part]).exists():
            parts[part] = _archive(root, part, choice)
        elif (manifest is None or part in manifest.shards) and find_part(root, part) is not None:
            dataset = open_folder(root, part, choice)
            assert not isinstance(dataset, Packed)
            parts[part] = Source(dataset.classes, dataset.labels, dataset.where, dataset.name, dataset.remarks)
    if not parts:
        raise ConfigError(
            f"{root}: nothing to prepare; it must hold train/CLASS/IMAGE and val/CLASS/IMAGE, train-*.tar and "
            f"val-*.tar, or {IMAGENET['train']} and {IMAGENET['val']}{instead(root, 'train')}"
        )
    if len(parts) == 2:
        refuse_other_classes(root, parts["train"].classes, parts["val"].classes)
    return parts


def _archive(root: Path, part: str, choice: ClassChoice) -> Source:
    """Reads one of ImageNet's archives: with a tar file for each class, or with all validation images."""
    path, left_out = root / IMAGENET[part], LeftOut()
    try:
        with open_regular(path) as file:
            entries = _train_entries(file, left_out) if part == "train" else _val_entries(path, file, left_out)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; see that it can be read") from None
    classes = choice.arrange(sorted({entry.wnid for entry in entries}), path)
    numbers = {name: number for number, name in enumerate(classes)}
    kept = [entry for entry in entries if entry.wnid in numbers]
    beside = [f"{root}: {path.name} is read, and nothing else of the {part} part"] if find_part(root, part) else []
    return Source(
        classes,
        np.array([numbers[entry.wnid] for entry in kept], np.int64),
        where=lambda index: (str(path), kept[index].offset, kept[index].size),
        name=lambda index: f"{path}: {kept[index].name}",
        remarks=(*beside, *left_out.remarks(path)),
    )


class _Entry(NamedTuple):
    """An image in an archive."""

    wnid: str
    name: str
    offset: int
    size: int


def _train_entries(file: IO[bytes], left_out: LeftOut) -> list[_Entry]:
    entries = []
    for member in list(_wanted(members(file), left_out)):
        inner = members(file, member.offset, member.offset + member.size)
        entries += [_Entry(Path(member.name).stem, *image) for image in _images(inner, left_out)]
    if not entries:
        raise DataError(f"{file.name}: no tar files of classes in it")
    return sorted(entries)


def _val_entries(path: Path, file: IO[bytes], left_out: LeftOut) -> list[_Entry]:
    images = sorted(_images(members(file), left_out))
    found = find_truth(path, {Path(image.name).stem for image in images})
    if found is None:
        raise no_truth(path)
    truth, listed_in = found
    for image in images:
        if Path(image.name).stem not in truth:
            raise DataError(f"{listed_in}: {image.name} is not listed")
    return [_Entry(truth[Path(image.name).stem], *image) for image in images]


def _wanted(found: Iterable[Member], left_out: LeftOut) -> Iterator[Member]:
    for member in found:
        if ignored := ignored_in(member.name):
            left_out.ignore(ignored)
        else:
            yield member


def _images(found: Iterable[Member], left_out: LeftOut) -> Iterator[Member]:
    for member in _wanted(found, left_out):
        if not left_out.see(member.name) and member.name.lower().endswith(SUFFIXES):
            yield member
