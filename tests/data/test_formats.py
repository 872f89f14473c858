"""Reading what ``knltrain prepare`` writes, and tar files of anybody's."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from prepared import SIZE, jpeg, prepare, webdataset

from knltrain.config import AugmentConfig, RunConfig
from knltrain.data import augment, order, tar_index
from knltrain.data import manifest as manifest_module
from knltrain.data import packed as packed_module
from knltrain.data.classes import read_choice
from knltrain.data.datasets import open_data, open_folder, open_part
from knltrain.data.folder import DataError, Folder
from knltrain.data.loader import Loader, RankBatch
from knltrain.data.manifest import NAME, Manifest, Shard, encode_manifest
from knltrain.data.packed import Packed
from knltrain.data.tar import Tar
from knltrain.errors import ConfigError
from knltrain.ops.crops import MEAN, STD, normalize


def batches(root, config, *, rank=0, ranks=1, workers=2, steps=3, part="train"):
    loader = Loader(
        open_part(config_for(config, root), part), config_for(config, root), dtype=torch.float32, workers=workers
    )
    try:
        return [
            (images.clone(), labels)
            for images, labels in loader.training(RankBatch(16, 16 // ranks, rank, ranks), 0, steps)
        ]
    finally:
        loader.close()


def config_for(config, root):
    return replace(config, data=str(root))


CROPS = RunConfig(image_size=24, seed=5, augment=AugmentConfig(name="crop-flip", resize=SIZE))


@pytest.mark.parametrize("name", ["crop-flip", "pad-crop-flip"])
def test_raw_crops_are_the_reference_paths(raw, name):
    config = RunConfig(image_size=24, seed=5, augment=AugmentConfig(name=name, resize=SIZE))
    dataset = open_folder(raw, "train")
    for step, (images, labels) in enumerate(batches(raw, config)):
        samples = order.samples(5, 48, 16 * step, 16 * step + 16)
        drawn = order.draws(5, 16 * step, 16 * step + 16, augment.NUM_DRAWS)
        assert labels.tolist() == dataset.labels[samples].tolist()
        for image, sample, row in zip(images, samples.tolist(), drawn, strict=True):
            box = augment.training_box(config, SIZE, SIZE, row)
            pixels = np.ascontiguousarray(augment.cut(dataset.image(sample).pixels(), box, 24))
            out = torch.empty(1, 3, 24, 24).contiguous(memory_format=torch.channels_last)
            normalize(torch.from_numpy(pixels[None]), out)
            assert torch.equal(image, out[0])


def test_raw_random_resized_crops_are_the_reference_paths_but_for_rounding(raw):
    config = RunConfig(image_size=24, seed=5, augment=AugmentConfig(name="rrc", resize=SIZE))
    dataset = open_folder(raw, "train")
    images, _ = batches(raw, config, steps=1)[0]
    samples, drawn = order.samples(5, 48, 0, 16), order.draws(5, 0, 16, augment.NUM_DRAWS)
    for image, sample, row in zip(images, samples.tolist(), drawn, strict=True):
        pixels = augment.cut(dataset.image(sample).pixels(), augment.training_box(config, SIZE, SIZE, row), 24)
        out = torch.empty(1, 3, 24, 24).contiguous(memory_format=torch.channels_last)
        normalize(torch.from_numpy(np.array(pixels[None])), out)
        assert (image - out[0]).abs().max() <= 1.01 / 255 / 0.224


@pytest.mark.parametrize("name", ["crop-flip", "pad-crop-flip", "rrc"])
def test_boxes_of_many_are_the_boxes_of_each(name):
    config = RunConfig(image_size=24, augment=AugmentConfig(name=name, resize=36))
    rows = order.draws(1, 0, 200, augment.NUM_DRAWS)
    found, flips = augment.training_boxes(config, 48, rows)
    for got, flip, row in zip(found, flips, rows, strict=True):
        box = augment.training_box(config, 48, 48, row)
        expected = (box.top, box.left, box.bottom - box.top, box.right - box.left)
        np.testing.assert_allclose(got, expected, atol=2e-6)
        assert flip == box.flip


@pytest.mark.parametrize("resize, size", [(36, 32), (30, 24)])
def test_a_box_that_ends_on_the_border_sees_no_black(tmp_path, resize, size):
    """White pictures, in files and packed. A border passed by a rounding error would darken the crop's last pixels."""
    for index in range(16):
        (tmp_path / "in/train/a").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (48, 48), "white").save(tmp_path / f"in/train/a/{index}.png")
    prepare(tmp_path / "in", tmp_path / "raw", size=48, workers=1)
    config = RunConfig(image_size=size, augment=AugmentConfig(name="crop-flip", resize=resize))
    white = torch.tensor([(1 - mean) / std for mean, std in zip(MEAN, STD, strict=True)])[:, None, None]
    for root in (tmp_path / "in", tmp_path / "raw"):
        for images, _ in batches(root, config):
            torch.testing.assert_close(images, white.expand_as(images), atol=1e-4, rtol=0)


