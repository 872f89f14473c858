import os

import numpy as np
import pytest
from conftest import write_jpeg
from prepared import prepare

from knltrain.config import RunConfig
from knltrain.data.datasets import open_data, open_part, remarks_of
from knltrain.data.folder import SUFFIXES, DataError, Folder
from knltrain.data.left_out import NOT_READ
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


def said_of(folder):
    return [remark.partition(": ")[2] for remark in folder.remarks]


def test_folders_below_a_class_may_be_links_as_for_torchvision(tmp_path, torchvision):
    """Of files, of folders, of folders of links, one name twice; and circles, which torchvision walks to the end."""
    for name in ("store/a/1", "store/deep/b/2", "other/3", "train/x/4"):
        write_jpeg(tmp_path / f"{name}.jpg", 8, 8, 0)
    (tmp_path / "links").mkdir()
    (tmp_path / "links/5.jpg").symlink_to(tmp_path / "other/3.jpg")
    for name, target in (("a", "store/a"), ("deep", "store/deep"), ("links", "links")):
        (tmp_path / "train/x" / name).symlink_to(tmp_path / target)
    theirs = torchvision.datasets.ImageFolder(str(tmp_path / "train"))
    part = Folder(tmp_path / "train")
    assert sorted(part.name(index) for index in range(len(part))) == sorted(path for path, _ in theirs.samples)
    assert not part.remarks
    before = [part.name(index) for index in range(len(part))]
    for name, target in (("self", "train/x"), ("up", "train"), ("again", "store/deep/b")):
        (tmp_path / "train/x" / name).symlink_to(tmp_path / target)
    (tmp_path / "store/deep/back").symlink_to("..")  # to store, which holds a and deep again
    part = Folder(tmp_path / "train")
    assert sorted(map(os.path.basename, (part.name(index) for index in range(len(part))))) == sorted(
        map(os.path.basename, before)
    )
    assert "links to folders not followed" in said_of(part)[0]


def test_a_link_to_nowhere_below_a_class_is_not_left_out(tmp_path):
    write_jpeg(tmp_path / "train/x/1.jpg", 8, 8, 0)
    (tmp_path / "train/x/more").symlink_to(tmp_path / "not mounted")
    assert "x/more: No such file or directory; repair this link, or remove it" in refused(tmp_path / "train")


def test_what_systems_and_programs_leave_behind_is_no_class_and_no_image(tmp_path):
    """In one part, in both, in a class and below it; and it is said once, with counts."""
    for name in ("x/1.jpg", "x/sub/2.jpg", "y/3.jpg"):
        write_jpeg(tmp_path / "train" / name, 8, 8, 0)
    clean = Folder(tmp_path / "train")
    for name in (".ipynb_checkpoints/1-checkpoint.jpg", "__MACOSX/x/._1.jpg", "x/._1.jpg", "x/._2.jpg", "y/.DS_Store",
                 ".DS_Store", "x/Thumbs.db", "x/sub/.ipynb_checkpoints/2.jpg", "y/@eaDir/3.jpg", "x/.hidden.jpg",
                 "lost+found/1.jpg"):  # fmt: skip
        write_jpeg(tmp_path / "train" / name, 8, 8, 0)
    part = Folder(tmp_path / "train")
    assert part.classes == ("x", "y")
    assert [part.name(index) for index in range(len(part))] == [clean.name(index) for index in range(len(clean))]
    (said,) = said_of(part)
    assert said.startswith("ignored files and folders, which are hidden or left behind by programs: 11, of these ")
    assert all(name in said for name in (".ipynb_checkpoints (2)", ".DS_Store (2)", "._* (2)", "5 other names"))
    assert not clean.remarks


def test_images_of_formats_that_are_not_read_are_counted(tmp_path):
    for name in ("x/1.jpg", "y/2.jpg", "x/a.avif", "x/b.AVIF", "y/c.gif", "y/deep/d.heic", "loose.jpg", "notes.txt"):
        write_jpeg(tmp_path / "train" / name, 8, 8, 0)
    part = Folder(tmp_path / "train")
    assert len(part) == 2
    assert said_of(part) == [
        "images left out, whose format is not read: 2 .avif, 1 .gif, 1 .heic; convert them to JPEG or PNG",
        "images left out, which lie outside of the class folders: 1",
    ]
    (tmp_path / "train/y/2.jpg").unlink()
    assert "2 .avif, 1 .gif, 1 .heic of" in refused(tmp_path / "train")
    assert not {*SUFFIXES} & {*NOT_READ}


def test_what_is_left_out_is_said_by_every_command(tmp_path, capsys):
    for part in ("train", "val"):
        write_jpeg(tmp_path / "src" / part / "x" / "1.jpg", 40, 40, 0)
    write_jpeg(tmp_path / "src/train/x/2.avif", 40, 40, 0)
    train, val = open_data(RunConfig(data=str(tmp_path / "src"), image_size=32))
    assert remarks_of(train, val, train) == list(train.remarks)
    prepare(tmp_path / "src", tmp_path / "raw", workers=1)
    assert "images left out, whose format is not read: 1 .avif" in capsys.readouterr().out.replace("\n", " ")


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
