"""Images without a data set: noise for benchmarks, at ImageNet's counts and sizes."""

from __future__ import annotations

import numpy as np

from knltrain.data.decode import DecodedImage
from knltrain.data.folder import DataError
from knltrain.recipes import IMAGENET_IMAGES

_CLASSES = 1000
_VAL_IMAGES = 512
_POOL = 64


class Synthetic:
    """As many images as ImageNet has, made of a few pictures of noise, with labels that mean nothing.

    Args:
        part: ``train`` or ``val``; the latter is short.
        size: height and width, pixels.
    """

    def __init__(self, part: str, size: int) -> None:
        count = IMAGENET_IMAGES if part == "train" else _VAL_IMAGES
        self.classes = tuple(f"class{index:03}" for index in range(_CLASSES))
        self.labels = np.arange(count) % _CLASSES
        self._pool = np.random.default_rng(0).integers(0, 256, (_POOL, size, size, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """For error messages."""
        return f"synthetic image {index}"

    def image(self, index: int) -> DecodedImage:
        """One of the few pictures."""
        return DecodedImage(self._pool[index % _POOL])

    def check(self, count: int) -> None:
        """Nothing can be wrong with noise."""

    def bad(self, index: int, error: Exception) -> DataError:
        """The error of an image that cannot be used."""
        return DataError(f"{self.name(index)}: {error}")

    def close(self) -> None:
        """Nothing is open."""