def test_no_box_ends_behind_the_border_by_a_rounding_error():
    corner = np.full((1, augment.NUM_DRAWS), 1 - 2**-40)  # the last that can be drawn
    for side in range(32, 300, 8):
        for resize in range(24, side + 1):
            config = RunConfig(image_size=24, augment=AugmentConfig(name="crop-flip", resize=resize))
            (box,), _ = augment.training_boxes(config, side, corner)
            assert box[0] + box[2] == box[1] + box[3] == side
            box = augment.centre_box(side, resize=resize, size=resize)
            assert box[0] + box[2] == box[1] + box[3] == side


@pytest.mark.parametrize("size, resize", [(24, 32), (32, 32), (24, 28)])
def test_evaluation_from_raw_is_centre_crops(raw, size, resize):
    config = RunConfig(image_size=size, data=str(raw), augment=AugmentConfig(resize=resize))
    dataset = open_folder(raw, "val")
    loader = Loader(open_part(config, "val"), config, dtype=torch.float32, workers=1)
    images = torch.cat([batch.images for batch in loader.evaluation(batch=5, rank=0, world_size=1)])
    loader.close()
    for index, image in enumerate(images):
        pixels = augment.centre_crop(dataset.image(index).pixels(), resize=resize, size=size)
        out = torch.empty(1, 3, size, size).contiguous(memory_format=torch.channels_last)
        normalize(torch.from_numpy(np.array(pixels[None])), out)
        assert (image - out[0]).abs().max() <= (0 if resize == SIZE else 2.01 / 255 / 0.224)


def test_the_same_batches_at_any_number_of_ranks_and_threads(raw, shards):
    for root in (raw, shards):
        whole = batches(root, CROPS)
        for ranks in (1, 2, 4):
            for workers in (1, 8):
                parts = [batches(root, CROPS, rank=rank, ranks=ranks, workers=workers) for rank in range(ranks)]
                for step in range(3):
                    assert torch.equal(torch.cat([part[step][0] for part in parts]), whole[step][0])
                    assert torch.equal(torch.cat([part[step][1] for part in parts]), whole[step][1])


def test_a_tar_reads_as_its_folder(image_folder, tmp_path):
    """Bytes as they were: every image of the folder, in the order of the shards."""
    prepare(image_folder, tmp_path / "out", format="tar", size=0)
    tar, folder = open_folder(tmp_path / "out", "train"), Folder(image_folder / "train")
    assert isinstance(tar, Tar)
    assert tar.classes == folder.classes
    for index, sample in enumerate(order.permutation(0, 0, 48).tolist()):
        assert np.array_equal(tar.image(index).pixels(), folder.image(sample).pixels())
        assert tar.labels[index] == folder.labels[sample]


def test_anybodys_webdataset(tmp_path):
    """Names with folders, other files of a sample, labels before images, several shards, no manifest."""
    webdataset(tmp_path / "train-000.tar", [("a/x.cls", b"3\n"), ("a/x.jpg", jpeg(0)), ("a/y.json", b"{}"),
                                            ("a/y.JPEG", jpeg(1)), ("a/y.cls", b"0")])  # fmt: skip
    webdataset(tmp_path / "train-001.tar", [("z.jpg", jpeg(2)), ("z.cls", b"1")])
    webdataset(tmp_path / "val-000.tar", [("z.jpg", jpeg(3)), ("z.cls", b"5")])
    train, val = open_data(RunConfig(data=str(tmp_path), image_size=24))
    assert train.labels.tolist() == [3, 0, 1]
    assert train.classes == val.classes == tuple("012345")
    assert "train-001.tar: z.jpg" in train.name(len(train) - 1)


