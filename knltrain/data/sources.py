"""Sources of ``knltrain prepare``: folders of images, WebDataset's tar files, and ImageNet's archives."""

from __future__ import annotations

import csv
import io
import re
import tarfile
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from knltrain.data.folder import SUFFIXES, DataError, Folder
from knltrain.data.manifest import read_manifest
from knltrain.data.tar import Tar, members, shards_of
from knltrain.errors import ConfigError
from knltrain.files import open_regular

IMAGENET_TRAIN, IMAGENET_VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
_WNID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Source:
    """The encoded images of one part.

    Attributes:
        classes: names, in the order of their numbers.
        labels: class number of every image.
        where: function from an image's index to its file, offset and size in bytes; -1 for the rest of the file.
        name: function from an image's index to its name for messages.
    """

    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    where: Callable[[int], tuple[str, int, int]]
    name: Callable[[int], str]


def find_sources(root: Path) -> dict[str, Source]:
    """Returns the sources in a folder, by part.

    Raises:
        ConfigError: there is no such folder, or no known format in it.
        DataError: its contents are damaged or inconsistent.
    """
    if not root.is_dir():
        raise ConfigError(f"{root}: no such folder")
    manifest = read_manifest(root)
    if manifest is not None and manifest.format == "raw":
        raise ConfigError(f"{root} holds images of {manifest.size} pixels already; prepare their source instead")
    if (root / IMAGENET_TRAIN).exists() or (root / IMAGENET_VAL).exists():
        return _imagenet(root)
    parts: dict[str, Source] = {}
    for part in ("train", "val"):
        if shards_of(root, part):
            tar = Tar(root, part)
            parts[part] = Source(tar.classes, tar.labels, tar.where, tar.name)
        elif (root / part).is_dir():
            folder = Folder(root / part)
            parts[part] = Source(folder.classes, folder.labels, folder.where, folder.name)
    if not parts:
        raise ConfigError(
            f"{root}: nothing to prepare; it must hold train/CLASS/IMAGE and val/CLASS/IMAGE, train-*.tar and "
            f"val-*.tar, or {IMAGENET_TRAIN} and {IMAGENET_VAL}"
        )
    if len({source.classes for source in parts.values()}) > 1:
        raise DataError(f"{root}: train and val have different classes")
    return parts


def _imagenet(root: Path) -> dict[str, Source]:
    """Reads ImageNet's archives: one with a tar file for each class, and one with all validation images."""
    parts: dict[str, Source] = {}
    classes: tuple[str, ...] = ()
    path = root / IMAGENET_TRAIN
    if path.exists():
        entries: list[tuple[str, str, int, int]] = []  # class, name, offset, size
        with open_regular(path) as file:
            inner = list(members(file))
            for member in inner:
                wnid = Path(member.name).stem
                images = members(file, member.offset, member.offset + member.size)
                entries += [(wnid, one.name, one.offset, one.size) for one in images if _is_image(one.name)]
        classes = tuple(sorted({entry[0] for entry in entries}))
        if not classes:
            raise DataError(f"{path}: no tar files of classes in it")
        parts["train"] = _source_in_archive(path, classes, sorted(entries))
    path = root / IMAGENET_VAL
    if path.exists():
        with open_regular(path) as file:
            found = [member for member in members(file) if _is_image(member.name)]
        truth, from_file = _ground_truth(root, {Path(member.name).stem for member in found})
        classes = classes or tuple(sorted(set(truth.values())))
        entries = []
        for member in sorted(found):
            wnid = truth.get(Path(member.name).stem, "")
            if wnid not in classes:
                reason = f"is of {wnid}, which is not in {IMAGENET_TRAIN}" if wnid else "is not listed"
                raise DataError(f"{from_file}: {member.name} {reason}")
            entries.append((wnid, member.name, member.offset, member.size))
        parts["val"] = _source_in_archive(path, classes, entries)
    return parts


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _source_in_archive(path: Path, classes: tuple[str, ...], entries: list[tuple[str, str, int, int]]) -> Source:
    numbers = {name: number for number, name in enumerate(classes)}
    labels = np.array([numbers[entry[0]] for entry in entries], np.int64)
    return Source(
        classes,
        labels,
        where=lambda index: (str(path), *entries[index][2:]),
        name=lambda index: f"{path}: {entries[index][1]}",
    )


def _ground_truth(root: Path, names: Set[str]) -> tuple[dict[str, str], Path]:
    """Returns the class of each validation image, by its name without suffix, and the file that lists them.

    A list has a line for each image: its name, a comma or blank, and its class (nXXXXXXXX); the rest of a line is
    ignored. ``LOC_val_solution.csv`` is such a list; ``LOC_train_solution.csv`` has none of these names.
    """
    for path in sorted([*root.glob("*.csv"), *root.glob("*.txt")]):
        truth = {}
        try:
            with open_regular(path) as file, io.TextIOWrapper(file, "utf-8", newline="") as text:
                for row in csv.reader(text):
                    words = " ".join(row).split()
                    if len(words) >= 2 and _WNID.fullmatch(words[1]):
                        truth[Path(words[0]).stem] = words[1]
        except (csv.Error, UnicodeDecodeError):  # an unrelated file
            continue
        if truth.keys() & names:
            return truth, path
    for path in sorted(root.glob("ILSVRC2012_devkit*.tar.gz")):
        return _devkit(path), path
    raise DataError(
        f"{root / IMAGENET_VAL} comes without its classes: put ILSVRC2012_devkit_t12.tar.gz or LOC_val_solution.csv "
        "beside it"
    )


def _devkit(path: Path) -> dict[str, str]:
    """Reads the classes from the devkit, whose own numbering of classes is only in its MATLAB file."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise DataError(
            f"{path}: reading it takes SciPy (pip install scipy); LOC_val_solution.csv beside it does as well"
        ) from None
    try:
        with open_regular(path) as file, tarfile.open(fileobj=file) as tar:
            files = {Path(info.name).name: info for info in tar if info.isfile()}
            meta = tar.extractfile(files["meta.mat"])
            truth = tar.extractfile(files["ILSVRC2012_validation_ground_truth.txt"])
            assert meta is not None
            assert truth is not None
            synsets = loadmat(meta, squeeze_me=True)["synsets"]
            wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
            numbers = [int(line) for line in truth.read().split()]
            return {f"ILSVRC2012_val_{place:08}": wnids[number] for place, number in enumerate(numbers, 1)}
    except Exception as error:  # tarfile, zlib and SciPy raise many types for damage
        raise DataError(f"{path}: not the devkit, or damaged ({error or type(error).__name__})") from None
