"""Every kind of image file that data sets hold, and what is none."""

import importlib
import importlib.util
import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from knltrain.data import decode as decode_module
from knltrain.data.augment import Box, cut
from knltrain.data.decode import DecodeError, EncodedImage, decoder_of_parts


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


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_what_torchvision_makes_of_it(kind, orientation):
    """Nothing, but for TIFF, which Pillow turns."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    data = encoded(Image.fromarray(picture()), kind, exif=exif, **options)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))  # torchvision's loader
    close(decode(data), expected, 3)
    part, box = EncodedImage(data).around(Box(4, 4, 20, 20), 16)
    assert np.array_equal(cut(part, box, 16), cut(decode(data), Box(4, 4, 20, 20), 16))
    if kind != "TIFF":
        close(decode(data), picture(), 3)


VALUES = np.array([[0, 0x1234, 0x8000, 0xFFFF]], np.uint16)
BYTES = np.array([[0, 0x12, 0x80, 0xFF]], np.uint8)


def deep_png(values, colour):
    """A PNG of 16 bits, which Pillow writes in grey only."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(values, *, bits=16, photometric=1, kind=1, samples=1, data=None):
    """An uncompressed TIFF of one row; kind 1 is unsigned, 2 signed, 3 float."""
    data = values.tobytes() if data is None else data
    width = values.shape[1]
    size_of_bits = {1: 3, 3: 3}[samples]
    tags = [(256, 3, 1, width), (257, 3, 1, 1), (258, size_of_bits, samples, bits), (259, 3, 1, 1),
            (262, 3, 1, photometric), (273, 4, 1, 8), (277, 3, 1, samples), (278, 3, 1, 1), (279, 4, 1, len(data)),
            (339, 3, samples, kind)]  # fmt: skip
    at = 8 + len(data) + len(data) % 2
    extra = at + 2 + 12 * len(tags) + 4
    entries, behind = b"", b""
    for tag, form, count, value in tags:
        if count > 2:
            entries += struct.pack("<HHII", tag, form, count, extra + len(behind))
            behind += struct.pack("<H", value) * count
        else:
            entries += struct.pack("<HHII", tag, form, count, value)
    return (
        struct.pack("<2sHI", b"II", 42, at)
        + data
        + bytes(len(data) % 2)
        + struct.pack("<H", len(tags))
        + entries
        + bytes(4)
        + behind
    )


def grey(values):
    return np.repeat(values[:, :, None], 3, 2)


PALETTE = [10, 20, 30, 40, 50, 60, 70, 80, 90, 1, 2, 3]
OF_PALETTE = np.array(PALETTE, np.uint8).reshape(1, 4, 3)
COLOURS = np.dstack([BYTES, BYTES[:, ::-1], BYTES])
MODES = {
    "1.png": (
        lambda: encoded(Image.fromarray(BYTES).point(lambda v: 255 * (v > 99), "1"), "PNG"),
        grey(np.array([[0, 0, 255, 255]])),
    ),
    "1.tiff": (
        lambda: encoded(Image.fromarray(BYTES).point(lambda v: 255 * (v > 99), "1"), "TIFF"),
        grey(np.array([[0, 0, 255, 255]])),
    ),
    "L.png": (lambda: encoded(Image.fromarray(BYTES), "PNG", transparency=18), grey(BYTES)),
    "LA.png": (
        lambda: encoded(Image.merge("LA", [Image.fromarray(BYTES), Image.fromarray(BYTES[:, ::-1])]), "PNG"),
        grey(BYTES),
    ),
    "P.png": (lambda: encoded(of_palette(), "PNG"), OF_PALETTE),
    "P-one.png": (lambda: encoded(of_palette(), "PNG", transparency=1), OF_PALETTE),
    "P-all.png": (lambda: encoded(of_palette(), "PNG", transparency=b"\0\x40\x80\xff"), OF_PALETTE),
    "RGBA.png": (lambda: encoded(Image.fromarray(np.dstack([COLOURS, BYTES])), "PNG"), COLOURS),
    "CMYK.tiff": (
        lambda: encoded(
            Image.fromarray(np.array([[[0] * 4, [255, 0, 0, 0], [0, 0, 255, 0], [0, 0, 0, 255]]], np.uint8), "CMYK"),
            "TIFF",
        ),
        np.array([[[255] * 3, [0, 255, 255], [255, 255, 0], [0] * 3]]),
    ),
    "I;16.png": (lambda: encoded(Image.fromarray(VALUES), "PNG"), grey(BYTES)),
    "I;16.tiff": (lambda: encoded(Image.fromarray(VALUES), "TIFF"), grey(BYTES)),
    "I;16B.tiff": (lambda: encoded(Image.fromarray(VALUES.astype(">u2")), "TIFF"), grey(BYTES)),
    "I;16-white-is-zero.tiff": (lambda: tiff(VALUES, photometric=0), grey(255 - BYTES)),
    "I;12.tiff": (lambda: tiff(VALUES, bits=12, data=bytes([0, 0x01, 0x23, 0x80, 0x0F, 0xFF])), grey(BYTES)),
    "I;16.pgm": (lambda: b"P5 4 1 65535\n" + VALUES.astype(">u2").tobytes(), grey(BYTES)),
    "I;10.pgm": (lambda: b"P5 4 1 1023\n" + np.array([[0, 73, 512, 1023]], ">u2").tobytes(), grey(BYTES)),
    "LA;16.png": (lambda: deep_png(np.dstack([VALUES, VALUES[:, ::-1]]), 4), grey(BYTES)),
    "RGB;16.png": (lambda: deep_png(np.dstack([VALUES, VALUES[:, ::-1], VALUES]), 2), COLOURS),
    "RGBA;16.png": (lambda: deep_png(np.dstack([VALUES, VALUES[:, ::-1], VALUES, VALUES]), 6), COLOURS),
    "RGB;16.tiff": (lambda: tiff(np.dstack([VALUES, VALUES[:, ::-1], VALUES]), photometric=2, samples=3), COLOURS),
}