def test_the_index_is_made_once_and_again_when_a_shard_changes(tmp_path, monkeypatch):
    webdataset(tmp_path / "train-0.tar", [("a.jpg", jpeg(0)), ("a.cls", b"0")])
    assert len(Tar(tmp_path, "train")) == 1
    made = list(tmp_path.glob("*.npz"))
    assert len(made) == 1
    with monkeypatch.context() as patch:
        patch.setattr("knltrain.data.tar_index._make_index", lambda *_: pytest.fail("it is there"))
        assert len(Tar(tmp_path, "train")) == 1
    webdataset(tmp_path / "train-0.tar", [("a.jpg", jpeg(0)), ("a.cls", b"0"), ("b.jpg", jpeg(1)), ("b.cls", b"1")])
    assert Tar(tmp_path, "train").labels.tolist() == [0, 1]
    made[0].write_bytes(b"damaged")
    assert Tar(tmp_path, "train").labels.tolist() == [0, 1]


def samples(*labels):
    return [(f"{n}.{kind}", data) for n, label in enumerate(labels)
            for kind, data in (("jpg", jpeg(0)), ("cls", b"%d" % label))]  # fmt: skip


@pytest.mark.parametrize(
    "how", ["cp -p", "older", "same time", "mv", "new folder", "other labels, same time, in place"]
)
def test_another_shard_of_the_same_size_is_never_read_by_the_index_of_the_first(tmp_path, how):
    """Put back with its time, as tar -x, rsync -a and cp -p do; renamed; or written over, and given the old time."""
    old, now = tmp_path / "old.tar", tmp_path / "data" / "train-0.tar"
    webdataset(old, samples(2, 0, 1))
    webdataset(now, samples(0, 1, 2))
    os.utime(old, ns=(10**18, 10**18))
    assert Tar(tmp_path / "data", "train").labels.tolist() == [0, 1, 2]
    before = now.stat()
    assert old.stat().st_size == before.st_size
    if how == "new folder":
        shutil.copytree(tmp_path / "data", tmp_path / "copy")
        shutil.copy2(old, tmp_path / "copy" / now.name)
        now = tmp_path / "copy" / now.name
    elif how == "mv":
        os.rename(old, now)
    elif how == "cp -p":
        shutil.copy2(old, now)
    else:
        with open(now, "r+b") as file:
            file.write(old.read_bytes())
        os.utime(now, ns=(10**18, 10**18) if how == "older" else (before.st_atime_ns, before.st_mtime_ns))
    assert Tar(now.parent, "train").labels.tolist() == [2, 0, 1]


def test_where_nothing_states_the_last_change_a_sample_is_compared(tmp_path, monkeypatch):
    """As on a file system whose ctime is its mtime; the sample is an image in the middle, and its label."""
    path = tmp_path / "train-0.tar"
    webdataset(path, samples(0, 1, 2))
    monkeypatch.setattr(
        "knltrain.data.tar_index._stamps", lambda shards: np.array([(s.stat().st_size, 7, 7) for s in shards])
    )
    assert Tar(tmp_path, "train").labels.tolist() == [0, 1, 2]
    webdataset(path, samples(2, 0, 1))
    assert Tar(tmp_path, "train").labels.tolist() == [2, 0, 1]


def test_a_shard_that_may_not_be_read_is_no_damaged_one(tmp_path, monkeypatch):
    """With an index of it, and without."""
    webdataset(tmp_path / "train-0.tar", samples(0, 1))
    real = tar_index.open_regular

    def denied(path, *arguments, **options):
        if str(path).endswith(".tar"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *arguments, **options)

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(tar_index, "open_regular", denied)
            with pytest.raises(DataError, match=r"train-0\.tar: Permission denied; see that it can be read$"):
                Tar(tmp_path, "train")
        assert len(Tar(tmp_path, "train")) == 2


