import os

import numpy as np
import pytest
from conftest import write_jpeg

from knltrain.config import RunConfig
from knltrain.data.datasets import open_data, open_part
from knltrain.data.folder import DataError, Folder
from knltrain.errors import ConfigError


def test_reads_as_torchvision_does(image_folder, torchvision):
    theirs = torchvision.datasets.ImageFolder(str(image_folder / "train"))
    ours = Folder(image_folder / "train")
    assert list(ours.classes) == theirs.classes
    assert [(ours.name(i), int(ours.labels[i])) for i in range(len(ours))] == theirs.samples
    assert np.array_equal(np.asarray(theirs[5][0]), ours.image(5).pixels())


def test_nested_folders_links_and_other_files(tmp_path):
    write_jpeg(tmp_path / "store" / "deep" / "b.JPG", 8, 8, 0)
    write_jpeg(tmp_path / "train" / "x" / "a.jpeg", 8, 8, 1)
    (tmp_path / "train" / "x" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "y").symlink_to(tmp_path / "store")
    (tmp_path / "train" / "list.txt").write_text("no class")
    folder = Folder(tmp_path / "train")
    assert folder.classes == ("x", "y")
    assert [os.path.basename(folder.name(i)) for i in range(len(folder))] == ["a.jpeg", "b.JPG"]


def test_names_with_newlines_and_spaces(tmp_path):
    write_jpeg(tmp_path / "a class\nwith lines" / " x\n.jpg", 8, 8, 0)
    folder = Folder(tmp_path)
    assert folder.image(0).pixels().shape == (8, 8, 3)


def refused(path):
    with pytest.raises(DataError) as raised:
        Folder(path)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_missing_and_empty_folders_are_one_line(tmp_path):
    assert "no such folder" in refused(tmp_path / "train")
    (tmp_path / "train").mkdir()
    assert "no class folders" in refused(tmp_path / "train")
    (tmp_path / "train" / "cat").mkdir()
    (tmp_path / "train" / "dog").mkdir()
    message = refused(tmp_path / "train")
    assert str(tmp_path / "train" / "cat") in message
    assert "no image" in message
    assert "1 other class" in message


def test_a_bad_image_is_found_at_start_up(tmp_path):
    for index in range(5):
        write_jpeg(tmp_path / "train" / "x" / f"{index}.jpg", 32, 32, index)
    bad = tmp_path / "train" / "x" / "3.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(DataError) as raised:
        open_part(RunConfig(data=str(tmp_path)), "train")
    assert str(bad) in str(raised.value)
    bad.write_text("I am text")
    with pytest.raises(DataError, match="no image"):
        open_part(RunConfig(data=str(tmp_path)), "train")


def test_different_classes_are_named(tmp_path):
    for name in ("train/cat", "train/dog", "val/cat"):
        write_jpeg(tmp_path / name / "1.jpg", 8, 8, 0)
    with pytest.raises(DataError, match="'dog' is in train and not in val"):
        open_data(RunConfig(data=str(tmp_path)))


def test_no_data_is_a_usage_error():
    with pytest.raises(ConfigError, match="--data"):
        open_part(RunConfig(), "train")


def test_synthetic_has_imagenets_counts():
    dataset = open_part(RunConfig(data="synthetic"), "train")
    assert (len(dataset), len(dataset.classes)) == (1_281_167, 1000)
    assert dataset.image(77).pixels().shape == (256, 256, 3)
