"""Where the parts of a data set are: the names and layouts that people have, and what is said of others."""

import gzip
import os

import pytest
from conftest import write_jpeg
from prepared import jpeg, prepare, webdataset

from knltrain.config import RunConfig
from knltrain.data.datasets import open_data, open_folder
from knltrain.data.folder import DataError, Folder
from knltrain.data.parts import find_part
from knltrain.data.tar import Tar
from knltrain.errors import ConfigError

SAMPLES = [("1.jpg", jpeg(0)), ("1.cls", b"0")]


def images(root, *parts):
    for part in parts:
        write_jpeg(root / part / "a" / "1.jpg", 40, 40, 0)
    return root


def tars(root, *names):
    for name in names:
        webdataset(root / name, SAMPLES)
    return root


def opened(root):
    return open_data(RunConfig(data=str(root), image_size=24))


@pytest.mark.parametrize("train", ["train", "training", "Train"])
@pytest.mark.parametrize("val", ["val", "validation", "valid", "VAL"])
def test_folders_by_their_usual_names(tmp_path, train, val):
    images(tmp_path / "src", train, val)
    parts = opened(tmp_path / "src")
    assert [part.part.name for part in parts] == [train, val]
    assert not any(part.remarks for part in parts)


@pytest.mark.parametrize("train, val", [
    ("train-000.tar", "val-000.tar"), ("train_0.tar", "val_0.tar"), ("train/0.tar", "val/0.tar"),
    ("imagenet-train-000000.tar", "imagenet-val-000000.tar"),
    ("imagenet1k-train-0000.tar", "imagenet1k-validation-00.tar"),
    ("train0.tar", "valid0.tar"), ("TRAIN-0.TAR", "validation/0.tar"),
])  # fmt: skip
def test_tar_files_by_their_usual_names(tmp_path, train, val):
    tars(tmp_path / "src", train, val, "retrain-0.tar", "mytrainer-0.tar")
    parts = opened(tmp_path / "src")
    assert [part.where(0)[0] for part in parts] == [str(tmp_path / "src" / name) for name in (train, val)]
    assert prepare(tmp_path / "src", tmp_path / "raw", workers=1)["counts"] == {"train": 1, "val": 1}


def test_the_test_part_is_taken_where_there_is_no_other_and_that_is_said(tmp_path, capsys):
    images(tmp_path / "src", "train", "test")
    _, val = opened(tmp_path / "src")
    assert val.part.name == "test"
    assert "test is taken as the val part: there is none called val, validation or valid" in val.remarks[0]
    prepare(tmp_path / "src", tmp_path / "raw", workers=1)
    assert "test is taken as the val part" in capsys.readouterr().out.replace("\n", " ")
    images(tmp_path / "src", "val")
    _, val = opened(tmp_path / "src")
    assert (val.part.name, val.remarks) == ("val", ())
    images(tmp_path / "src", "valid")
    _, val = opened(tmp_path / "src")
    assert (val.part.name, len(val.remarks)) == ("val", 1)
    assert val.remarks[0].endswith("valid is not read: val is there")


def test_a_part_that_prepare_does_not_find_is_said(tmp_path, capsys):
    images(tmp_path / "src", "train", "dev")
    prepare(tmp_path / "src", tmp_path / "raw", workers=1)
    said = capsys.readouterr().out.replace("\n", " ")
    assert "has no val part, which training needs: only train is prepared; in " in said
    assert "there is dev, train" in said


def test_archives_beside_what_was_unpacked_from_them(tmp_path):
    """In train/, the tar files of ImageNet's classes; beside it, train.tar."""
    images(tmp_path, "train", "val")
    for name in ("train.tar", "train.tar.gz", "val.tgz", "train/a.tar", "train/b.tar.gz"):
        (tmp_path / name).write_bytes(b"whatever")
    train, val = opened(tmp_path)
    assert isinstance(train, Folder)
    assert train.remarks[0].endswith("its folders of images are read, and not a.tar and 3 more")
    assert val.remarks[0].endswith("its folders of images are read, and not val.tgz")


def test_shards_beside_folders(tmp_path):
    tars(images(tmp_path, "train"), "train-0.tar")
    part = open_folder(tmp_path, "train")
    assert isinstance(part, Tar)
    assert part.remarks[0].endswith("train: its folders are not read: train-0.tar beside it is")