def test_an_index_that_may_not_be_read_is_made_again(tmp_path, monkeypatch):
    webdataset(tmp_path / "train-0.tar", samples(0, 1))
    Tar(tmp_path, "train")
    real = tar_index.open_regular

    def denied(path, *arguments, **options):
        if str(path).endswith(".npz"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(tar_index, "open_regular", denied)
    assert Tar(tmp_path, "train").labels.tolist() == [0, 1]


@pytest.mark.parametrize("files, labels", [
    ([("a.JPG", 0), ("a.CLS", b"3")], [3]), ([("a.jpeg", 0), ("a.cls.txt", b"4\n")], [4]),
    ([("a.jpg", 0), ("a.json", b'{"label": 5, "filename": "x"}')], [5]),
    ([("a.json", b'{"cls": 6}'), ("a.png", 0)], [6]),
    ([("a.jpg", 0), ("a.json", b'{"label": 5}'), ("a.cls", b"1")], [1]),
    ([("._a.jpg", b"mac"), ("a.jpg", 0), ("._a.cls", b"mac"), ("a.cls", b"2"), ("__MACOSX/._a.jpg", b"mac")], [2]),
    ([("./train/a.jpg", 0), ("./train/a.cls", b"7")], [7]),
])  # fmt: skip
def test_names_and_labels_that_people_have(tmp_path, files, labels):
    webdataset(tmp_path / "train-0.tar", [(name, data or jpeg(0)) for name, data in files])
    tar = Tar(tmp_path, "train")
    assert tar.labels.tolist() == labels
    tar.check(1)


def test_what_of_tar_files_is_left_out_is_said_whenever_they_are_opened(tmp_path):
    webdataset(
        tmp_path / "train-0.tar", [*samples(0), ("x.avif", b"x"), ("x.cls", b"0"), ("y.cls", b"0"), ("z.txt", b"")]
    )
    webdataset(tmp_path / "train-1.tar", [("1.jpg", jpeg(0)), ("1.cls", b"2"), ("._1.jpg", b"")])
    for _ in range(2):
        tar = Tar(tmp_path, "train")
        assert tar.labels.tolist() == [0, 2]
        assert [remark.partition(": ")[2] for remark in tar.remarks] == [
            "ignored files and folders, which are hidden or left behind by programs: 1, of these ._* (1)",
            "images left out, whose format is not read: 1 .avif; convert them to JPEG or PNG",
            "samples left out, which have a label and no image: 1",
            "classes without a training image: 1 of 3 ('1'); labels count from 0",
        ]


def test_the_index_may_be_read_by_whom_the_shards_may(tmp_path):
    """Whoever trains first on a shared folder makes it for all."""
    webdataset(tmp_path / "train-0.tar", [("a.jpg", jpeg(0)), ("a.cls", b"0")])
    before = os.umask(0o027)
    try:
        Tar(tmp_path, "train")
    finally:
        os.umask(before)
    (index,) = set(tmp_path.iterdir()) - {tmp_path / "train-0.tar"}
    assert index.stat().st_mode & 0o777 == 0o640


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_the_index_of_a_read_only_folder_is_in_the_cache(tmp_path, own_cache):
    webdataset(tmp_path / "in/train-0.tar", [("a.jpg", jpeg(0)), ("a.cls", b"0")])
    (tmp_path / "in").chmod(0o500)
    assert len(Tar(tmp_path / "in", "train")) == 1
    assert list(own_cache.glob("tar-*.npz"))


def test_an_index_that_the_disk_does_not_take_is_in_the_cache(tmp_path, own_cache, monkeypatch):
    webdataset(tmp_path / "train-0.tar", [("a.jpg", jpeg(0)), ("a.cls", b"0")])
    before, save = set(own_cache.glob("tar-*")), np.savez

    def full(file, **arrays):
        if Path(file.name).parent == tmp_path:
            file.write(b"half of")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(file, **arrays)

    monkeypatch.setattr(np, "savez", full)
    assert len(Tar(tmp_path, "train")) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["train-0.tar"]
    (index,) = set(own_cache.glob("tar-*")) - before
    assert index.name.endswith(".npz")


@pytest.mark.parametrize("files, message", [
    ([("a.jpg", b"x")], r"a\.jpg has no \.cls beside it, .* but nothing; a tar file of class folders is to be"),
    ([("a.jpg", b"x"), ("a.txt", b"1"), ("a.json", b'{"caption": "x"}')], r"a\.jpg has no \.cls .* but \.json, \.txt"),
    ([("a.jpg", b"x"), ("a.json", b'{"label": true}')], r"a\.jpg has no \.cls"),
    ([("a.jpg", b"x"), ("a.json", b'{"label": -1}')], r"a\.jpg has no \.cls"),
    ([("a.jpg", b"x"), ("a.json", b"{")], r"a\.jpg has no \.cls"),
    ([("a.jpg", b"x"), ("a.cls", b"dog")], "no class number"),
    ([("a.cls", b"1")], "no images"),
    ([("a.jpg", b"x"), ("a.cls", b"1"), ("a.png", b"y")], r"train-0\.tar: a\.jpg and a\.png are two images of one"),
    ([("a.jpg", b"x"), ("a.jpg", b"y"), ("a.cls", b"1")], r"a\.jpg and a\.jpg are two"),
])  # fmt: skip
def test_tars_that_are_no_data(tmp_path, files, message):
    webdataset(tmp_path / "train-0.tar", files)
    with pytest.raises(DataError, match=message):
        Tar(tmp_path, "train")


@pytest.mark.parametrize("file", ["train/labels.npy", "train/images-00000.npy", "train-00000.tar"])
def test_a_file_of_another_preparation_is_found_at_start_up(image_folder, tmp_path, raw, shards, file):
    """The same images in another order of classes: every file has the same size, and is put in place with its time."""
    root = shards if file.endswith(".tar") else raw
    copy, other = tmp_path / "copy", tmp_path / "other"
    shutil.copytree(root, copy)
    (tmp_path / "order").write_text("class2\nclass0\nclass1\n")
    choice = read_choice(str(tmp_path / "order"), "")
    prepare(image_folder, other, format="tar" if root is shards else "raw", choice=choice)
    if file.endswith("labels.npy"):  # each class has as many images, and labels are the same again
        np.save(other / file, np.load(other / file)[::-1])
    assert (copy / file).read_bytes() != (other / file).read_bytes()
    assert (copy / file).stat().st_size == (other / file).stat().st_size
    shutil.copy2(other / file, copy / file)
    with pytest.raises(DataError, match=rf"{file}: (does not match its checksum|not the file that meta\.json lists)"):
        open_folder(copy, "train")


def test_a_file_of_a_prepared_folder_that_may_not_be_read(raw, tmp_path, monkeypatch):
    for module, file in ((manifest_module, "images-00000.npy"), (packed_module, "labels.npy")):
        real = module.open_regular

        def denied(path, *arguments, file=file, real=real, **options):
            if str(path).endswith(file):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return real(path, *arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(module, "open_regular", denied)
            with pytest.raises(DataError, match=rf"{file}: Permission denied; see that it can be read$"):
                open_folder(raw, "train")


def copied(root, tmp_path):
    shutil.copytree(root, tmp_path / "copy")
    return tmp_path / "copy"


def test_a_shard_cut_short_is_found_at_start_up(raw, shards, tmp_path):
    for root, name in ((raw, "train/images-00000.npy"), (shards, "train-00000.tar")):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        path = copied(root, tmp_path) / name
        os.truncate(path, path.stat().st_size - 1000)
        with pytest.raises(DataError, match=f"{path.name}.*bytes where meta.json says.*again"):
            open_folder(tmp_path / "copy", "train")
        path.unlink()
        with pytest.raises(DataError, match=f"{path.name}.*No such file.*again"):
            open_folder(tmp_path / "copy", "train")


def packed(root, *counts):
    """Writes a raw folder with as many images in each shard; the pixels of an image are its number."""
    (root / "train").mkdir()
    shards, total = [], sum(counts)
    for number, count in enumerate(counts):
        path, first = root / f"train/images-{number:05}.npy", sum(counts[:number])
        images = np.arange(first, first + count, dtype=np.uint8)[:, None, None, None]
        np.save(path, np.ascontiguousarray(np.broadcast_to(images, (count, 4, 4, 3))))
        shards.append(Shard(f"train/{path.name}", count, path.stat().st_size, ""))
    np.save(root / "train/labels.npy", np.zeros(total, np.int64))
    manifest = Manifest(format="raw", size=4, classes=["a"], counts={"train": total}, shards={"train": shards})
    (root / NAME).write_bytes(encode_manifest(manifest))
    return root


def test_images_of_every_shard_are_where_their_addresses_say(tmp_path):
    dataset = open_folder(packed(tmp_path, 2, 3, 1), "train")
    images = [dataset.image(index).pixels() for index in range(6)]
    assert [image.min() for image in images] == [image.max() for image in images] == list(range(6))
    mixed = np.array([4, 0, 5, 2, 1, 3])
    assert dataset.addresses(mixed).tolist() == [images[index].ctypes.data for index in mixed]


def test_a_shard_that_is_too_long_is_found_at_start_up(tmp_path):
    """It is another file than was written, whatever its beginning looks like."""
    packed(tmp_path, 2, 3)
    assert len(open_folder(tmp_path, "train")) == 5
    with open(tmp_path / "train/images-00001.npy", "ab") as shard:
        shard.write(bytes(48))
    with pytest.raises(DataError, match=r"images-00001\.npy: 320 bytes where meta\.json says 272"):
        open_folder(tmp_path, "train")


def test_a_foreign_tar_cut_short(tmp_path):
    webdataset(
        tmp_path / "train-0.tar", [("a.jpg", jpeg(0, 400)), ("a.cls", b"0"), ("b.jpg", jpeg(1, 400)), ("b.cls", b"1")]
    )
    size = (tmp_path / "train-0.tar").stat().st_size
    os.truncate(tmp_path / "train-0.tar", size // 3)
    with pytest.raises(DataError, match=r"cut short|damaged"):
        Tar(tmp_path, "train")


def test_a_shard_that_shrinks_while_it_is_read(tmp_path):
    files = [(f"{i}.{s}", d) for i in range(8) for s, d in (("jpg", jpeg(i)), ("cls", b"0"))]
    webdataset(tmp_path / "train-0.tar", files)
    tar = Tar(tmp_path, "train")
    os.truncate(tmp_path / "train-0.tar", tar.where(5)[1] + 10)
    loader = Loader(tar, CROPS, dtype=torch.float32, workers=2)
    with pytest.raises(DataError, match=r"train-0\.tar: .*: the shard is cut short.*--on-bad skip"):
        list(loader.training(RankBatch(8, 8, 0, 1), 0, 1))
    loader.close()


def told_by(loader):
    """The numbers that a rank tells the others of what it skipped."""
    told = []
    loader.skipped(lambda *values: told.append(values) or [1.0] * len(values))
    return told


def test_skipped_images_are_the_next_good_ones_at_any_rank_layout(tmp_path):
    files = [(f"{i}.{s}", d) for i in range(12) for s, d in (("jpg", jpeg(i)), ("cls", str(i).encode()))]
    for bad in (3, 4, 11):
        files[2 * bad] = (f"{bad}.jpg", b"\xff\xd8 damaged")
    webdataset(tmp_path / "train-0.tar", files)
    config = RunConfig(data=str(tmp_path), image_size=24, on_bad="skip", augment=AugmentConfig(name="crop-flip"))
    seen = []
    for ranks in (1, 2, 4):
        parts, said = [], []
        for rank in range(ranks):
            loader = Loader(open_part(config, "train"), config, dtype=torch.float32, workers=2)
            parts += list(loader.training(RankBatch(12, 12 // ranks, rank, ranks), 0, 1))
            said.append(told_by(loader))
            loader.close()
        numbers, which = ([sum(column) for column in zip(*values, strict=True)] for values in zip(*said, strict=True))
        assert numbers == [3 if ranks == 1 else 4], "two ranks met one of them"
        assert loader.skipped(Mock(side_effect=[numbers, which])) == 3
        seen.append((torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts])))
    for images, labels in seen[1:]:
        assert torch.equal(images, seen[0][0])
        assert torch.equal(labels, seen[0][1])
    samples = order.samples(0, 12, 0, 12)
    assert seen[0][1].tolist() == [{3: 5, 4: 5, 11: 0}.get(s, s) for s in samples.tolist()]


def test_all_bad_is_an_error_even_where_bad_ones_are_skipped(tmp_path):
    webdataset(tmp_path / "train-0.tar", [("a.jpg", b"x"), ("a.cls", b"0"), ("b.jpg", b"y"), ("b.cls", b"0")])
    config = RunConfig(data=str(tmp_path), image_size=24, on_bad="skip")
    loader = Loader(Tar(tmp_path, "train"), config, dtype=torch.float32, workers=1)
    with pytest.raises(DataError, match="no image"):
        list(loader.training(RankBatch(2, 2, 0, 1), 0, 1))
    loader.close()


@pytest.mark.parametrize("spare", [2, 3, 4])
def test_more_shards_than_files_may_be_open(tmp_path, spare):
    for number in range(8):
        webdataset(tmp_path / f"train-{number}.tar", [("a.jpg", jpeg(number)), ("a.cls", b"0")])
    tar = Tar(tmp_path, "train")
    expected = [tar.image(index).pixels() for index in range(8)]
    tar.close()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [os.open("/dev/null", os.O_RDONLY) for _ in range(spare)]  # the numbers that are left
    for number in free:
        os.close(number)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(free) + 1, hard))
        got = [tar.image(index).pixels() for index in (*range(8), 0)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    tar.close()
    assert all(np.array_equal(one, other) for one, other in zip(got, [*expected, expected[0]], strict=True))


@pytest.mark.parametrize("fixture", ["raw", "shards"])
def test_files_are_closed(fixture, request):
    root = request.getfixturevalue(fixture)

    def open_now():
        maps = Path("/proc/self/maps").read_text().count(str(root))
        return maps + sum(str(root) in os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                          if os.path.exists(f"/proc/self/fd/{fd}"))  # fmt: skip

    before = open_now()
    loader = Loader(open_part(config_for(CROPS, root), "train"), CROPS, dtype=torch.float32, workers=2)
    next(iter(loader.training(RankBatch(16, 16, 0, 1), 0, 2)))
    assert open_now() > before
    loader.close()
    del loader
    assert open_now() == before


@pytest.mark.parametrize("fixture", ["raw", "shards"])
def test_memory_stays_flat_over_epochs(fixture, request):
    """Memory of the process's own: pages of mapped files are the system's, to take back when it likes."""
    root = request.getfixturevalue(fixture)
    script = (
        "import sys, torch\nfrom knltrain.config import RunConfig, AugmentConfig\n"
        "from knltrain.data.datasets import open_part\nfrom knltrain.data.loader import Loader, RankBatch\n"
        "from knltrain.node.memory import keep_freed_memory\n"
        "def anonymous():\n"
        "    line = next(line for line in open('/proc/self/status') if line.startswith('RssAnon'))\n"
        "    return int(line.split()[1]) / 1024\n"
        "keep_freed_memory()\n"
        "config = RunConfig(data=sys.argv[1], image_size=24, augment=AugmentConfig(resize=32))\n"
        "loader = Loader(open_part(config, 'train'), config, dtype=torch.float32, workers=2)\n"
        "seen = []\n"
        "for step, _ in enumerate(loader.training(RankBatch(48, 48, 0, 1), 0, 150)):\n"
        "    if step % 50 == 49: seen.append(anonymous())\n"
        "print(*seen)\n"
    )
    run = subprocess.run([sys.executable, "-c", script, str(root)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    first, _, last = map(float, run.stdout.split())
    assert last - first < 4, run.stdout


def test_images_smaller_than_the_network_needs(raw):
    with pytest.raises(ConfigError, match=r"32 pixels, smaller than image-size 64.*--size"):
        open_part(RunConfig(data=str(raw), image_size=64), "train")


def test_somebody_elses_meta_json_means_nothing(image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "copy")
    for text in ('{"author": "me"}', "[]", "{}"):
        (tmp_path / "copy" / NAME).write_text(text)
        assert isinstance(open_folder(tmp_path / "copy", "train"), Folder)


def test_packed_refuses_what_does_not_fit(raw, tmp_path):
    copy = copied(raw, tmp_path)
    np.save(copy / "train/labels.npy", np.zeros(47, np.int64))
    with pytest.raises(DataError, match="does not match"):
        open_folder(copy, "train")
    meta = json.loads((copy / NAME).read_text())
    for damaged in ('{"format": "raw", "shards": {}}', json.dumps(meta)[:-20], ""):
        (copy / NAME).write_text(damaged)
        with pytest.raises(DataError, match=r"meta\.json"):
            open_folder(copy, "train")
    meta["size"] = 31
    (copy / NAME).write_text(json.dumps(meta))
    with pytest.raises(DataError, match="not images of 31 pixels"):
        open_folder(copy, "train")
    assert isinstance(open_folder(raw, "train"), Packed)
