"""Memory-mapped NumPy arrays of images: no decoding, and only the pages that a crop covers are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from knltrain.data.augment import Pixels
from knltrain.data.decode import DecodedImage
from knltrain.data.folder import DataError
from knltrain.data.manifest import NAME, Manifest
from knltrain.files import open_regular


class Packed:
    """One part (``train`` or ``val``) of a folder by ``knltrain prepare --format raw``, memory-mapped.

    Attributes:
        classes: names.
        labels: class number of every image.
        size: height and width of every image, pixels.

    Args:
        root: the folder.
        part: ``train`` or ``val``.
        manifest: the folder's manifest.

    Raises:
        DataError: a file is missing, damaged, or inconsistent with the others.
    """

    def __init__(self, root: Path, part: str, manifest: Manifest) -> None:
        manifest.check_shards(root, part)
        self.classes = tuple(manifest.classes)
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
        labels = _load(root / part / "labels.npy", mapped=False)
        fits = labels.shape == (len(self),) and np.issubdtype(labels.dtype, np.integer)
        if not fits or (len(self) and not 0 <= labels.min() <= labels.max() < len(self.classes)):
            raise DataError(f"{root / part}/labels.npy: does not match the images; run knltrain prepare again")
        self.labels: NDArray[np.int64] = labels.astype(np.int64)

    def __len__(self) -> int:
        return int(self._first[-1])

    def name(self, index: int) -> str:
        """Returns shard and index, for error messages."""
        shard = int(np.searchsorted(self._first, index, "right")) - 1
        return f"{self._paths[shard]}: image {index - self._first[shard]}"

    def image(self, index: int) -> DecodedImage:
        """Returns a view of one image in the mapped file."""
        shard = int(np.searchsorted(self._first, index, "right")) - 1
        return DecodedImage(self._shards[shard][index - self._first[shard]])

    def addresses(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the memory addresses of images, valid until :meth:`close`."""
        shards = np.searchsorted(self._first, indices, "right") - 1
        bases = np.array([images.ctypes.data for images in self._shards])
        found: NDArray[np.int64] = bases[shards] + (indices - self._first[shards]) * (self.size * self.size * 3)
        return found

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


def _load(path: Path, *, mapped: bool) -> NDArray[np.uint8]:
    try:
        with open_regular(path) as file:
            array: NDArray[np.uint8] = np.load(
                path if mapped else file, mmap_mode="r" if mapped else None, allow_pickle=False
            )
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; run knltrain prepare again") from None
    except Exception as error:  # NumPy raises many types for a damaged header
        raise DataError(f"{path}: damaged ({error}); copy it again, or run knltrain prepare again") from None
    if not isinstance(array, np.ndarray):  # an archive of several
        raise DataError(f"{path}: damaged; copy it again, or run knltrain prepare again")
    return array
