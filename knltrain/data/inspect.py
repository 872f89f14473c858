"""``knltrain data``: format and size of a data folder, its reading speed, and a sheet of augmented images."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Container
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

from knltrain.config import RunConfig
from knltrain.data.classes import read_choice
from knltrain.data.datasets import open_folder
from knltrain.data.decode import DecodeError, decoder_of_parts
from knltrain.data.folder import DataError, Folder
from knltrain.data.loader import Loader, RankBatch
from knltrain.data.packed import Packed
from knltrain.data.tar import Tar
from knltrain.errors import one_line
from knltrain.files import naming
from knltrain.ops.crops import MEAN, STD
from knltrain.runlog.console import Console

# Images whose sizes are read, and images that are timed: a second or two.
_NUM_SAMPLED = 256
_NUM_TIMED = 512
# The contact sheet: images across and down. Small ones are enlarged to at least this width, for the names below them.
_SHEET = 8
_MIN_CELL, _GAP = 112, 6
_FONT_SIZE, _LINE_HEIGHT = 12, 15


def describe(root: Path, sheet: Path, console: Console, *, config: RunConfig) -> dict[str, Any]:
    """Looks at a folder, and draws a batch of it as the network will see it.

    Args:
        root: of images, of tar shards, or prepared.
        sheet: the PNG file that is written.
        console: where to print.
        config: which classes are used, image size and augmentation; the size is made smaller where prepared images are.

    Returns:
        ``parts``: for each its format, counts and sizes; ``images_per_s_per_core`` of reading, decoding and augmenting
        training images on one core.

    Raises:
        DataError: the folder cannot be used.
    """
    parts: dict[str, Any] = {}
    choice = read_choice(config.class_order, config.classes)
    for part in ("train", "val"):
        try:
            dataset = open_folder(root, part, choice)
        except DataError as error:
            parts[part] = {"error": str(error)}
            console.warn(str(error))
            continue
        parts[part] = _describe_part(dataset)
        console.line(_sentence(part, parts[part]))
        for remark in dataset.remarks:
            console.warn(remark)
        dataset.close()
    usable = [part for part, row in parts.items() if "error" not in row]
    if not usable:
        raise DataError(f"{root}: neither train nor val can be used")
    dataset = open_folder(root, usable[0], choice)
    config = _fitting(dataset, config)
    rate = rate_per_core(dataset, config)
    console.line(f"{rate:,.0f} img/s on one core, {config.augment.name} to {config.image_size} pixels")
    if not isinstance(dataset, Packed) and decoder_of_parts() is None:
        console.warn(
            "JPEGs are decoded whole, not only where a crop needs them: that takes the native kernels, and a "
            "libjpeg-turbo as Pillow's wheels bring it"
        )
    _draw_sheet(open_folder(root, usable[0], choice), config, sheet)
    console.line(f"{sheet}: {_SHEET * _SHEET} images as the network sees them")
    return {"data": str(root), "parts": parts, "images_per_s_per_core": rate, "sheet": str(sheet)}


def _describe_part(dataset: Folder | Packed | Tar) -> dict[str, Any]:
    counts = np.bincount(dataset.labels, minlength=len(dataset.classes))
    row: dict[str, Any] = {
        "format": {Folder: "folder", Packed: "raw", Tar: "tar"}[type(dataset)],
        "images": len(dataset),
        "classes": len(dataset.classes),
        "smallest_class": int(counts.min()),
        "largest_class": int(counts.max()),
    }
    sizes, stored, bad = [], [], []
    for index in np.unique(np.linspace(0, len(dataset) - 1, _NUM_SAMPLED).astype(int)).tolist():
        try:
            image = dataset.image(index)
            image.pixels()
        except (DecodeError, OSError) as error:
            bad.append(str(dataset.bad(index, error)))
            continue
        sizes.append((image.height, image.width))
        if isinstance(dataset, Packed):
            stored.append(image.height * image.width * 3)
        else:
            path, _, length = dataset.where(index)
            stored.append(length if length >= 0 else Path(path).stat().st_size)
    if sizes:
        row["mean_height"], row["mean_width"] = (float(side) for side in np.mean(sizes, axis=0))
        row["mean_bytes"] = float(np.mean(stored))
    return {**row, "sampled": len(sizes) + len(bad), "bad": bad}


def _sentence(part: str, row: dict[str, Any]) -> str:
    text = f"{part}: {row['format']}, {row['images']:,} images in {row['classes']:,} classes"
    if row["smallest_class"] != row["largest_class"]:
        text += f" of {row['smallest_class']:,} to {row['largest_class']:,}"
    if "mean_height" in row:
        text += (
            f"; on average {row['mean_height']:.0f} x {row['mean_width']:.0f} px, {row['mean_bytes'] / 1024:.0f} KiB"
        )
    if row["bad"]:
        text += f"; {len(row['bad'])} of {row['sampled']} looked at cannot be decoded, the first {row['bad'][0]}"
    return text


def _fitting(dataset: Folder | Packed | Tar, config: RunConfig) -> RunConfig:
    """The same with a size that prepared images have."""
    if not isinstance(dataset, Packed) or dataset.size >= config.resize:
        return config
    augmentation = dataclasses.replace(config.augment, resize=dataset.size)
    return dataclasses.replace(config, image_size=min(config.image_size, dataset.size), augment=augmentation)


def rate_per_core(dataset: Folder | Packed | Tar, config: RunConfig, timed: int = _NUM_TIMED) -> float:
    """Returns images/s of reading, decoding and augmenting on one core, over ``timed`` images; closes the data set.

    Args:
        dataset: one part.
        config: image size, made smaller where prepared images are, and augmentation.
        timed: images, a multiple of 64; 256 come before them.
    """
    batch = 64
    config = dataclasses.replace(_fitting(dataset, config), on_bad="skip")
    loader = Loader(dataset, config, dtype=torch.float32, workers=1)
    batches = loader.training(RankBatch(batch, batch, 0, 1), 0, 4 + timed // batch)
    for _ in range(4):
        next(batches)
    start = time.perf_counter()
    count = sum(len(labels) for _, labels in batches)
    seconds = time.perf_counter() - start
    loader.close()
    return count / seconds


def _draw_sheet(dataset: Folder | Packed | Tar, config: RunConfig, path: Path) -> None:
    loader = Loader(dataset, dataclasses.replace(config, on_bad="skip"), dtype=torch.float32, workers=1)
    count = _SHEET * _SHEET
    images, labels = next(loader.training(RankBatch(count, count, 0, 1), 0, 1))
    loader.close()
    pixels = ((images.permute(0, 2, 3, 1) * torch.tensor(STD) + torch.tensor(MEAN)) * 255).round().clamp(0, 255).byte()
    scale = max(1, -(-_MIN_CELL // config.image_size))
    side = scale * config.image_size
    path_of_font = str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"))
    font, letters = ImageFont.truetype(path_of_font, _FONT_SIZE), FT2Font(path_of_font).get_charmap()
    names = {
        label: _wrapped(_spelled(one_line(dataset.classes[label]), letters), font, side)
        for label in set(labels.tolist())
    }
    height = side + _LINE_HEIGHT * max(map(len, names.values())) + _GAP
    sheet = Image.new("RGB", (_SHEET * (side + _GAP) - _GAP, _SHEET * height), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (image, label) in enumerate(zip(pixels.numpy(), labels.tolist(), strict=True)):
        x, y = place % _SHEET * (side + _GAP), place // _SHEET * height
        sheet.paste(Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST), (x, y))
        for number, line in enumerate(names[label]):
            draw.text((x, y + side + number * _LINE_HEIGHT), line, fill="black", font=font)
    with naming(path):
        sheet.save(path)


def _spelled(name: str, letters: Container[int]) -> str:
    """The name with escapes for letters that the font lacks, which would all be the same box."""
    return "".join(letter if ord(letter) in letters else letter.encode("unicode_escape").decode() for letter in name)


def _wrapped(name: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The whole name in lines of at most ``width`` pixels, broken behind spaces and underscores where there are any."""
    lines, rest = [], name
    while rest:
        fits = max(1, sum(font.getlength(rest[:length]) <= width for length in range(1, len(rest) + 1)))
        if fits < len(rest):
            fits = max(rest.rfind(mark, 0, fits) for mark in " _") + 1 or fits
        lines.append(rest[:fits])
        rest = rest[fits:]
    return lines
