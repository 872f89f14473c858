"""Where the parts of a data set are: which folder or tar files hold ``train``, and which ``val``."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from knltrain.data.folder import SUFFIXES, DataError
from knltrain.data.left_out import is_ignored

# What people call a part, the first that is there is taken. Whether a data set's test part has labels, and may be used
# to choose a model, is for people to know: they are told.
NAMES = {"train": ("train", "training"), "val": ("val", "validation", "valid", "test")}
IMAGENET = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
_PART_OF_WORD = {word: part for part, words in NAMES.items() for word in words}
_COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst)|tgz|tbz2?|txz)$", re.IGNORECASE)
# Folders of a data set that lacks a part, in which it is looked for.
_NUM_LOOKED_INTO = 20
# The number of a tar file, and how many there are: train-00003.tar, train-00003-of-00010.tar.
_NUMBERED = re.compile(r"(\d{1,6})(?:-of-(\d{1,6}))?\.tar$", re.IGNORECASE)
_TAKES = "--data takes a folder that holds train/CLASS and val/CLASS, tar files, or output of knltrain prepare"


class Part(NamedTuple):
    """One part of a data set.

    Attributes:
        shards: its tar files, sorted; if there are none, ``folder`` has its images.
        folder: its folder, which may be missing if there are shards.
        remarks: what of the data set is not used, for people.
    """

    shards: list[Path]
    folder: Path | None
    remarks: tuple[str, ...] = ()


def find_part(root: Path, part: str) -> Part | None:
    """Finds a part by its usual names; returns None if it is not there.

    Tar files are named ``train-00000.tar``, ``train_0.tar``, ``imagenet-train-000000.tar`` or ``train/0.tar``.

    Args:
        root: the folder.
        part: ``train`` or ``val``.

    Raises:
        DataError: the folder cannot be read; tar files are compressed.
    """
    names = list_folder(root)
    found = {word: one for word in NAMES[part] if (one := _called(root, names, word)) is not None}
    if not found:
        return None
    word, one = next(iter(found.items()))
    said = list(one.remarks)
    if word == "test":
        said.append(f"{root}: test is taken as the val part: there is none called val, validation or valid")
    others = [other for other in found if other not in (word, "test")]
    if others:
        said.append(f"{root}: {' and '.join(others)} is not read: {word} is there")
    return one._replace(remarks=tuple(said))


def list_folder(folder: Path) -> list[str]:
    """Returns the sorted names in a folder.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}; see that it can be read") from None


def nothing_found(root: Path, part: str) -> DataError:
    """Returns the error for a part that is not there: what is there, and what to do."""
    if root.exists() and not root.is_dir():
        return DataError(f"{root}: a file; {_TAKES}: unpack it, if it is an archive")
    where = f"{root / part}: no such folder"
    if not root.exists():
        return DataError(f"{where}; {_TAKES}")
    return DataError(f"{where}{instead(root, part)}")


def _called(root: Path, names: Iterable[str], word: str) -> Part | None:
    """Returns the part by one of its names."""
    files = [name for name in names if _word(name) == word and name not in IMAGENET.values() and not is_ignored(name)]
    archives = [root / name for name in files if _is_archive(name) and not (root / name).is_dir()]
    folders = [root / name for name in files if name.lower() == word and (root / name).is_dir()]
    folder = max(folders, key=lambda path: path.name == word, default=None)
    inside = _Contents([], has_folders=False) if folder is None else _contents(folder)
    said = []
    if inside.has_folders:
        # What the folder was unpacked from is often still there.
        left = [*inside.archives, *(path for path in archives if _stem(path.name).lower() == word)]
        if left:
            said.append(f"{folder}: its folders of images are read, and not {_listed(left)}")
        archives = [path for path in archives if path not in left]
        if archives:
            said.append(f"{folder}: its folders are not read: {_listed(archives)} beside it is")
    else:
        archives += inside.archives
    if compressed := [path for path in archives if _COMPRESSED.search(path.name)]:
        raise DataError(
            f"{root}: {_listed(compressed)}: compressed; images are read from anywhere in a tar file, which takes a "
            "plain one: decompress it (gunzip, unxz, unzstd)"
        )
    return Part(sorted(archives), folder, (*said, *_missing(root, archives))) if archives or folder else None


