"""Every kind of image file that data sets hold, and what is none."""

import io

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from knltrain.data.decode import DecodeError, EncodedImage


def picture(height=48, width=64):
    """Smooth, with corners that differ, so that a wrong turn or channel shows."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], -1).astype(np.uint8)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def close(a, b, levels):
    assert a.shape == b.shape
    assert np.abs(a.astype(int) - b.astype(int)).mean() < levels


def decode(data):
    image = EncodedImage(data)
    pixels = image.pixels()
    assert pixels.shape == (image.height, image.width, 3)
    assert pixels.dtype == np.uint8
    return pixels


@pytest.mark.parametrize(
    "kind, options, levels",
    [("JPEG", {"quality": 95}, 2), ("PNG", {}, 0.01), ("WEBP", {"lossless": True}, 0.01), ("BMP", {}, 0.01),
     ("TIFF", {}, 0.01), ("PPM", {}, 0.01), ("JPEG", {"quality": 95, "progressive": True}, 2)],
)  # fmt: skip
def test_colour(kind, options, levels):
    close(decode(encoded(Image.fromarray(picture()), kind, **options)), picture(), levels)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_greyscale_becomes_three_equal_channels(kind):
    grey = Image.fromarray(picture()).convert("L")
    pixels = decode(encoded(grey, kind))
    close(pixels, np.repeat(np.asarray(grey)[:, :, None], 3, 2), 2)
    assert np.array_equal(pixels[:, :, 0], pixels[:, :, 2])


def test_jpeg_is_pillows_to_the_pixel():
    data = encoded(Image.fromarray(picture()), "JPEG", quality=80)
    assert np.array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_cmyk():
    data = encoded(Image.fromarray(picture()).convert("CMYK"), "JPEG", quality=95)
    close(decode(data), picture(), 6)


def test_palette_with_and_without_transparency():
    palette = Image.fromarray(picture()).quantize(64)
    expected = np.asarray(palette.convert("RGB"))
    close(decode(encoded(palette, "PNG")), expected, 0.01)
    close(decode(encoded(palette, "PNG", transparency=bytes([0] * 64))), expected, 0.01)
    close(decode(encoded(palette, "GIF")), expected, 0.01)


def test_alpha_is_dropped():
    rgba = Image.fromarray(picture()).convert("RGBA")
    rgba.putalpha(7)
    close(decode(encoded(rgba, "PNG")), picture(), 0.01)


def test_one_bit_and_sixteen_bit_grey():
    bits = Image.fromarray(picture()).convert("1")
    assert set(np.unique(decode(encoded(bits, "PNG")))) == {0, 255}
    deep = Image.fromarray((picture()[:, :, 0].astype(np.uint16)) << 8)
    close(decode(encoded(deep, "PNG")), np.repeat(picture()[:, :, :1], 3, 2), 1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(kind, orientation):
    turns = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, 1), 7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(turns[orientation](picture())))
    close(decode(encoded(stored, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))), picture(), 3)


def test_damaged_exif_does_not_hide_the_picture():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = bytearray(encoded(Image.fromarray(picture()), "JPEG", quality=95, exif=exif))
    at = data.index(b"Exif\0\0") + 6
    data[at : at + 4] = b"XXXX"
    close(decode(bytes(data)), picture(), 3)


def test_suffix_does_not_matter_and_bytes_do():
    """ImageNet's training set holds a PNG that is called .JPEG."""
    close(decode(encoded(Image.fromarray(picture()), "PNG")), picture(), 0.01)


def test_stray_bytes_after_the_picture_are_skipped():
    data = encoded(Image.fromarray(picture()), "JPEG", quality=95)
    close(decode(data + b"\0" * 100), picture(), 3)


def test_scaled_decoding_keeps_the_minimum():
    data = simplejpeg.encode_jpeg(picture(480, 640), quality=95)
    image = EncodedImage(data)
    assert image.pixels(480, 640).shape == (480, 640, 3)
    assert image.pixels(241, 10).shape == (480, 640, 3)
    assert image.pixels(240, 320).shape == (240, 320, 3)
    small = image.pixels(100, 100)
    assert min(small.shape[:2]) >= 100
    assert small.shape[0] < 240
    reference = np.asarray(Image.fromarray(picture(480, 640)).resize((small.shape[1], small.shape[0])))
    close(small, reference, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
@pytest.mark.parametrize("keep", [0.3, 0.6, 0.95])
def test_files_cut_short_are_refused(kind, keep):
    data = encoded(Image.fromarray(picture(200, 300)), kind)
    with pytest.raises(DecodeError):
        decode(data[: int(len(data) * keep)])


@pytest.mark.parametrize(
    "data", [b"", b"hello", b"\xff\xd8", b"\xff\xd8\xff\xe0garbage", b"\x89PNG\r\n\x1a\n", b"\0" * 999]
)
def test_what_is_no_image_is_refused(data):
    with pytest.raises(DecodeError) as raised:
        decode(data)
    assert "\n" not in str(raised.value)


def test_flipped_bytes_never_raise_anything_else():
    """A damaged file is refused or decodes to something; it does not end the process with another error."""
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encoded(Image.fromarray(picture()), kind)
        for _ in range(150):
            broken = bytearray(data)
            for place in rng.integers(0, len(data), 3):
                broken[place] = rng.integers(0, 256)
            try:
                decode(bytes(broken))
            except DecodeError as error:
                assert "\n" not in str(error)
