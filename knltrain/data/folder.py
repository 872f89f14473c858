"""Data sets in ImageFolder layout: PART/CLASS/FILE, with classes numbered in the order of their names."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence, Set
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from knltrain.data.classes import ALL_CLASSES, ClassChoice, remarks_on
from knltrain.data.decode import DecodeError, EncodedImage, is_bad, read_image
from knltrain.data.left_out import LeftOut, is_ignored
from knltrain.data.truth import find_truth, no_truth
from knltrain.errors import DataError as DataError

_IMAGES = "images"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")


class Folder:
    """One part (``train`` or ``val``) of an ImageFolder directory.

    Attributes:
        classes: names of the class folders, in the order of their numbers.
        labels: class number of every image.
        remarks: what was left out, and what may not be as it was meant, for people.

    Args:
        part: the directory with a folder for each class; images may be in subfolders of it. Or a directory of images
            beside a list of their classes, as ImageNet's validation images come.
        choice: which classes are used, and their order.
        remarks: on how the directory was chosen.

    Raises:
        ConfigError: it has not the classes that are asked for.
        DataError: the directory is missing, cannot be read, has no class folders, a class has no image, or its name is
            not UTF-8.
    """

    def __init__(self, part: Path, choice: ClassChoice = ALL_CLASSES, remarks: Sequence[str] = ()) -> None:
        self.part = part
        if not part.is_dir():
            raise DataError(f"{part}: no such folder; --data takes a folder that holds train/CLASS and val/CLASS")
        left_out = LeftOut()
        found, loose = entries_of(part, left_out)
        by_class = _listed_classes(part, found, loose)
        if by_class is not None:
            self.classes = choice.arrange(sorted(by_class), part)
            files = [by_class.get(name, []) if choice.reads(name) else [] for name in self.classes]
        else:
            left_out.strays = len(loose)
            self.classes = choice.arrange(_checked(part, found), part)
            there = set(filter(choice.reads, found))
            above = _folders_above(part)
            files = [images_below(part / name, above, left_out) if name in there else [] for name in self.classes]
            self._refuse_empty(there, files, left_out)
        self._files = [file for of_class in files for file in of_class]
        self.labels: NDArray[np.int64] = np.repeat(np.arange(len(files)), [len(of_class) for of_class in files])
        doubtful = remarks_on(self.classes, part, by_name=choice.says_no_order)
        self.remarks = (*remarks, *doubtful, *left_out.remarks(part))

    def _refuse_empty(self, there: Set[str], files: Sequence[Sequence[str]], left_out: LeftOut) -> None:
        empty = [name for name, of_class in zip(self.classes, files, strict=True) if not of_class and name in there]
        if empty:
            others = f" and {len(empty) - 1} other classes" if len(empty) > 1 else ""
            unread = f"; {left_out.formats()} of {self.part} are not" if left_out.formats() else ""
            raise DataError(f"{self.part / empty[0]}: no image in it{others} ({', '.join(SUFFIXES)} are read{unread})")

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        """Returns the image's path, for error messages."""
        return self._files[index]

    def image(self, index: int) -> EncodedImage:
        """Reads an image's file.

        Raises:
            DecodeError: it is not an image.
            OSError: it cannot be read.
        """
        return EncodedImage(read_image(self._files[index]))

    def where(self, index: int) -> tuple[str, int, int]:
        """Returns the location of an image: path, offset 0, and size -1 for the whole file."""
        return self._files[index], 0, -1

    def check(self, count: int) -> None:
        """Decodes ``count`` images, evenly spread; raises DataError for a bad one."""
        check_some(self, count)

    def bad(self, index: int, error: DecodeError | OSError) -> DataError:
        """Returns the error for an image that cannot be used."""
        reason = error.strerror if isinstance(error, OSError) else error
        remedy = "replace or remove this image, or pass --on-bad skip" if is_bad(error) else "see that it can be read"
        return DataError(f"{self.name(index)}: {reason}; {remedy}")

    def files_sha256(self) -> str:
        """Returns a hash of the files' names below the part."""
        begin = len(str(self.part)) + 1
        digest = sha256()
        for file in self._files:
            digest.update(f"{file[begin:]}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def close(self) -> None:
        """Does nothing: no file stays open between images."""


class Images(Protocol):
    """The interface of a data set that :func:`check_some` uses."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> EncodedImage:
        """Opens one image."""

    def bad(self, index: int, error: DecodeError | OSError) -> DataError:
        """Returns the error for an image that cannot be used."""


def check_some(dataset: Images, count: int) -> None:
    """Decodes ``count`` images, evenly spread, so that a bad data set fails before the first step.

    Raises:
        DataError: one is damaged or truncated; the message names it.
    """
    for index in np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int)).tolist():
        try:
            dataset.image(index).pixels()
        except (DecodeError, OSError) as error:
            raise dataset.bad(index, error) from None


def is_utf8(name: str) -> bool:
    """Whether a name is valid UTF-8; file names may be any bytes, which arrive as lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def entries_of(part: Path, left_out: LeftOut) -> tuple[list[str], list[str]]:
    """Returns the sorted names of a part's class folders, and of the images that are in none.

    Raises:
        DataError: the part cannot be read, or a link leads nowhere: it may have been a class.
    """
    folders, loose = [], []
    for entry in _entries(part, left_out):
        if _is_folder(entry):
            folders.append(entry.name)
        elif not left_out.see(entry.name) and _is_image(entry.name):
            loose.append(entry.name)
    return folders, loose


def images_below(folder: Path, above: Set[tuple[int, int]], left_out: LeftOut) -> list[str]:
    """Returns the images in a class folder and in the folders below it, which may be links, ordered by name.

    A folder is read once, and a link to a folder that holds the link is not followed.

    Args:
        folder: the class folder.
        above: the folders that hold it.
        left_out: counts what is not returned.

    Raises:
        DataError: a folder cannot be read, or a link leads nowhere.
    """
    seen = {*above, _identity_of(folder)}
    if folder.is_symlink():
        seen |= _folders_above(Path(os.path.realpath(folder)))
    images: list[str] = []
    waiting = [str(folder)]
    while waiting:
        below = []
        for entry in _entries(waiting.pop(), left_out):
            if not _is_folder(entry):
                if not left_out.see(entry.name) and _is_image(entry.name):
                    images.append(entry.path)
            elif (this := _identity_of(entry.path)) in seen:
                left_out.circles += 1
            else:
                seen.add(this)
                below.append(entry.path)
        waiting += reversed(below)
    return images


def _folders_above(folder: Path) -> set[tuple[int, int]]:
    return {_identity_of(path) for path in (folder, *folder.absolute().parents)}


def _listed_classes(part: Path, folders: Sequence[str], loose: Sequence[str]) -> dict[str, list[str]] | None:
    """Returns the files of each class, if not each has a folder, but all are in one, beside a list of their classes.

    That folder is the part itself, or one in it that is called images, as in Tiny ImageNet.

    Raises:
        DataError: images lie in the part itself and there is no list of them, or one is not listed.
    """
    inside = part
    if list(folders) == [_IMAGES] and not loose:
        inside = part / _IMAGES
        folders, loose = entries_of(inside, LeftOut())
    if folders or not loose:
        return None
    found = find_truth(inside, {Path(name).stem for name in loose})
    if found is None and inside == part:
        raise no_truth(part)
    if found is None:  # a class by this name
        return None
    truth, listed_in = found
    files: dict[str, list[str]] = {}
    for name in loose:
        if Path(name).stem not in truth:
            raise DataError(f"{listed_in}: {name} of {inside} is not listed")
        files.setdefault(truth[Path(name).stem], []).append(str(inside / name))
    return files


def _checked(part: Path, names: Sequence[str]) -> Sequence[str]:
    """Refuses what cannot be a list of classes; returns it otherwise."""
    if not names:
        raise DataError(f"{part}: no class folders in it")
    for name in names:
        if not is_utf8(name):
            raise DataError(f"{part / name}: the name of a class has to be UTF-8; rename the folder")
    return names


def _entries(directory: str | Path, left_out: LeftOut) -> list[os.DirEntry[str]]:
    """Returns what is in a folder, sorted, without what is to be ignored."""
    try:
        with os.scandir(directory) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{error.filename or directory}: {error.strerror}; see that it can be read") from None
    for entry in found:
        if is_ignored(entry.name):
            left_out.ignore(entry.name)
    return [entry for entry in found if not is_ignored(entry.name)]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder, or a link to one. Raises for a link to nowhere, which may have been one."""
    if not entry.is_symlink():
        return entry.is_dir()
    try:
        return stat.S_ISDIR(os.stat(entry.path).st_mode)
    except OSError as error:
        if _is_image(entry.name):  # an image that cannot be read
            return False
        leads_nowhere = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
        remedy = "repair this link, or remove it" if leads_nowhere else "see that it can be read"
        raise DataError(f"{entry.path}: {error.strerror}; {remedy}") from None


def _identity_of(path: str | Path) -> tuple[int, int]:
    """Returns what tells a folder from all others, whatever it is called."""
    try:
        state = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; see that it can be read") from None
    return state.st_dev, state.st_ino


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)
