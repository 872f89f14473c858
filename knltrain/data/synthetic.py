"""Synthetic images for benchmarks: noise, with ImageNet's numbers of images and classes."""

from __future__ import annotations

import numpy as np

from knltrain.data.decode import DecodedImage
from knltrain.data.folder import DataError
from knltrain.recipes import IMAGENET_IMAGES

_CLASSES = 1000
_VAL_IMAGES = 512
_POOL = 64


class Synthetic:
    """A data set of ImageNet's size that repeats a few images of noise, with arbitrary labels.

    Args:
        part: ``train`` or ``val``, which has only 512 images.
        size: height and width, pixels.
    """

    def __init__(self, part: str, size: int) -> None:
        count = IMAGENET_IMAGES if part == "train" else _VAL_IMAGES
        self.classes = tuple(f"class{index:03}" for index in range(_CLASSES))
        self.labels = np.arange(count) % _CLASSES
        self.remarks: tuple[str, ...] = ()
        self._pool = np.random.default_rng(0).integers(0, 256, (_POOL, size, size, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Returns the image's name, for error messages."""
        return f"synthetic image {index}"

    def image(self, index: int) -> DecodedImage:
        """Returns one of the few images."""
        return DecodedImage(self._pool[index % _POOL])

    def check(self, count: int) -> None:
        """Does nothing: noise is always valid."""

    def bad(self, index: int, error: Exception) -> DataError:
        """Returns the error for an image that cannot be used."""
        return DataError(f"{self.name(index)}: {error}")

    def files_sha256(self) -> str:
        """Returns the same for all of these data sets, which have no files."""
        return "synthetic"

    def close(self) -> None:
        """Does nothing: no file is open."""
