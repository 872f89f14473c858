"""The contact sheet of ``knltrain data``: whole names of classes below images, whatever letters they have."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from knltrain.config import RunConfig, override
from knltrain.data.inspect import describe
from knltrain.runlog.console import Console

NAMES = ["automobile", "größe_Ωμέγα", "a_class_with_a_very_long_name_of_many_words", "x" * 90, "two\nlines", "犬"]


@pytest.fixture
def folder(tmp_path):
    for part in ("train", "val"):
        for name in NAMES:
            (tmp_path / part / name).mkdir(parents=True)
            Image.fromarray(np.full((32, 32, 3), 255, np.uint8)).save(tmp_path / part / name / "0.png")
    return tmp_path


def test_names_are_whole_and_within_their_cells(folder, tmp_path, monkeypatch):
    drawn = {}
    text = ImageDraw.ImageDraw.text

    def spy(draw, place, line, **options):
        drawn.setdefault(place[0], []).append((place[1], line, options["font"].getlength(line)))
        missing = options["font"].getmask("\uffff").getbbox()
        assert all(options["font"].getmask(letter).getbbox() != missing for letter in line.strip())
        text(draw, place, line, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", spy)
    config = override(RunConfig(), {"image_size": 32, "augment.name": "none"})
    describe(folder, tmp_path / "sheet.png", Console(), config=config)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size[0] == 8 * 128 + 7 * 6
        height = sheet.size[1] // 8
    found = set()
    for lines in drawn.values():
        assert all(length <= 128 for _, _, length in lines)
        for row in range(8):
            found.add("".join(line for y, line, _ in lines if row * height <= y < (row + 1) * height))
    assert found == {*NAMES[:4], "two\\nlines", "\\u72ac"}
