"""Data sets in ImageFolder layout: PART/CLASS/FILE, with classes numbered in the order of their names."""

from __future__ import annotations

import os
import stat
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from knltrain.data.decode import DecodeError, EncodedImage, is_bad, read_image
from knltrain.errors import KnltrainError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")


class DataError(KnltrainError):
    """A data set that cannot be used; the message names the file or folder."""


class Folder:
    """One part (``train`` or ``val``) of an ImageFolder directory.

    Attributes:
        classes: sorted names of the class folders.
        labels: class number of every image.

    Args:
        part: the directory with a folder for each class; images may be in subfolders of it.

    Raises:
        DataError: the directory is missing, cannot be read, has no class folders, a class has no image, or its name is
            not UTF-8.
    """

    def __init__(self, part: Path) -> None:
        self.part = part
        if not part.is_dir():
            raise DataError(f"{part}: no such folder; --data takes a folder that holds train/CLASS and val/CLASS")
        try:
            with os.scandir(part) as entries:
                self.classes = tuple(sorted(entry.name for entry in entries if _is_class(entry)))
        except OSError as error:
            raise DataError(f"{error.filename or part}: {error.strerror}") from None
        if not self.classes:
            raise DataError(f"{part}: no class folders in it")
        for name in self.classes:
            if not is_utf8(name):
                raise DataError(f"{part / name}: the name of a class has to be UTF-8; rename the folder")
        self._files: list[str] = []
        counts = []
        for name in self.classes:
            before = len(self._files)
            self._files.extend(_images_below(part / name))
            counts.append(len(self._files) - before)
        empty = [name for name, count in zip(self.classes, counts, strict=True) if not count]
        if empty:
            others = f" and {len(empty) - 1} other classes" if len(empty) > 1 else ""
            raise DataError(f"{part / empty[0]}: no image in it{others} ({', '.join(SUFFIXES)} are read)")
        self.labels: NDArray[np.int64] = np.repeat(np.arange(len(counts)), counts)

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


def _is_class(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder, or a link to one. Raises for a dangling link, which may have been a class."""
    if entry.is_symlink():
        return stat.S_ISDIR(os.stat(entry.path).st_mode)
    return entry.is_dir()


def _images_below(folder: Path) -> list[str]:
    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: {error.strerror}") from None

    files: list[str] = []
    for directory, subfolders, names in os.walk(folder, onerror=fail):
        subfolders.sort()
        files.extend(os.path.join(directory, name) for name in sorted(names) if name.lower().endswith(SUFFIXES))
    return files
