"""Decoding of image files to 8-bit RGB: libjpeg-turbo for JPEG, Pillow for other formats.

Pixels are as they are stored: as torchvision's loader, this ignores the orientation that EXIF tags state. Pillow itself
turns TIFFs.
"""

from __future__ import annotations

import errno
import functools
import importlib
import io
import math
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from knltrain.data.augment import Box, Pixels
from knltrain.files import open_regular

# TIFF tags, and a value of the second.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0
# Limit of 400 MB of pixels. No photograph of a data set is that large, but any header can claim to be.
_MAX_PIXELS = 1 << 27
# A progressive JPEG has about ten scans, and each takes a pass over the whole image.
_MAX_SCANS = 500
_MAX_FILE_BYTES = 1 << 30
# Errors of opening a pipe, a socket, or a link to itself.
_NOT_A_FILE = (errno.EINVAL, errno.EFBIG, errno.ENXIO, errno.ELOOP)
# Not all of Pillow's formats: it runs other programs for some (Ghostscript for EPS).
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Warnings about large images, transparent palettes, damaged tags: all are handled, or raise DecodeError. Filtered for
# the whole process, because catch_warnings is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.(Image|\w+ImagePlugin)$")


class DecodeError(ValueError):
    """The bytes are not an image, or an incomplete one."""


def is_bad(error: DecodeError | OSError) -> bool:
    """Whether an error is due to the image itself; errors of disk, network or process may be temporary."""
    return isinstance(error, DecodeError) or error.errno in _NOT_A_FILE


def refuse_large(height: int, width: int, how: str = "") -> None:
    """Checks the number of pixels of an image; ``how`` is appended to them in the message.

    Raises:
        DecodeError: there are more than 134 million.
    """
    if height * width > _MAX_PIXELS:
        raise DecodeError(f"{width:,} x {height:,} pixels{how} are more than the {_MAX_PIXELS:,} that are decoded")


@functools.cache
def decoder_of_parts() -> Any | None:
    """Returns the native class that decodes parts of JPEGs, or None if it was not built or finds no libjpeg-turbo.

    It uses Pillow's copy of the library, because simplejpeg's decodes whole images only.
    """
    try:
        module = importlib.import_module("knltrain._kernels")
    except ImportError:
        return None
    with open("/proc/self/maps") as maps:
        loaded = {line.split(maxsplit=5)[5].strip() for line in maps if "/libjpeg" in line}
    return module.Jpeg if any(module.use_libjpeg(path) == "" for path in sorted(loaded)) else None


def refuse_long(num_bytes: int, path: str | Path) -> None:
    """Checks the size of an image file before it is read.

    Raises:
        OSError: it is more than 1 GiB.
    """
    if num_bytes > _MAX_FILE_BYTES:
        raise OSError(errno.EFBIG, f"more than {_MAX_FILE_BYTES:,} bytes", str(path))


def read_image(path: str | Path) -> bytes:
    """Reads an image file.

    Raises:
        OSError: it cannot be read, is not a regular file, or is more than 1 GiB.
    """
    with open_regular(path, buffering=0) as file:
        refuse_long(os.fstat(file.fileno()).st_size, path)
        return file.read()


class DecodedImage:
    """An image that needs no decoding.

    Args:
        image: H x W x 3.
    """

    def __init__(self, image: Pixels) -> None:
        self._image = image
        self.height, self.width = image.shape[:2]

    def pixels(self) -> Pixels:
        """H x W x 3."""
        return self._image

    def around(self, box: Box, size: int) -> tuple[Pixels, Box]:
        """Returns the image and the box."""
        return self._image, box


