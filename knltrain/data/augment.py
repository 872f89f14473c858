"""Augmentation: random boxes in source pixels, and the pixels inside them.

An augmentation is a box and a flip; decoding, cropping and resizing are then done together, for the box only.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from knltrain.config import RunConfig

NUM_DRAWS = 24
_RRC_TRIES = 10
_FLIP_PROBABILITY = 0.5

Pixels = NDArray[np.uint8]


class Box(NamedTuple):
    """A part of an image in source pixels, which may extend beyond the border, and whether it is flipped."""

    left: float
    top: float
    right: float
    bottom: float
    flip: bool = False

    def scaled(self, x: float, y: float) -> Box:
        """Returns the same part of the image decoded at another size."""
        # Rounded, so that a box that ends on the border does not extend beyond it by a rounding error.
        left, top, right, bottom = (round(v, 6) for v in (self.left * x, self.top * y, self.right * x, self.bottom * y))
        return Box(left, top, right, bottom, self.flip)


def centre_crop(image: Pixels, *, resize: int, size: int) -> Pixels:
    """Scales the short side to ``resize`` and crops the centre, for evaluation; the same pixels as torchvision.

    Args:
        image: H x W x 3.
        resize: short side, at least ``size``.
        size: height and width of the result.
    """
    height, width = short_side(image.shape[0], image.shape[1], resize)
    if (height, width) != image.shape[:2]:
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    left, top, right, bottom = map(int, centre(height, width, size)[:4])
    return image[top:bottom, left:right]


def centre(height: int, width: int, size: int) -> Box:
    """Returns the centre box of ``size`` x ``size`` pixels."""
    top, left = round((height - size) / 2), round((width - size) / 2)
    return Box(left, top, left + size, top + size)


def is_flipped(draws: NDArray[np.float64]) -> bool:
    """Whether an image is flipped in training; for the arguments see :func:`training_box`."""
    return bool(draws[0] < _FLIP_PROBABILITY)


def training_box(config: RunConfig, height: int, width: int, draws: NDArray[np.float64]) -> Box:
    """Returns the box of one image in training.

    Args:
        config: the augmentation, which is not ``none``, and its parameters.
        height: height of the source image, pixels.
        width: width of the source image, pixels.
        draws: ``NUM_DRAWS`` uniform numbers in [0, 1).
    """
    size, augment = config.image_size, config.augment
    flip = is_flipped(draws)
    if augment.name == "rrc":
        return _random_resized_box(height, width, augment.min_area, draws)._replace(flip=flip)
    pad = augment.pad if augment.name == "pad-crop-flip" else 0
    scaled_height, scaled_width = short_side(height, width, config.resize)
    left = math.floor(draws[1] * (scaled_width + 2 * pad - size + 1)) - pad
    top = math.floor(draws[2] * (scaled_height + 2 * pad - size + 1)) - pad
    box = Box(left, top, left + size, top + size, flip)
    return box.scaled(width / scaled_width, height / scaled_height)


def centre_box(side: int, *, resize: int, size: int) -> NDArray[np.float64]:
    """Returns the box of :func:`centre_crop` in a square image of ``side`` pixels: top, left, height, width."""
    first = float(round((resize - size) / 2))
    box: NDArray[np.float64] = _scaled(np.array([[first, first]]), size, side / resize)[0]
    return box


def training_boxes(
    config: RunConfig, side: int, draws: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Returns the :func:`training_box` of many square images.

    Args:
        config: the augmentation, which is not ``none``, and its parameters.
        side: height and width of the images, pixels.
        draws: N x ``NUM_DRAWS`` uniform numbers in [0, 1).

    Returns:
        N x 4: top, left, height and width in pixels; and N: which are flipped.
    """
    size, augment = config.image_size, config.augment
    if augment.name == "rrc":
        found = [training_box(config, side, side, row) for row in draws]
        sides = [(box.top, box.left, box.bottom - box.top, box.right - box.left) for box in found]
        boxes = np.array(sides, np.float64)
    else:
        pad = augment.pad if augment.name == "pad-crop-flip" else 0
        corners = np.floor(draws[:, [2, 1]] * (config.resize + 2 * pad - size + 1)) - pad
        boxes = _scaled(corners, size, side / config.resize)
    return boxes, draws[:, 0] < _FLIP_PROBABILITY


def _scaled(corners: NDArray[np.float64], size: int, scale: float) -> NDArray[np.float64]:
    """Returns top, left, height and width of square boxes at another scale, rounded as :meth:`Box.scaled`.

    Args:
        corners: N x 2: top and left.
        size: height and width of all boxes.
        scale: factor of the other size.
    """
    begin, end = (np.round(edges * scale, 6) for edges in (corners, corners + size))
    return np.concatenate([begin, end - begin], axis=1)


def cut(image: Pixels, box: Box, size: int) -> Pixels:
    """Resamples the box to size x size pixels (bilinear, antialiased); pixels beyond the border are black.

    The result is a crop of the resampled image: near its edges, pixels just outside the box contribute.

    Args:
        image: H x W x 3.
        box: in this image's pixels.
        size: height and width of the result.

    Returns:
        size x size x 3; a view of ``image`` if nothing is resampled.
    """
    height, width = image.shape[:2]
    left, top, right, bottom = math.floor(box.left), math.floor(box.top), math.ceil(box.right), math.ceil(box.bottom)
    if left < 0 or top < 0 or right > width or bottom > height:
        before_x, before_y = max(0, -left), max(0, -top)
        padded = np.zeros((before_y + max(bottom, height), before_x + max(right, width), 3), np.uint8)
        padded[before_y : before_y + height, before_x : before_x + width] = image
        moved = Box(box.left + before_x, box.top + before_y, box.right + before_x, box.bottom + before_y, box.flip)
        return cut(padded, moved, size)
    if (right - left, bottom - top) == (size, size) and box[:4] == (left, top, right, bottom):
        part = image[top:bottom, left:right]
    else:
        # Pillow copies its input: pass only what the filter reaches.
        margin_x, margin_y = (math.ceil(max(1.0, side / size)) for side in (right - left, bottom - top))
        x, y = max(0, left - margin_x), max(0, top - margin_y)
        around = image[y : bottom + margin_y, x : right + margin_x]
        inside = (box.left - x, box.top - y, box.right - x, box.bottom - y)
        part = np.asarray(Image.fromarray(around).resize((size, size), Image.Resampling.BILINEAR, box=inside))
    return part[:, ::-1] if box.flip else part


def short_side(height: int, width: int, resize: int) -> tuple[int, int]:
    """Returns height and width after scaling the short side; the long one is truncated, as in torchvision."""
    if height <= width:
        return resize, int(resize * width / height)
    return int(resize * height / width), resize


def _random_resized_box(height: int, width: int, min_area: float, draws: NDArray[np.float64]) -> Box:
    """Random resized crop (Szegedy 2014): area in [min_area, 1], aspect ratio in [3/4, 4/3], ten tries, then centre."""
    for attempt in range(_RRC_TRIES):
        area = height * width * (min_area + (1 - min_area) * draws[3 + 2 * attempt])
        ratio = math.exp(math.log(3 / 4) + draws[4 + 2 * attempt] * math.log(16 / 9))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = math.floor(draws[1] * (width - w + 1)), math.floor(draws[2] * (height - h + 1))
            return Box(left, top, left + w, top + h)
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return Box(left, top, left + w, top + h)
