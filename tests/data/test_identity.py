"""What tells one data set from another, between ranks and in checkpoints."""

import hashlib
import shutil

import pytest
from conftest import write_jpeg
from prepared import jpeg, prepare, webdataset

from knltrain.config import RunConfig
from knltrain.data.datasets import open_folder, open_part
from knltrain.data.identity import identity


def webdata(root, labels="01"):
    files = [(f"{n}.{kind}", data) for n, label in enumerate(labels)
             for kind, data in (("jpg", jpeg(n)), ("cls", label.encode()))]  # fmt: skip
    webdataset(root / "train-0.tar", files)
    return root


@pytest.fixture(params=["folder", "raw", "tar", "webdataset"])
def root(request, image_folder, tmp_path):
    out = tmp_path / "data"
    if request.param == "folder":
        shutil.copytree(image_folder, out)
    elif request.param == "webdataset":
        webdata(out)
    else:
        prepare(image_folder, out, format=request.param, workers=1)
    return out


def test_a_copy_is_the_same(root, tmp_path):
    one = open_folder(root, "train")
    shutil.copytree(root, tmp_path / "elsewhere")
    assert identity(one) == identity(open_folder(tmp_path / "elsewhere", "train"))
    assert identity(one)["images"] == len(one)
    assert identity(one)["labels_sha256"] == hashlib.sha256(one.labels.tobytes()).hexdigest()


def changed(before, after):
    return {key for key in before if before[key] != after[key]}


def test_each_value_tells_what_differs(tmp_path):
    for name in ("a/1", "a/2", "b/3"):
        write_jpeg(tmp_path / "train" / f"{name}.jpg", 8, 8, 0)

    def now():
        return identity(open_folder(tmp_path, "train"))

    first = now()
    (tmp_path / "train/a/2.jpg").rename(tmp_path / "train/a/9.jpg")
    assert changed(first, now()) == {"files_sha256"}
    (tmp_path / "train/b").rename(tmp_path / "train/c")
    assert changed(first, now()) == {"files_sha256", "classes_sha256"}
    write_jpeg(tmp_path / "train/c/4.jpg", 8, 8, 0)
    assert changed(first, now()) == set(first)


def test_other_labels_or_pixels_of_shards_differ(image_folder, tmp_path):
    ours, theirs = (identity(open_folder(webdata(tmp_path / labels, labels), "train")) for labels in ("01", "10"))
    assert changed(ours, theirs) == {"labels_sha256", "files_sha256"}
    for size in (32, 40):
        prepare(image_folder, tmp_path / f"tar{size}", format="tar", size=size, workers=1)
    ours, theirs = (identity(open_folder(tmp_path / f"tar{size}", "train")) for size in (32, 40))
    assert changed(ours, theirs) == {"files_sha256"}


def test_data_without_files_have_one_too():
    parts = [identity(open_part(RunConfig(data="synthetic"), part)) for part in ("train", "train", "val")]
    assert parts[0] == parts[1]
    assert changed(parts[0], parts[2]) == {"images", "labels_sha256"}
