"""Image files to pixels: libjpeg-turbo for JPEG, Pillow for everything else, always upright 8-bit RGB."""

from __future__ import annotations

import io
import warnings

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from knltrain.data.augment import Pixels

_ORIENTATION = 0x0112
_SIDEWAYS = {5, 6, 7, 8}


class DecodeError(ValueError):
    """The bytes are no image, or not a whole one."""


class DecodedImage:
    """A picture that is pixels already.

    Args:
        image: H x W x 3.
    """

    def __init__(self, image: Pixels) -> None:
        self._image = image
        self.height, self.width = image.shape[:2]

    def pixels(self, min_height: int = 0, min_width: int = 0) -> Pixels:
        """H x W x 3, whatever is asked for."""
        return self._image


class EncodedImage:
    """An image file's bytes, whose size is known and whose pixels are decoded when asked for.

    Attributes:
        height: pixels.
        width: pixels.
        suffix: that files of its format have.

    Args:
        data: the whole file.

    Raises:
        DecodeError: the header is no image's.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._orientation = 1
        self.suffix = "jpg"
        self._turbo = data[:2] == b"\xff\xd8"
        if self._turbo:
            try:
                height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data, strict=False)
            except (ValueError, KeyError):  # KeyError: of a colour space that it has no name for
                raise DecodeError("a JPEG with a damaged header") from None
            self._turbo = colorspace not in ("CMYK", "YCCK")
            # An orientation tag is rare, and asking Pillow for it costs as much as a small decode.
            if b"Exif\0" in data[:65536]:
                self._orientation = self._read_orientation()
        else:
            with self._open() as image:
                width, height = image.size
                self.suffix = (image.format or "").lower()
            self._orientation = self._read_orientation()
        self.height, self.width = (width, height) if self._orientation in _SIDEWAYS else (height, width)

    def pixels(self, min_height: int = 0, min_width: int = 0) -> Pixels:
        """Decodes to H x W x 3.

        Args:
            min_height: JPEGs at least twice as large as both may come decoded at a half, a quarter or an eighth.
            min_width: see ``min_height``; 0 for both means full size.

        Raises:
            DecodeError: the file is damaged or cut short.
        """
        if not self._turbo:
            return self._pillow()
        if self._orientation in _SIDEWAYS:
            min_height, min_width = min_width, min_height
        factor = 2 if min_height and 2 * min_height <= self.height and 2 * min_width <= self.width else 1
        if factor == 1:
            min_height = min_width = 0
        try:
            image: Pixels = simplejpeg.decode_jpeg(
                self._data, "RGB", min_height=min_height, min_width=min_width, min_factor=factor
            )
        except ValueError:
            # libjpeg-turbo is strict about stray bytes that others skip; Pillow has the last word on what is damaged.
            return self._pillow()
        return _upright(image, self._orientation)

    def _open(self) -> Image.Image:
        try:
            return Image.open(io.BytesIO(self._data))
        except Exception as error:  # Pillow's plugins raise whatever their parser raises
            raise DecodeError(_reason(error)) from None

    def _read_orientation(self) -> int:
        try:
            with self._open() as image:
                orientation = image.getexif().get(_ORIENTATION, 1)
        except Exception:  # a damaged tag directory says nothing about the picture
            return 1
        return orientation if orientation in range(1, 9) else 1

    def _pillow(self) -> Pixels:
        try:
            with warnings.catch_warnings(), self._open() as image:
                warnings.simplefilter("ignore")  # of a transparent palette, of a large picture: both are handled
                if image.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I"):
                    # Sixteen-bit grey: Pillow's own conversion cuts off at 255 instead of scaling.
                    grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
                    return _upright(np.repeat(grey[:, :, None], 3, axis=2), self._orientation)
                if image.mode == "P" and "transparency" in image.info:
                    return _upright(np.asarray(image.convert("RGBA").convert("RGB")), self._orientation)
                return _upright(np.asarray(image.convert("RGB")), self._orientation)
        except DecodeError:
            raise
        except Exception as error:
            raise DecodeError(_reason(error)) from None


def _upright(image: Pixels, orientation: int) -> Pixels:
    if orientation == 1:
        return image
    exif = Image.Exif()
    exif[_ORIENTATION] = orientation
    picture = Image.fromarray(image)
    picture.info["exif"] = exif.tobytes()
    return np.asarray(ImageOps.exif_transpose(picture))


def _reason(error: Exception) -> str:
    text = str(error).split("\n")[0]
    return "no image" if "cannot identify image file" in text else text or type(error).__name__