class EncodedImage:
    """An encoded image: its header is read at once, its pixels on demand.

    Attributes:
        height: height, pixels.
        width: width, pixels.
        suffix: file name suffix of its format.

    Args:
        data: the whole file.

    Raises:
        DecodeError: it has no image header, or more than 134 million pixels.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.suffix = "jpg"
        self._turbo = data[:2] == b"\xff\xd8"
        self._parts: Any = None
        if self._turbo:
            if data.count(b"\xff\xda") > _MAX_SCANS:
                raise DecodeError(f"a JPEG of more than {_MAX_SCANS} scans")
            native = decoder_of_parts()
            try:
                if native is not None:
                    self._parts = native(data)
                    self.height, self.width = self._parts.height, self._parts.width
                    self._turbo = self._parts.becomes_rgb
                else:
                    self.height, self.width, colorspace, _ = simplejpeg.decode_jpeg_header(data, strict=False)
                    self._turbo = colorspace not in ("CMYK", "YCCK")
            except (ValueError, KeyError):  # KeyError: unknown colour space
                raise DecodeError("a JPEG with a damaged header") from None
        else:
            with self._open() as image:
                self.width, self.height = image.size
                self.suffix = (image.format or "").lower()
        refuse_large(self.height, self.width)

    def pixels(self, min_height: int = 0, min_width: int = 0) -> Pixels:
        """Decodes to H x W x 3.

        Args:
            min_height: JPEGs may be decoded at 1/2, 1/4 or 1/8 of their size if that is no smaller than both.
            min_width: see ``min_height``; 0 for both means full size.

        Raises:
            DecodeError: the file is damaged or truncated.
        """
        if not self._turbo:
            return self._pillow()
        half_height, half_width = -(-self.height // 2), -(-self.width // 2)
        factor = 2 if 0 < min_height <= half_height and min_width <= half_width else 1
        if factor == 1:
            min_height = min_width = 0
        try:
            image: Pixels = simplejpeg.decode_jpeg(
                self._data, "RGB", min_height=min_height, min_width=min_width, min_factor=factor
            )
        except ValueError:
            # libjpeg-turbo rejects stray bytes that other decoders skip; Pillow decides whether the file is damaged.
            return self._pillow()
        return image

    def around(self, box: Box, size: int) -> tuple[Pixels, Box]:
        """Decodes the pixels that a box is resampled from.

        Args:
            box: the box, in this image's pixels.
            size: height and width of the result; if a JPEG's box is at least twice as large, it is decoded at 1/2, 1/4
                or 1/8.

        Returns:
            H x W x 3, with all pixels that the filter of :func:`~knltrain.data.augment.cut` reaches; and the box in it.

        Raises:
            DecodeError: the decoded part of the file is damaged or truncated.
        """
        sides = (box.right - box.left, box.bottom - box.top)
        denominator = next((d for d in (8, 4, 2) if d * size <= min(sides)), 1)
        height, width = -(-self.height // denominator), -(-self.width // denominator)
        inside = box.left >= 0 and box.top >= 0 and box.right <= self.width and box.bottom <= self.height
        if self._turbo and self._parts is not None and inside:
            part = self._part(box.scaled(width / self.width, height / self.height), size, height, width, denominator)
            if part is not None:
                return part
        whole = self.pixels(height, width) if denominator > 1 else self.pixels()
        return whole, box.scaled(whole.shape[1] / self.width, whole.shape[0] / self.height)

    def _part(self, box: Box, size: int, height: int, width: int, denominator: int) -> tuple[Pixels, Box] | None:
        """Decodes the surroundings of a box in the image scaled to height x width; returns None if it is damaged."""
        (left, top), (right, bottom) = map(math.floor, box[:2]), map(math.ceil, box[2:4])
        if (right - left, bottom - top) != (size, size) or box[:4] != (left, top, right, bottom):
            margin_x, margin_y = (math.ceil(max(1.0, side / size)) for side in (right - left, bottom - top))
            left, top = max(0, left - margin_x), max(0, top - margin_y)
            right, bottom = min(width, right + margin_x), min(height, bottom + margin_y)
        try:
            top, left, rows, columns = self._parts.begin(top, left, bottom - top, right - left, denominator)
            part = np.empty((rows, columns, 3), np.uint8)
            self._parts.read(part.ctypes.data)
        except ValueError:
            return None
        return part, Box(box.left - left, box.top - top, box.right - left, box.bottom - top, box.flip)

    def _open(self) -> Image.Image:
        try:
            return Image.open(io.BytesIO(self._data), formats=_FORMATS)
        except Exception as error:  # Pillow's plugins raise many types
            raise DecodeError(_reason(error, self._data)) from None

    def _pillow(self) -> Pixels:
        try:
            with self._open() as image:
                return _rgb(image)
        except DecodeError:
            raise
        except Exception as error:
            raise DecodeError(_reason(error, self._data)) from None


def _rgb(image: Image.Image) -> Pixels:
    """Returns an image as Pillow has it as 8-bit RGB. Where Pillow would clip numbers of more bits, they are scaled.

    Raises:
        DecodeError: it is of numbers whose range nothing states.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format != "TIFF"):
        # Of a TIFF, 12 bits are not stretched to 16, and zero may be white.
        tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
        bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
        grey = (np.asarray(image).astype(np.int64) >> (bits - 8)).clip(0, 255).astype(np.uint8)
        if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
            grey = 255 - grey
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise DecodeError(
            "pixels of 32-bit or signed numbers, and nothing says which are black and white; save it with 8 or 16 bits"
        )
    return np.asarray(image.convert("RGB"))


def _reason(error: Exception, data: bytes) -> str:
    text = str(error).split("\n")[0]
    if "cannot identify image file" not in text:
        return text or type(error).__name__
    if data[:4] in (b"II*\0", b"MM\0*"):
        return "a TIFF of a kind that is not read, such as colours in 32-bit numbers; save it with 8 bits"
    if data[4:8] == b"ftyp":
        return "an AVIF or HEIC image, whatever its name says, and not read; convert it to JPEG or PNG"
    return "no image"
