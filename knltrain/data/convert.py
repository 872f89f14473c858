"""Conversion of images for a prepared folder. Runs in worker processes, which do not import torch."""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from knltrain.data.augment import Pixels, centre, short_side
from knltrain.data.decode import DecodeError, EncodedImage, is_bad, read_image, refuse_large, refuse_long
from knltrain.data.folder import SUFFIXES
from knltrain.files import open_regular, replacing_path

# Common settings for ImageNet; a photograph takes about a seventh of its pixels' bytes.
_QUALITY = 90
_SUBSAMPLING = "420"
_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


class Encoded(NamedTuple):
    """An image of a tar shard: its bytes, and the suffix of its name."""

    data: bytes
    suffix: str


def exit_with_parent(parent: int) -> None:
    """Makes the kernel kill this process when its parent ends: it would wait for work for ever."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent has ended already
        os._exit(1)


def read(path: str, offset: int, size: int) -> bytes:
    """Reads a part of a file; size -1 is the whole file.

    Raises:
        OSError: it cannot be read, is not a regular file, or is more than 1 GiB.
    """
    if size < 0:
        return read_image(path)
    refuse_long(size, path)
    with open_regular(path) as file:
        file.seek(offset)
        return file.read(size)


def scaled(image: EncodedImage, size: int) -> Pixels:
    """Decodes with the short side at ``size`` pixels, antialiased.

    Raises:
        DecodeError: the file is damaged, or the long side would be too long.
    """
    height, width = short_side(image.height, image.width, size)
    refuse_large(height, width, " after scaling")
    # At least twice as large, so that the filter below determines the result.
    pixels = image.pixels(2 * height, 2 * width)
    if pixels.shape[:2] != (height, width):
        pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))
    return pixels


def to_square(data: bytes, size: int) -> Pixels:
    """Returns the centre of an image, size x size x 3, after scaling its short side to ``size``.

    Raises:
        DecodeError: the bytes are not an image, or an incomplete one.
    """
    pixels = scaled(EncodedImage(data), size)
    left, top, right, bottom = map(int, centre(pixels.shape[0], pixels.shape[1], size)[:4])
    return pixels[top:bottom, left:right]


def to_jpeg(data: bytes, size: int) -> Encoded:
    """Returns a JPEG with a short side of ``size`` pixels; the original if it is no larger, or size is 0.

    An original in a format that readers of tar shards do not know, such as GIF, is converted to JPEG in its own size.

    Raises:
        DecodeError: the bytes are not an image, or an incomplete one.
    """
    image = EncodedImage(data)
    if size == 0 or min(image.height, image.width) <= size:
        pixels = image.pixels()  # raises if it cannot be decoded
        if f".{image.suffix}" in SUFFIXES:
            return Encoded(data, image.suffix)
    else:
        pixels = np.ascontiguousarray(scaled(image, size))
    return Encoded(simplejpeg.encode_jpeg(pixels, quality=_QUALITY, colorsubsampling=_SUBSAMPLING), "jpg")


def short_sides(images: list[tuple[str, int, int]]) -> list[int]:
    """Returns the short sides, in pixels, of the images whose header can be read."""
    sides = []
    for source, offset, length in images:
        try:
            image = EncodedImage(read(source, offset, length))
        except (DecodeError, OSError):
            continue
        sides.append(min(image.height, image.width))
    return sides


def squares_into(path: str, first: int, images: list[tuple[str, int, int]], size: int) -> list[str | None]:
    """Writes images consecutively into an existing file, the first at byte ``first``.

    Returns:
        For each image, why it was rejected, or None.

    Raises:
        OSError: an image cannot be read, perhaps temporarily, or the file cannot be written.
    """
    reasons: list[str | None] = []
    file = os.open(path, os.O_WRONLY)
    try:
        for place, (source, offset, length) in enumerate(images):
            reason = None
            try:
                square = np.ascontiguousarray(to_square(read(source, offset, length), size))
            except (DecodeError, OSError) as error:
                reason = _why_bad(error, source)
            else:
                _write_all(file, square.data.cast("B"), first + place * size * size * 3)
            reasons.append(reason)
    finally:
        os.close(file)
    return reasons


def finish_squares(part: str, path: str, count: int, gaps: list[int], size: int) -> tuple[int, str]:
    """Completes a .npy file of images that were written after space for its header, and renames it.

    Args:
        part: the file.
        path: its final name.
        count: number of images, rejected ones included.
        gaps: indices of rejected images; later ones move up.
        size: height and width of the images, pixels.

    Returns:
        The file's size in bytes, and its checksum.
    """
    num_bytes = size * size * 3
    with replacing_path(Path(path), aside=Path(part)) as aside, open(aside, "r+b") as file:
        begin = os.fstat(file.fileno()).st_size - count * num_bytes
        good = [place for place in range(count) if place not in set(gaps)]
        for place, old in enumerate(good[gaps[0] :] if gaps else [], gaps[0] if gaps else 0):
            file.seek(begin + old * num_bytes)
            image = file.read(num_bytes)
            file.seek(begin + place * num_bytes)
            file.write(image)
        file.truncate(begin + len(good) * num_bytes)
        file.seek(0)
        shape = (len(good), size, size, 3)
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        if file.tell() != begin:
            raise ValueError(f"a header of {file.tell()} bytes where {begin} were left for it")
    return os.path.getsize(path), checksum(path)


def jpegs(images: list[tuple[str, int, int]], size: int) -> list[Encoded | str]:
    """Encodes images; returns the reason instead of an image that is rejected.

    Raises:
        OSError: an image cannot be read, perhaps temporarily.
    """
    done: list[Encoded | str] = []
    for source, offset, length in images:
        try:
            done.append(to_jpeg(read(source, offset, length), size))
        except (DecodeError, OSError) as error:
            done.append(_why_bad(error, source))
    return done


def checksum(path: str) -> str:
    """Returns the SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _write_all(file: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


def _why_bad(error: DecodeError | OSError, path: str) -> str:
    """Returns why an image is rejected.

    Raises:
        OSError: the error is not due to the image; it names ``path``.
    """
    if isinstance(error, DecodeError):
        return str(error)
    if not is_bad(error):
        raise OSError(error.errno, error.strerror, path) from None
    return error.strerror or str(error)
