"""Generated pictures: ten classes of rotated shapes, plain or striped.

Colour, position, size, angle, background and noise have the same distribution in every class, so only shape and texture
distinguish them. They are JPEG files in ImageFolder layout, generated once into the cache folder.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from knltrain.data.augment import Pixels
from knltrain.data.folder import DataError
from knltrain.data.order import random_bits
from knltrain.files import cache_folder

SHAPES = ("cross", "disc", "ring", "square", "triangle")
TEXTURES = ("plain", "striped")
COUNTS = {"train": 1200, "val": 100}  # a class
SIZE = 48

# Part of the folder's name, to change with the pictures.
_VERSION = 1
_NUM_DRAWS = 16


def shapes_folder() -> Path:
    """Returns the ImageFolder directory of the pictures, and generates them if it does not exist.

    Raises:
        DataError: the cache folder cannot be written.
    """
    folder = cache_folder() / f"shapes-v{_VERSION}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
        try:
            _write(aside)
            # Another process may have been faster; its folder has the same contents.
            if not folder.is_dir():
                aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}; set KNLTRAIN_CACHE to a folder that can be written") from None
    return folder


def draw(label: int, first: int, count: int) -> Pixels:
    """Draws pictures ``first`` … ``first + count - 1`` of a class: count x SIZE x SIZE x 3."""
    shape, texture = SHAPES[label // len(TEXTURES)], TEXTURES[label % len(TEXTURES)]
    bits = random_bits(label, np.arange(first, first + count)[:, None], np.arange(_NUM_DRAWS))
    u = ((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53).T[:, :, None, None]

    grid = np.arange(SIZE) + 0.5
    radius = SIZE * (0.22 + 0.2 * u[0])
    x = (grid[None, None, :] - SIZE * (0.35 + 0.3 * u[1])) / radius
    y = (grid[None, :, None] - SIZE * (0.35 + 0.3 * u[2])) / radius
    angle = 2 * np.pi * u[3]
    x, y = x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)

    # Antialiased: the edge is one pixel wide.
    inside = np.clip(0.5 - _distance(shape, x, y) * radius, 0, 1)
    if texture == "striped":
        stripes = 0.5 + 0.5 * np.clip(3 * np.sin(x * (2 * np.pi / 0.55) + 2 * np.pi * u[4]), -1, 1)
        inside = inside * stripes
    ink, paper = u[5:8], u[8:11]
    # Shift each channel of the ink away from the background by 0.35 to 0.65 of the range, so that shapes are visible.
    ink = (paper + 0.35 + 0.3 * ink) % 1.0
    slope = (u[11] - 0.5) * (grid / SIZE - 0.5)[None, None, :] + (u[12] - 0.5) * (grid / SIZE - 0.5)[None, :, None]
    noise_bits = random_bits(label, np.arange(first, first + count)[:, None, None], np.arange(SIZE * SIZE * 3) + 100)
    noise = ((noise_bits >> np.uint64(40)).astype(np.float64) * 2.0**-24).reshape(count, SIZE, SIZE, 3) - 0.5
    channels = [paper[c] + 0.5 * slope + (ink[c] - paper[c]) * inside for c in range(3)]
    pixels = np.stack(channels, axis=-1) + (0.1 + 0.3 * u[13, :, :, :, None]) * noise
    return (255 * pixels).clip(0, 255).astype(np.uint8)


def _distance(shape: str, x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the distance to the shape's edge, in units of its radius, negative inside."""
    if shape == "disc":
        return np.hypot(x, y) - 0.9
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.72) - 0.22
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.75
    if shape == "triangle":
        return np.maximum(np.abs(x) * 0.866 + y * 0.5, -y) - 0.52
    return np.minimum(np.maximum(np.abs(x) - 1.0, np.abs(y) - 0.3), np.maximum(np.abs(y) - 1.0, np.abs(x) - 0.3))


def _write(folder: Path) -> None:
    offset = 0
    for part, count in COUNTS.items():
        for label in range(len(SHAPES) * len(TEXTURES)):
            name = f"{SHAPES[label // len(TEXTURES)]}-{TEXTURES[label % len(TEXTURES)]}"
            directory = folder / part / name
            directory.mkdir(parents=True)
            for first in range(0, count, 100):
                for index, picture in enumerate(draw(label, offset + first, min(100, count - first)), start=first):
                    encoded = simplejpeg.encode_jpeg(np.ascontiguousarray(picture), quality=90)
                    (directory / f"{index:04}.jpg").write_bytes(encoded)
        offset += count
