"""WebDataset's tar shards: an index is created once, then each sample is one read."""

from __future__ import annotations

import errno
import os
import tarfile
import threading
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from knltrain.data.classes import ALL_CLASSES, ClassChoice, remarks_on, some
from knltrain.data.decode import DecodeError, EncodedImage, is_bad, refuse_long
from knltrain.data.folder import check_some
from knltrain.data.manifest import NAME, read_manifest
from knltrain.data.parts import NAMES, find_part
from knltrain.data.tar_index import TarIndex, open_index
from knltrain.errors import DataError


class Tar:
    """One part (``train`` or ``val``) of a folder of WebDataset shards: ``KEY.jpg`` beside ``KEY.cls``.

    Attributes:
        classes: names if ``knltrain prepare`` wrote the folder or ``choice`` gives them, otherwise numbers.
        labels: class number of every image.
        remarks: what was left out, for people.

    Args:
        root: the folder.
        part: ``train`` or ``val``.
        choice: which classes are used, and their order.

    Raises:
        ConfigError: it has not the classes that are asked for.
        DataError: a shard is missing, damaged, or holds an image without its class, or two in one sample.
    """

    def __init__(self, root: Path, part: str, choice: ClassChoice = ALL_CLASSES) -> None:
        self._part, self._manifest = part, read_manifest(root)
        place = find_part(root, part)
        self._paths = place.shards if place else []
        if self._manifest is not None:
            self._manifest.check_shards(root, part, self._paths)
        elif not self._paths:
            raise DataError(f"{root}: no {part}-*.tar in it")
        index = open_index(root, part, self._paths)
        found = self._found_classes(root, index.images, choice)
        self.classes = choice.arrange(found, root)
        self._index = index.images
        if self.classes != found or choice.only is not None:
            kept, labels = choice.renumber(found, index.images.label, self.classes)
            self._index = TarIndex(*(column[kept] for column in index.images))._replace(label=labels)
            if not len(kept):
                raise DataError(f"{root}: {part} has no image of these classes")
        self.labels = self._index.label
        doubtful = remarks_on(self.classes, root, by_name=choice.says_no_order)
        self.remarks = (*(place.remarks if place else ()), *doubtful, *index.remarks)
        if self._manifest is None and part == "train":
            self.remarks += _remarks_on_gaps(root, self.classes, self.labels)
        self._files: dict[int, int] = {}
        self._lock = threading.Lock()

    def _found_classes(self, root: Path, index: TarIndex, choice: ClassChoice) -> tuple[str, ...]:
        if self._manifest is not None:
            images = sum(shard.images for shard in self._manifest.shards[self._part])
            classes = tuple(self._manifest.classes)
            if len(index.label) != images or (images and index.label.max() >= len(classes)):
                raise DataError(f"{root}: {self._part} does not hold what {NAME} says; copy it again")
            return classes
        # Both parts have the number of classes that their largest label needs.
        places = {other: find_part(root, other) for other in NAMES if other != self._part}
        others = [open_index(root, other, place.shards).images for other, place in places.items() if place]
        return choice.name(1 + max(int(one.label.max()) for one in (index, *others) if len(one.label)), root)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Returns shard and sample, for error messages."""
        path, offset = self._paths[self._index.shard[index]], int(self._index.offset[index])
        try:
            with open(path, "rb") as file:
                file.seek(offset - tarfile.BLOCKSIZE)
                inside = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape").name
        except (OSError, ValueError, tarfile.TarError):
            inside = f"sample {index}"
        return f"{path}: {inside}"

    def where(self, index: int) -> tuple[str, int, int]:
        """Returns the location of an image: path, offset, size."""
        at = int(self._index.shard[index])
        return str(self._paths[at]), int(self._index.offset[index]), int(self._index.size[index])

    def image(self, index: int) -> EncodedImage:
        """Reads an image.

        Raises:
            DecodeError: it is not an image, or the shard is truncated.
            OSError: the shard cannot be read, or the image is more than 1 GiB.
        """
        path, offset, size = self.where(index)
        refuse_long(size, path)
        data = self._pread(int(self._index.shard[index]), size, offset)
        if len(data) < size:
            raise DecodeError("the shard is cut short here")
        return EncodedImage(data)

    def check(self, count: int) -> None:
        """Decodes ``count`` images, evenly spread; raises DataError for a bad one."""
        check_some(self, count)

    def bad(self, index: int, error: DecodeError | OSError) -> DataError:
        """Returns the error for an image that cannot be used."""
        reason = error.strerror if isinstance(error, OSError) else error
        remedy = "copy the shard again, or pass --on-bad skip" if is_bad(error) else "see that the shard can be read"
        return DataError(f"{self.name(index)}: {reason}; {remedy}")

    def files_sha256(self) -> str:
        """Returns a hash of the manifest's checksums, or of the shards' names and their index."""
        if self._manifest is not None:
            return self._manifest.part_sha256(self._part)
        digest = sha256("\n".join(path.name for path in self._paths).encode(errors="surrogateescape"))
        for column in self._index:
            digest.update(column.tobytes())
        return digest.hexdigest()

    def close(self) -> None:
        """Closes the shards."""
        with self._lock:
            self._close_files()

    def _pread(self, shard: int, size: int, offset: int) -> bytes:
        with self._lock:
            try:
                file = self._dup_open(shard)
            except OSError as error:
                if error.errno != errno.EMFILE or not self._files:
                    raise
                self._close_files()  # more shards than a process may have open
                file = self._dup_open(shard)
        try:
            return os.pread(file, size, offset)
        finally:
            os.close(file)

    def _dup_open(self, shard: int) -> int:
        """Returns a descriptor of the shard for one read, valid even if another thread closes the shard."""
        if shard not in self._files:
            self._files[shard] = os.open(self._paths[shard], os.O_RDONLY | os.O_NONBLOCK)
        return os.dup(self._files[shard])

    def _close_files(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()


def _remarks_on_gaps(root: Path, classes: Sequence[str], labels: NDArray[np.int64]) -> tuple[str, ...]:
    """Returns a sentence about class numbers without an image, as labels that begin at 1 have."""
    missing = np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0).tolist()
    if not missing:
        return ()
    return (
        f"{root}: classes without a training image: {len(missing):,} of {len(classes):,} "
        f"({some([classes[number] for number in missing])}); labels count from 0",
    )
