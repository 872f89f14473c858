"""Memory-mapped NumPy arrays of images: no decoding, and only the pages that a crop covers are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from knltrain.data.augment import Pixels
from knltrain.data.classes import ALL_CLASSES, ClassChoice, remarks_on
from knltrain.data.convert import checksum
from knltrain.data.decode import DecodedImage
from knltrain.data.folder import DataError
from knltrain.data.manifest import NAME, Manifest, remedy
from knltrain.files import open_regular


class Packed:
    """One part (``train`` or ``val``) of a folder by ``knltrain prepare --format raw``, memory-mapped.

    Attributes:
        classes: names.
        labels: class number of every image.
        size: height and width of every image, pixels.
        remarks: what may not be as it was meant, for people; ``prepare`` has said what was left out.

    Args:
        root: the folder.
        part: ``train`` or ``val``.
        manifest: the folder's manifest.
        choice: which classes are used, and their order.

    Raises:
        ConfigError: it has not the classes that are asked for.
        DataError: a file is missing, damaged, or inconsistent with the others.
    """

    def __init__(self, root: Path, part: str, manifest: Manifest, choice: ClassChoice = ALL_CLASSES) -> None:
        manifest.check_shards(root, part)
        self.size = manifest.size
        self._files_sha256 = manifest.part_sha256(part)
        self._paths = [root / shard.file for shard in manifest.shards[part]]
        self._shards: list[Pixels] = []
        for path in self._paths:
            images = _load(path, mapped=True)
            if (
                images.dtype != np.uint8
                or images.shape[1:] != (self.size, self.size, 3)
                or not images.flags.c_contiguous
            ):
                raise DataError(f"{path}: {images.dtype} of shape {images.shape}, not images of {self.size} pixels")
            self._shards.append(images)
        if [len(images) for images in self._shards] != [shard.images for shard in manifest.shards[part]]:
            raise DataError(f"{root}: {part} does not have the number of images in {NAME}; copy it again")
        self._first = np.cumsum([0, *(len(images) for images in self._shards)])
        self.classes = choice.arrange(manifest.classes, root)
        self.remarks = remarks_on(self.classes, root, by_name=choice.says_no_order)
        # Where the images of the chosen classes are among all.
        self._places, self.labels = choice.renumber(
            manifest.classes, _labels(root, part, manifest, int(self._first[-1])), self.classes
        )
        if not len(self) and self._first[-1]:
            raise DataError(f"{root}: {part} has no image of these classes")

    def __len__(self) -> int:
        return len(self._places)

    def name(self, index: int) -> str:
        """Returns shard and index, for error messages."""
        shard, place = self._shard_of(index)
        return f"{self._paths[shard]}: image {place}"

    def image(self, index: int) -> DecodedImage:
        """Returns a view of one image in the mapped file."""
        shard, place = self._shard_of(index)
        return DecodedImage(self._shards[shard][place])

    def addresses(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the memory addresses of images, valid until :meth:`close`."""
        places = self._places[indices]
        shards = np.searchsorted(self._first, places, "right") - 1
        bases = np.array([images.ctypes.data for images in self._shards])
        found: NDArray[np.int64] = bases[shards] + (places - self._first[shards]) * (self.size * self.size * 3)
        return found

    def _shard_of(self, index: int) -> tuple[int, int]:
        """Returns an image's shard, and its place in it."""
        place = int(self._places[index])
        shard = int(np.searchsorted(self._first, place, "right")) - 1
        return shard, place - int(self._first[shard])

    def check(self, count: int) -> None:
        """Does nothing: pixels need no decoding, and file sizes have been checked."""

    def bad(self, index: int, error: Exception) -> DataError:
        """Returns the error for an image that cannot be used."""
        return DataError(f"{self.name(index)}: {error}")

    def files_sha256(self) -> str:
        """Returns a hash of the manifest's checksums."""
        return self._files_sha256

    def close(self) -> None:
        """Unmaps the files."""
        self._shards.clear()


def _labels(root: Path, part: str, manifest: Manifest, count: int) -> NDArray[np.int64]:
    path, again = root / part / "labels.npy", "copy it again, or run knltrain prepare again"
    labels = _load(path, mapped=False)
    fits = labels.shape == (count,) and np.issubdtype(labels.dtype, np.integer)
    if not fits or (count and not 0 <= labels.min() <= labels.max() < len(manifest.classes)):
        raise DataError(f"{path}: does not match the images; {again}")
    # Labels of another preparation may have the same number.
    if part in manifest.labels and checksum(str(path)) != manifest.labels[part]:
        raise DataError(f"{path}: does not match its checksum in {NAME}; {again}")
    return labels.astype(np.int64)


def _load(path: Path, *, mapped: bool) -> NDArray[np.uint8]:
    try:
        with open_regular(path) as file:
            array: NDArray[np.uint8] = np.load(
                path if mapped else file, mmap_mode="r" if mapped else None, allow_pickle=False
            )
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; {remedy(error)}") from None
    except Exception as error:  # NumPy raises many types for a damaged header
        raise DataError(f"{path}: damaged ({error}); copy it again, or run knltrain prepare again") from None
    if not isinstance(array, np.ndarray):  # an archive of several
        raise DataError(f"{path}: damaged; copy it again, or run knltrain prepare again")
    return array