def of_palette():
    image = Image.fromarray(np.arange(4, dtype=np.uint8)[None], "P")
    image.putpalette(PALETTE)
    return image


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_has_its_right_pixels(mode):
    make, expected = MODES[mode]
    assert decode(make()).tolist() == expected.tolist()


@pytest.mark.parametrize("values, kind, bits", [
    (np.array([[0, 0.5, 1]], np.float32), 3, 32), (np.array([[0, 100, 255]], np.int32), 2, 32),
    (np.array([[0, 100, 255]], np.uint32), 1, 32), (np.array([[-1, 100, 255]], np.int16), 2, 16),
])  # fmt: skip
def test_numbers_whose_range_nothing_states_are_refused(values, kind, bits):
    """Pillow would make them black, or cut them off."""
    assert Image.open(io.BytesIO(tiff(values, kind=kind, bits=bits))).mode in ("I", "F")
    with pytest.raises(DecodeError, match=r"32-bit or signed numbers.*save it with 8 or 16 bits"):
        decode(tiff(values, kind=kind, bits=bits))


def test_what_an_image_is_that_is_not_read():
    colours = np.zeros((1, 2, 3), np.float32)
    with pytest.raises(DecodeError, match="a TIFF of a kind that is not read"):
        decode(tiff(colours, photometric=2, samples=3, kind=3, bits=32))
    with pytest.raises(DecodeError, match="an AVIF or HEIC image, whatever its name says"):
        decode(b"\0\0\0\x1cftypheic" + bytes(100))


def test_damaged_exif_does_not_hide_the_picture():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = bytearray(encoded(Image.fromarray(picture()), "JPEG", quality=95, exif=exif))
    at = data.index(b"Exif\0\0") + 6
    data[at : at + 4] = b"XXXX"
    close(decode(bytes(data)), picture(), 3)