def _missing(root: Path, shards: Iterable[Path]) -> list[str]:
    """Returns a sentence about numbers that the names of tar files leave out."""
    found = [_NUMBERED.search(path.name) for path in shards]
    numbers = {int(match[1]) for match in found if match}
    totals = {int(match[2]) for match in found if match and match[2]}
    if not numbers:
        return []
    expected = range(min([0, *numbers]), max(totals)) if totals else range(min(numbers), max(numbers) + 1)
    missing = [str(number) for number in expected if number not in numbers]
    if not missing:
        return []
    first = ", ".join(missing[:3]) + (" and more" if missing[3:] else "")
    return [
        f"{root}: {min(shards).name} and so on: {len(missing):,} of these tar files are not there, by number {first}"
    ]


def _is_archive(name: str) -> bool:
    return name.lower().endswith(".tar") or _COMPRESSED.search(name) is not None


def _word(name: str) -> str | None:
    """Returns the first word in a file's name that names a part, or None."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((word for word in words if word in _PART_OF_WORD), None)


def _stem(name: str) -> str:
    return _COMPRESSED.sub("", name).removesuffix(".tar")


class _Contents(NamedTuple):
    """What is in a part's folder: tar files, compressed or not, and whether there are folders of classes."""

    archives: list[Path]
    has_folders: bool


def _contents(folder: Path) -> _Contents:
    archives, has_folders = [], False
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_ignored(entry.name):
                    continue
                if entry.is_dir():
                    has_folders = True
                elif _is_archive(entry.name):
                    archives.append(folder / entry.name)
    except OSError as error:
        raise DataError(f"{error.filename or folder}: {error.strerror}; see that it can be read") from None
    return _Contents(sorted(archives), has_folders)


def _listed(paths: list[Path]) -> str:
    return f"{paths[0].name}{f' and {len(paths) - 1:,} more' if paths[1:] else ''}"


def instead(root: Path, part: str) -> str:
    """Says what is in a folder that lacks a part, and what to do, as the end of a sentence."""
    names = list_folder(root)
    if root.name.lower() in _PART_OF_WORD:
        return f"; {root} is a part itself: give the folder that holds it, --data {root.absolute().parent}"
    if part in IMAGENET and IMAGENET[part] in names:
        return f"; {IMAGENET[part]} is there, ImageNet's archive: knltrain prepare reads it"
    for below in ("", "data"):
        if (root / below).is_dir() and any(name.endswith(".parquet") for name in os.listdir(root / below)):
            return (
                f"; {root / below} has Parquet files, which are not read: write their images as train/CLASS/IMAGE and "
                "val/CLASS/IMAGE, or as WebDataset's tar files"
            )
    folders = [name for name in names if (root / name).is_dir() and not is_ignored(name)]
    for below in (*folders[:_NUM_LOOKED_INTO], "ILSVRC/Data/CLS-LOC"):
        if (root / below).is_dir() and find_part(root / below, part):
            return f", but there is {root / below}: give --data {root / below}"
    other = next((p for p, words in NAMES.items() if p != part and any(word in folders for word in words)), None)
    if other is None and any(_has_image(root / name) for name in folders):
        return (
            f"; {root} has folders of classes, and is not split into parts: move them into {root / 'train'}, and some "
            f"images of each into {root / 'val'}"
        )
    seen = ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if names[5:] else "")
    return f"; in {root} there is {seen or 'nothing'}; {_TAKES}"


def _has_image(folder: Path) -> bool:
    return any(name.lower().endswith(SUFFIXES) for name in list_folder(folder))
