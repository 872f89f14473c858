import numpy as np

from knltrain.config import RunConfig
from knltrain.data import shapes
from knltrain.data.datasets import open_data


def test_pictures_are_made_once_and_are_a_data_set(own_cache, monkeypatch):
    folder = shapes.shapes_folder()
    stamp = (folder / "train" / "disc-plain" / "0000.jpg").stat().st_mtime_ns
    assert shapes.shapes_folder() == folder
    assert (folder / "train" / "disc-plain" / "0000.jpg").stat().st_mtime_ns == stamp
    assert list(own_cache.glob("shapes*")) == [folder]  # other tests' tar indices may lie beside it
    train, val = open_data(RunConfig(data="shapes", image_size=32))
    assert (len(train), len(val), len(train.classes)) == (12_000, 1_000, 10)
    assert train.image(0).pixels().shape == (48, 48, 3)


def test_no_picture_is_in_both_parts(tmp_path, monkeypatch):
    monkeypatch.setenv("KNLTRAIN_CACHE", str(tmp_path))
    monkeypatch.setattr(shapes, "COUNTS", {"train": 3, "val": 2})
    pictures = [path.read_bytes() for path in shapes.shapes_folder().rglob("*.jpg")]
    assert len(set(pictures)) == len(pictures) == 10 * (3 + 2)


def test_pictures_depend_on_class_and_number_alone():
    together = shapes.draw(3, 10, 5)
    assert np.array_equal(together[2], shapes.draw(3, 12, 1)[0])
    assert not np.array_equal(together[0], together[1])
    assert not np.array_equal(shapes.draw(2, 10, 1), shapes.draw(3, 10, 1))


def test_classes_cannot_be_told_by_colour():
    """Mean colour and brightness spread are the same mixture in every class."""
    pictures = [shapes.draw(label, 0, 300).astype(float) for label in range(10)]
    means = np.array([p.mean((0, 1, 2)) for p in pictures])
    assert np.abs(means - means.mean(0)).max() < 10


def test_an_unwritable_cache_is_one_line(tmp_path, monkeypatch):
    import pytest

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KNLTRAIN_CACHE", str(tmp_path / "file" / "sub"))
    with pytest.raises(shapes.DataError, match="KNLTRAIN_CACHE"):
        shapes.shapes_folder()