def test_what_pillow_warns_of_is_not_heard_and_what_others_warn_of_is(tmp_path):
    """Threads may not change the process's filters, which others' warnings go through."""
    exif = Image.Exif()
    exif[0x010E] = "x" * 100  # a description, of which the end is missing
    palette = Image.fromarray(picture()).quantize(64)
    files = {
        "tags.webp": encoded(Image.fromarray(picture()), "WEBP", exif=exif.tobytes()[:-90]),
        "palette.png": encoded(palette, "PNG", transparency=bytes([0] * 64)),
        "large.png": encoded(Image.new("1", (9500, 9500)), "PNG"),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    program = """
import pathlib, sys, warnings
from knltrain.data.decode import EncodedImage
def changed(*_, **__): raise AssertionError("the filters are the process's")
warnings.catch_warnings = warnings.simplefilter = warnings.filterwarnings = changed
for path in map(pathlib.Path, sys.argv[1:]):
    image = EncodedImage(path.read_bytes())
    if path.stem != "large": image.pixels()
warnings.warn("of somebody else")
"""
    command = [sys.executable, "-W", "always", "-c", program, *(str(tmp_path / name) for name in files)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    heard = [line.rpartition("Warning: ")[2] for line in run.stderr.splitlines() if "Warning: " in line]
    assert heard == ["of somebody else"]


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


def textured(height, width, seed=0):
    """Detail everywhere, so that a pixel from the wrong place shows."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (-(-height // 4), -(-width // 4), 3), dtype=np.uint8)
    return np.ascontiguousarray(np.kron(coarse, np.ones((4, 4, 1), np.uint8))[:height, :width])


needs_parts = pytest.mark.skipif(decoder_of_parts() is None, reason="no native kernels, or no libjpeg-turbo in Pillow")


@needs_parts
@pytest.mark.parametrize("subsampling", ["444", "422", "420", "440", "411", "Gray"])
@pytest.mark.parametrize("size", [(61, 97), (128, 64), (200, 301)])
def test_a_part_is_the_whole_images_to_the_pixel(subsampling, size):
    pixels = textured(*size)
    if subsampling == "Gray":
        data = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels[:, :, :1]), colorspace="GRAY", quality=90)
    else:
        data = simplejpeg.encode_jpeg(pixels, colorsubsampling=subsampling, quality=90)
    check_parts(data, *size)


@needs_parts
def test_a_part_of_a_progressive_image():
    check_parts(encoded(Image.fromarray(textured(150, 170)), "JPEG", progressive=True), 150, 170)


@needs_parts
def test_a_part_of_an_image_with_restart_markers():
    check_parts(encoded(Image.fromarray(textured(150, 170)), "JPEG", restart_marker_blocks=3), 150, 170)


def check_parts(data, height, width):
    rng = np.random.default_rng(height)
    image = EncodedImage(data)
    for denominator in (1, 2, 4, 8):
        rows, columns = -(-height // denominator), -(-width // denominator)
        whole = EncodedImage(data).pixels(rows, columns) if denominator > 1 else image.pixels()
        assert whole.shape == (rows, columns, 3)
        edges = [(0, 0, rows, columns), (rows - 1, columns - 1, 1, 1), (0, 0, 1, 1), (rows // 2, 0, 1, columns)]
        for _ in range(12):
            top, left = int(rng.integers(rows)), int(rng.integers(columns))
            edges.append((top, left, int(rng.integers(1, rows - top + 1)), int(rng.integers(1, columns - left + 1))))
        native = decoder_of_parts()(data)
        for top, left, high, wide in edges:
            first, begin, got_rows, got_columns = native.begin(top, left, high, wide, denominator)
            part = np.full((got_rows + 1, got_columns, 3), 77, np.uint8)
            native.read(part.ctypes.data)
            inside = part[top - first : top - first + high, left - begin : left - begin + wide]
            assert np.array_equal(inside, whole[top : top + high, left : left + wide])
            assert (part[got_rows] == 77).all(), "it wrote behind the window"


@needs_parts
@pytest.mark.parametrize("size", [24, 100])
def test_what_is_cut_from_a_part_is_what_is_cut_from_the_whole(size):
    data = simplejpeg.encode_jpeg(textured(240, 330), quality=90, colorsubsampling="420")
    rng, smaller = np.random.default_rng(1), 0
    for _ in range(50):
        left, top = (int(rng.integers(limit)) for limit in (280, 190))
        box = Box(left, top, left + int(rng.integers(20, 331 - left)), top + int(rng.integers(20, 241 - top)))
        image = EncodedImage(data)
        part, inside = image.around(box, size)
        denominator = next((d for d in (8, 4, 2) if d * size <= min(box.right - left, box.bottom - top)), 1)
        rows, columns = -(-240 // denominator), -(-330 // denominator)
        whole = image.pixels(rows, columns) if denominator > 1 else image.pixels()
        assert whole.shape[:2] == (rows, columns)
        expected = cut(whole, box.scaled(columns / 330, rows / 240), size)
        assert np.abs(cut(part, inside, size).astype(int) - expected).max() <= 1  # Pillow's weights are of 8 bits
        smaller += part.size < 0.7 * whole.size
    assert smaller > 25, "most boxes leave much of the image alone"


def test_around_without_the_native_decoder(monkeypatch):
    data = simplejpeg.encode_jpeg(textured(240, 330), quality=90)
    boxes = [Box(10, 20, 320, 239), Box(100, 100, 140, 150), Box(-8, -8, 216, 216)]
    native = [EncodedImage(data).around(box, 40) for box in boxes]
    monkeypatch.setattr(decode_module, "decoder_of_parts", lambda: None)
    for box, (part, inside) in zip(boxes, native, strict=True):
        whole, there = EncodedImage(data).around(box, 40)
        assert there[2] - there[0] == pytest.approx(inside[2] - inside[0])
        assert np.abs(cut(part, inside, 40).astype(int) - cut(whole, there, 40)).max() <= 1


@needs_parts
def test_an_image_under_a_box_over_the_border_is_decoded_whole():
    plain = EncodedImage(simplejpeg.encode_jpeg(textured(64, 96)))
    assert plain.around(Box(-4, 3, 92, 67), 64)[0].shape == (64, 96, 3)


@needs_parts
def test_damage_above_a_part_is_damage_and_below_it_is_not_seen():
    data = simplejpeg.encode_jpeg(textured(400, 400), quality=90)
    cut_short = EncodedImage(data[: len(data) // 2])
    assert cut_short.around(Box(0, 0, 400, 100), 90)[0].shape[0] < 110
    with pytest.raises(DecodeError):
        cut_short.around(Box(0, 200, 400, 400), 90)


@needs_parts
def test_flipped_bytes_end_in_pixels_or_in_one_line():
    rng = np.random.default_rng(0)
    for options in ({}, {"progressive": True}):
        data = encoded(Image.fromarray(textured(120, 90)), "JPEG", **options)
        for _ in range(300):
            broken = bytearray(data)
            for place in rng.integers(0, len(data), 3):
                broken[place] = rng.integers(0, 256)
            try:
                image = EncodedImage(bytes(broken))
                if image.height * image.width < 10**6:
                    image.around(Box(0.5, 0.5, image.width / 2 + 0.5, image.height / 2 + 0.5), 20)
            except DecodeError as error:
                assert "\n" not in str(error)


@needs_parts
def test_the_native_decoder_refuses_what_makes_no_sense():
    native = decoder_of_parts()(simplejpeg.encode_jpeg(textured(40, 50)))
    for window in ((0, 0, 41, 1), (0, 0, 1, 51), (-1, 0, 1, 1), (0, -1, 1, 1), (0, 0, 0, 1), (3, 3, 1, 0)):
        with pytest.raises(IndexError):
            native.begin(*window, 1)
    *_, rows, columns = native.begin(30, 0, 10, 50, 1)
    pixels = np.empty((rows, columns, 3), np.uint8)
    native.read(pixels.ctypes.data)
    with pytest.raises(RuntimeError, match="read before"):
        native.read(pixels.ctypes.data)


@needs_parts
def test_either_interface_of_libjpeg_serves():
    """Wheels of Pillow bring libjpeg.so.62; torchvision's bring libjpeg.so.8, as do some distributions."""
    root = importlib.util.find_spec("torchvision")
    found = sorted(Path(root.origin).parents[1].glob("torchvision.libs/libjpeg*.so.8*")) if root else []
    if not found:
        pytest.skip("no libjpeg.so.8: torchvision is not installed")
    program = """
import io, sys
import numpy as np
from PIL import Image
from knltrain import _kernels
assert _kernels.use_libjpeg(sys.argv[1]) == "", _kernels.use_libjpeg(sys.argv[1])
buffer = io.BytesIO()
Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)).save(buffer, "JPEG")
jpeg = _kernels.Jpeg(buffer.getvalue())
top, left, rows, columns = jpeg.begin(13, 21, 40, 30, 1)
part = np.empty((rows, columns, 3), np.uint8)
jpeg.read(part.ctypes.data)
whole = np.asarray(Image.open(buffer).convert("RGB"))
assert np.array_equal(part[:, 21 - left:51 - left], whole[13:53, 21:51])
"""
    subprocess.run([sys.executable, "-c", program, str(found[0])], check=True, timeout=60)


@needs_parts
def test_other_libraries_are_refused_with_the_reason():
    native = importlib.import_module("knltrain._kernels")
    assert "no libjpeg-turbo" in native.use_libjpeg("libm.so.6")
    assert "cannot open" in native.use_libjpeg("/nowhere/libjpeg.so.62")
    assert EncodedImage(simplejpeg.encode_jpeg(textured(20, 20))).around(Box(0, 0, 9, 9), 9)[0].shape[0] == 9