@pytest.mark.parametrize("name", ["train-0.tar.gz", "train/0.tgz", "imagenet-train-0.tar.zst"])
def test_compressed_tar_files(tmp_path, name):
    """All of them, or the few that were not decompressed with the others."""
    for others in ((), ("train-1.tar",)):
        tars(tmp_path, name, *others)
        with pytest.raises(DataError, match=rf"{os.path.basename(name)}: compressed; .*\(gunzip"):
            open_folder(tmp_path, "train")


def test_a_compressed_tar_file_by_another_name(tmp_path):
    tars(tmp_path, "train-0.tar")
    (tmp_path / "train-0.tar").write_bytes(gzip.compress((tmp_path / "train-0.tar").read_bytes()))
    with pytest.raises(DataError, match=r"train-0\.tar: compressed with gzip; .*decompress it"):
        open_folder(tmp_path, "train")


def refused(root):
    with pytest.raises(DataError) as raised:
        open_folder(root, "train")
    return str(raised.value)


def test_what_is_there_instead_is_said(tmp_path):
    archive = tmp_path / "data.tar"
    archive.write_bytes(b"")
    assert f"{archive}: a file; --data takes a folder" in refused(archive)
    assert f"{tmp_path}/nowhere/train: no such folder; --data takes" in refused(tmp_path / "nowhere")
    images(tmp_path / "deep/imagenette2", "train", "val")
    assert f"but there is {tmp_path}/deep/imagenette2: give --data" in refused(tmp_path / "deep")
    tars(tmp_path / "repository/data", "train-0000.tar")
    assert f"but there is {tmp_path}/repository/data: give --data" in refused(tmp_path / "repository")
    images(tmp_path / "kaggle/ILSVRC/Data/CLS-LOC", "train")
    assert "give --data" in refused(tmp_path / "kaggle")
    assert f"give the folder that holds it, --data {tmp_path}/deep/imagenette2" in refused(
        tmp_path / "deep/imagenette2/train"
    )
    images(tmp_path / "caltech", "x", "y")
    write_jpeg(tmp_path / "caltech/cat/1.jpg", 8, 8, 0)
    assert "has folders of classes, and is not split into parts" in refused(tmp_path / "caltech")
    for name in ("hub/data/train-00000-of-00002.parquet", "flat/train.parquet"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"PAR1")
        assert "Parquet files, which are not read" in refused(tmp_path / name.split("/")[0])
    tars(tmp_path / "archives", "ILSVRC2012_img_train.tar")
    assert "knltrain prepare reads it" in refused(tmp_path / "archives")
    (tmp_path / "empty").mkdir()
    assert "there is nothing; --data takes" in refused(tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"nothing to prepare; it must hold .*imagenette2: give --data"):
        prepare(tmp_path / "deep", tmp_path / "out", workers=1)


def kaggle(root, classes=("n00000001", "n00000002")):
    """Kaggle's layout: folders of classes for training, one folder for validation, and the list beside ILSVRC."""
    images_of = root / "ILSVRC/Data/CLS-LOC"
    lines = ["ImageId,PredictionString"]
    for number, name in enumerate(classes):
        write_jpeg(images_of / "train" / name / f"{name}_1.JPEG", 40, 40, number)
    for number, name in enumerate(classes[::-1], 1):
        write_jpeg(images_of / f"val/ILSVRC2012_val_{number:08}.JPEG", 40, 40, number)
        lines.append(f"ILSVRC2012_val_{number:08},{name} 85 1 499 272 ")
    (images_of / "test").mkdir()
    (root / "LOC_val_solution.csv").write_text("\n".join(lines))
    return images_of


def test_a_flat_val_folder_with_its_list(tmp_path):
    root = kaggle(tmp_path / "kaggle")
    train, val = opened(root)
    assert train.classes == val.classes == ("n00000001", "n00000002")
    assert [(os.path.basename(val.name(i)), int(val.labels[i])) for i in range(2)] == [
        ("ILSVRC2012_val_00000002.JPEG", 0), ("ILSVRC2012_val_00000001.JPEG", 1)
    ]  # fmt: skip
    assert prepare(root, tmp_path / "raw", workers=1)["counts"] == {"train": 2, "val": 2}
    (tmp_path / "only").write_text("n00000002\n")
    for part in open_data(RunConfig(data=str(root), image_size=24, classes=str(tmp_path / "only"))):
        assert (part.classes, len(part)) == (("n00000002",), 1)
    write_jpeg(root / "val/ILSVRC2012_val_00000003.JPEG", 8, 8, 0)
    with pytest.raises(DataError, match=r"LOC_val_solution\.csv: ILSVRC2012_val_00000003\.JPEG of .*val is not listed"):
        open_folder(root, "val")
    (tmp_path / "kaggle/LOC_val_solution.csv").unlink()
    with pytest.raises(DataError, match=r"val comes without its classes: put .* or LOC_val_solution\.csv beside it"):
        open_folder(root, "val")


def test_tiny_imagenets_layout(tmp_path):
    """Images of a class in a folder below it, and those of val in one folder, beside their list."""
    lines = []
    for number in (1, 2):
        write_jpeg(tmp_path / f"train/n0000000{number}/images/{number}.JPEG", 40, 40, number)
        write_jpeg(tmp_path / f"val/images/val_{number}.JPEG", 40, 40, number)
        write_jpeg(tmp_path / f"test/images/test_{number}.JPEG", 40, 40, number)
        lines.append(f"val_{number}.JPEG\tn0000000{3 - number}\t0\t32\t44\t62\n")
    (tmp_path / "val/val_annotations.txt").write_text("".join(lines))
    train, val = opened(tmp_path)
    assert train.classes == val.classes == ("n00000001", "n00000002")
    assert [os.path.basename(val.name(i)) for i in range(2)] == ["val_2.JPEG", "val_1.JPEG"]
    (tmp_path / "val/val_annotations.txt").unlink()
    assert open_folder(tmp_path, "val").classes == ("images",), "as torchvision has it"


@pytest.mark.parametrize("names, said", [
    (["train-0.tar", "train-1.tar"], None), (["train-001.tar", "train-002.tar"], None), (["train.tar"], None),
    (["train-0.tar", "train-2.tar"], "by number 1"), (["train-000.tar", "train-005.tar"], "by number 1, 2, 3 and more"),
    (["train-00000-of-00003.tar", "train-00001-of-00003.tar"], "by number 2"),
    ([f"train-0000{n}-of-00003.tar" for n in range(3)], None), (["train/7.tar", "train/9.tar"], "by number 8"),
])  # fmt: skip
def test_tar_files_that_are_missing_between_others_are_said(tmp_path, names, said):
    tars(tmp_path, *names)
    remarks = open_folder(tmp_path, "train").remarks
    assert len(remarks) == (said is not None)
    assert all(said in remark for remark in remarks)


def test_a_part_in_an_archive_and_the_other_in_folders(tmp_path, capsys):
    """ImageNet's train archive unpacked, and that of val not."""
    for number in (1, 2):
        write_jpeg(tmp_path / f"src/train/n0000000{number}/1.JPEG", 40, 40, number)
    webdataset(tmp_path / "src/ILSVRC2012_img_val.tar", [(f"ILSVRC2012_val_{n:08}.JPEG", jpeg(n)) for n in (1, 2)])
    listed = [f"ILSVRC2012_val_{n:08},n0000000{n} 1 2 3 4" for n in (1, 2)]
    (tmp_path / "src/LOC_val_solution.csv").write_text("\n".join(listed))
    assert prepare(tmp_path / "src", tmp_path / "raw", workers=1)["counts"] == {"train": 2, "val": 2}
    assert "only" not in capsys.readouterr().out
    write_jpeg(tmp_path / "src/val/n00000001/1.JPEG", 40, 40, 1)
    prepare(tmp_path / "src", tmp_path / "again", workers=1)
    assert "ILSVRC2012_img_val.tar is read, and nothing else of the val part" in capsys.readouterr().out.replace(
        "\n", " "
    )


def test_a_folder_that_may_not_be_listed_is_not_empty(tmp_path, monkeypatch):
    images(tmp_path, "train")
    listdir, scandir = os.listdir, os.scandir

    def denied(real):
        def look(path):
            if str(path) in forbidden:
                raise PermissionError(13, "Permission denied", str(path))
            return real(path)

        return look

    monkeypatch.setattr(os, "listdir", denied(listdir))
    monkeypatch.setattr(os, "scandir", denied(scandir))
    for path in (tmp_path, tmp_path / "train", tmp_path / "train/a"):
        forbidden = {str(path)}
        with pytest.raises(DataError, match=f"^{path}: Permission denied"):
            open_folder(tmp_path, "train")
        with pytest.raises(DataError, match=f"^{path}: Permission denied"):
            prepare(tmp_path, tmp_path.parent / "out", workers=1)
    forbidden = set()
    assert find_part(tmp_path, "train").folder == tmp_path / "train"
