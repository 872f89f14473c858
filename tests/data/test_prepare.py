"""knltrain prepare."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import write_jpeg
from disk import record
from PIL import Image
from prepared import SIZE, jpeg, prepare, webdataset

from knltrain.data import augment, order
from knltrain.data import prepare as preparing
from knltrain.data.datasets import open_folder
from knltrain.data.decode import EncodedImage
from knltrain.data.folder import DataError, Folder
from knltrain.data.journal import Journal
from knltrain.data.manifest import JOURNAL, NAME
from knltrain.data.tar import Tar
from knltrain.errors import ConfigError, KnltrainError
from knltrain.runlog.console import Console


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def small_shards(monkeypatch):
    """Seven images in a raw shard, and chunks of three."""
    monkeypatch.setattr(preparing, "_SHARD_BYTES", 7 * SIZE * SIZE * 3)
    monkeypatch.setattr(preparing, "_CHUNK_IMAGES", 3)


def reference_square(data, size):
    image = EncodedImage(data).pixels()
    return augment.centre_crop(image, resize=size, size=size)


def test_raw_is_what_the_contract_says(image_folder, raw):
    """Any program with NumPy reads it: pixels, labels, and a manifest."""
    images, labels = np.load(raw / "train/images-00000.npy"), np.load(raw / "train/labels.npy")
    source = Folder(image_folder / "train")
    assert images.shape == (48, SIZE, SIZE, 3)
    places = order.permutation(0, 0, 48)
    for place, sample in enumerate(places):
        path, *_ = source.where(sample)
        with open(path, "rb") as file:
            assert np.array_equal(images[place], reference_square(file.read(), SIZE))
        assert labels[place] == source.labels[sample]
    meta = json.loads((raw / NAME).read_text())
    assert meta["classes"] == list(source.classes)
    assert meta["counts"] == {"train": 48, "val": 13}
    assert meta["size"] == SIZE
    assert set(meta["shards"]["train"][0]) == {"file", "images", "bytes", "sha256", "sample"}


def test_tar_is_webdatasets(image_folder, shards):
    source, places = Folder(image_folder / "train"), order.permutation(0, 0, 48)
    with tarfile.open(shards / "train-00000.tar") as tar:
        names = tar.getnames()
        assert [name.rpartition(".")[2] for name in names[:2]] == ["jpg", "cls"]
        assert len({name.partition(".")[0] for name in names}) == 48
        for place, sample in enumerate(places):
            image, label = (tar.extractfile(name).read() for name in names[2 * place : 2 * place + 2])
            assert int(label) == source.labels[sample]
            assert min(Image.open(io.BytesIO(image)).size) == SIZE


def test_size_0_keeps_the_bytes(image_folder, tmp_path):
    prepare(image_folder, tmp_path / "out", format="tar", size=0)
    tar, source = Tar(tmp_path / "out", "val"), Folder(image_folder / "val")
    for place, sample in enumerate(order.permutation(0, 0, 13).tolist()):
        path, offset, size = tar.where(place)
        with open(path, "rb") as file, open(source.where(sample)[0], "rb") as original:
            file.seek(offset)
            assert file.read(size) == original.read()
    with pytest.raises(ConfigError, match="--size 0"):
        prepare(image_folder, tmp_path / "other", size=0)


@pytest.mark.parametrize("format", ["raw", "tar"])
def test_the_same_bytes_with_any_number_of_workers(image_folder, tmp_path, small_shards, format):
    prepare(image_folder, tmp_path / "one", format=format, workers=1)
    prepare(image_folder, tmp_path / "three", format=format, workers=3)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_small_shards_read_as_one(image_folder, raw, tmp_path, small_shards):
    prepare(image_folder, tmp_path / "out")
    many, one = open_folder(tmp_path / "out", "train"), open_folder(raw, "train")
    assert len(list((tmp_path / "out/train").glob("images-*.npy"))) == 7
    assert np.array_equal(many.labels, one.labels)
    for index in range(48):
        assert np.array_equal(many.image(index).pixels(), one.image(index).pixels())
    assert "images-00001.npy: image 2" in many.name(9)


@pytest.mark.parametrize("format", ["raw", "tar"])
def test_goes_on_where_it_was_interrupted(image_folder, tmp_path, small_shards, format, monkeypatch):
    if format == "tar":
        monkeypatch.setattr(preparing, "_images_per_shard", lambda *_: 7)
    prepare(image_folder, tmp_path / "whole", format=format)
    for shards_done in (0, 1, 4, 8):
        out = tmp_path / f"out{shards_done}"
        add = preparing.Journal.add

        def interrupt(self, file, record, left=[shards_done], add=add):  # noqa: B006
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            add(self, file, record)

        with monkeypatch.context() as patch:
            patch.setattr(preparing.Journal, "add", interrupt)
            with pytest.raises(KeyboardInterrupt):
                prepare(image_folder, out, format=format)
        with pytest.raises(DataError, match="has not finished"):
            open_folder(out, "train")
        with open(out / JOURNAL, "a") as journal:
            journal.write('{"file": "tr')  # as a machine that went down leaves it
        prepare(image_folder, out, format=format)
        assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("format", ["raw", "tar"])
def test_what_has_its_name_is_on_disk(image_folder, tmp_path, small_shards, format, monkeypatch):
    """A power cut at any moment leaves no file cut short, no shard noted too early, and no manifest before all."""
    monkeypatch.setattr(preparing, "_pool", ThreadPoolExecutor)  # processes would not be seen
    monkeypatch.setattr(preparing, "_images_per_shard", lambda *_: 7)
    told = record(monkeypatch)
    prepare(image_folder, tmp_path / "out", format=format, workers=1)
    monkeypatch.undo()
    files = contents(tmp_path / "out")
    named = {path.relative_to(tmp_path / "out").as_posix(): place
             for place, (kind, path, _) in enumerate(told) if kind == "name"}  # fmt: skip
    assert named.keys() == {*files, JOURNAL}
    for name, content in files.items():
        assert any(kind == "sync" and holds == content for kind, _, holds in told[: named[name]]), name
    noted = [(place, holds) for place, (kind, path, holds) in enumerate(told)
             if (kind, path.name) == ("sync", JOURNAL)]  # fmt: skip
    shards = [name for name in files if name.endswith((".npy", ".tar")) and "labels" not in name]
    assert len(noted) == len(shards) == 9
    for name in shards:
        assert named[name] < min(place for place, holds in noted if f'"{name}"'.encode() in holds)
    assert [(kind, path.name) for kind, path, _ in told[-3:]] == [
        ("name", NAME), ("sync", "out"), ("delete", JOURNAL)]  # fmt: skip


def test_a_shard_that_is_gone_is_made_again(tmp_path):
    entry = {"images": 1, "bytes": 4, "sha256": "", "rejected": []}
    with Journal(tmp_path) as journal:
        assert journal.begin({"size": SIZE}, lambda: 7) == 7
        for name in ("kept.npy", "gone.npy"):
            journal.add(name, entry)
    (tmp_path / "kept.npy").write_bytes(b"kept")
    with Journal(tmp_path) as journal:
        assert journal.begin({"size": SIZE}, pytest.fail) == 7
        assert journal.records == {"kept.npy": {"file": "kept.npy", **entry}}


def runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_killed_and_started_again(image_folder, tmp_path):
    """The command itself, ended by SIGKILL at some moment."""
    src = tmp_path / "src"
    for copy in range(12):
        shutil.copytree(image_folder / "train", src / "train", dirs_exist_ok=True,
                        copy_function=lambda a, b, copy=copy: shutil.copy(a, f"{b[:-4]}-{copy}.jpg"))  # fmt: skip
    script = (
        "import sys\nfrom pathlib import Path\nfrom knltrain.data import prepare as p\n"
        "from knltrain.runlog.console import Console\n"
        "if __name__ == '__main__':\n"
        f"    p._SHARD_BYTES = 40 * {SIZE} * {SIZE} * 3\n"
        f"    p.prepare(Path({str(src)!r}), Path(sys.argv[1]), Console(), format='raw', size={SIZE}, workers=1,"
        " on_bad='fail')\n"
    )
    (tmp_path / "run.py").write_text(script)
    command = [sys.executable, str(tmp_path / "run.py")]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, timeout=120)
    process = subprocess.Popen([*command, str(tmp_path / "out")])
    while not list(tmp_path.glob("out/train/*.npy")):
        assert process.poll() is None
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert children
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(runs(child) for child in children):
        assert time.monotonic() < deadline, "workers outlive the command"
        time.sleep(0.05)
    subprocess.run([*command, str(tmp_path / "out")], check=True, timeout=120)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.fixture
def spoilt(image_folder, tmp_path):
    """A copy with a text among its images, one cut short, and an empty one."""
    src = tmp_path / "src"
    shutil.copytree(image_folder, src)
    (src / "train/class0/003.jpg").write_bytes(b"no image")
    cut = src / "train/class2/007.jpg"
    cut.write_bytes(cut.read_bytes()[:400])
    (src / "val/class1/002.jpg").write_bytes(b"")
    return src


@pytest.mark.parametrize("format", ["raw", "tar"])
def test_an_image_that_cannot_be_read_now_is_not_skipped(image_folder, tmp_path, small_shards, format):
    """A storage that fails for an hour must not cost a data set its images."""
    src, away = tmp_path / "src", tmp_path / "away.jpg"
    shutil.copytree(image_folder, src)
    image = src / "train/class1/004.jpg"
    image.rename(away)
    image.symlink_to(away.with_name("not mounted"))
    for on_bad in ("fail", "skip"):
        with pytest.raises(KnltrainError, match=r"class1/004\.jpg: No such file.*run the same command again to resume"):
            prepare(src, tmp_path / "out", format=format, on_bad=on_bad)
    image.unlink()
    away.rename(image)
    assert prepare(src, tmp_path / "out", format=format, on_bad="skip")["rejected"] == 0
    prepare(image_folder, tmp_path / "expected", format=format)
    same = contents(tmp_path / "expected")
    assert contents(tmp_path / "out").keys() == same.keys()
    shards = [name for name in same if name.endswith((".npy", ".tar"))]
    assert shards
    assert all((tmp_path / "out" / name).read_bytes() == same[name] for name in shards)


@pytest.mark.parametrize("format", ["raw", "tar"])
def test_bad_images_are_listed_and_skipped(spoilt, image_folder, tmp_path, small_shards, format):
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"3 of 61 images.*--on-bad skip"):
        prepare(spoilt, out, format=format)
    lines = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert {os.path.relpath(line["path"], spoilt) for line in lines} == {
        "train/class0/003.jpg", "train/class2/007.jpg", "val/class1/002.jpg"
    }  # fmt: skip
    assert all(line["reason"] for line in lines)
    with pytest.raises(DataError, match="has not finished"):
        open_folder(out, "train")
    result = prepare(spoilt, out, format=format, on_bad="skip")
    assert (result["counts"], result["rejected"]) == ({"train": 46, "val": 12}, 3)
    preparing.verify(out, Console())
    train = open_folder(out, "train")
    source = Folder(spoilt / "train")
    kept = [
        s
        for s in order.permutation(0, 0, 48).tolist()
        if "0/003" not in source.name(s) and "2/007" not in source.name(s)
    ]
    assert train.labels.tolist() == source.labels[kept].tolist()
    for index, sample in enumerate(kept):
        expected = source.image(sample).pixels()
        if format == "raw":
            assert np.array_equal(train.image(index).pixels(), augment.centre_crop(expected, resize=SIZE, size=SIZE))
        else:
            assert train.image(index).pixels().shape[:2] == augment.short_side(*expected.shape[:2], SIZE)


def test_replaced_images_are_taken(spoilt, image_folder, tmp_path, small_shards):
    with pytest.raises(DataError):
        prepare(spoilt, tmp_path / "out")
    for name in ("train/class0/003.jpg", "train/class2/007.jpg", "val/class1/002.jpg"):
        shutil.copy(image_folder / name, spoilt / name)
    prepare(spoilt, tmp_path / "out")
    prepare(image_folder, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("fixture, file", [("raw", "train/images-00000.npy"), ("raw", "val/labels.npy"),
                                           ("shards", "val-00000.tar")])  # fmt: skip
def test_verify_finds_a_flipped_bit(fixture, file, tmp_path, request):
    out = tmp_path / "copy"
    shutil.copytree(request.getfixturevalue(fixture), out)
    preparing.verify(out, Console())
    data = bytearray((out / file).read_bytes())
    data[len(data) // 2] ^= 1
    (out / file).write_bytes(data)
    with pytest.raises(DataError, match=file):
        preparing.verify(out, Console())


def test_what_is_whole_is_left_alone(image_folder, raw, tmp_path):
    before = contents(raw)
    prepare(image_folder, raw)
    assert contents(raw) == before
    with pytest.raises(ConfigError, match="format raw of size 32"):
        prepare(image_folder, raw, size=24)
    with pytest.raises(ConfigError, match="format raw"):
        prepare(image_folder, raw, format="tar")
    write_jpeg(tmp_path / "other/train/x/a.jpg", 40, 40, 0)
    with pytest.raises(ConfigError, match="other images"):
        prepare(tmp_path / "other", raw)


@pytest.fixture
def source(image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "src")
    return tmp_path / "src"


def replace_image(path, *, seed, mtime_ns=None):
    """Another picture by the same name, and perhaps with the time of the first, as cp -p does."""
    write_jpeg(path, 60, 50, seed)
    if mtime_ns is not None:
        os.utime(path, ns=(mtime_ns, mtime_ns))


def test_what_was_made_of_images_that_have_changed_since_is_said(source, tmp_path, capsys):
    prepare(source, tmp_path / "out")
    capsys.readouterr()
    prepare(source, tmp_path / "out")
    assert "after" not in capsys.readouterr().out
    image = source / "train/class1/004.jpg"
    replace_image(image, seed=99, mtime_ns=10**18)
    prepare(source, tmp_path / "out")
    said = capsys.readouterr().out.replace("\n", " ")
    assert f"{image} was put there, renamed or given other rights after {tmp_path / 'out'} was made (1 in all)" in said
    replace_image(image, seed=98)
    with pytest.raises(
        ConfigError, match=r"004\.jpg was written after .* was made \(1 in all\); give another folder, or delete"
    ):
        prepare(source, tmp_path / "out")


def test_images_with_times_in_the_future_have_not_changed(source, tmp_path, capsys):
    os.utime(source / "train/class1/004.jpg", ns=(4 * 10**18, 4 * 10**18))
    prepare(source, tmp_path / "out")
    capsys.readouterr()
    prepare(source, tmp_path / "out")
    assert "after" not in capsys.readouterr().out


@pytest.mark.parametrize("mtime_ns", [None, 10**18])
def test_shards_of_images_that_have_changed_since_are_made_again(
    source, tmp_path, small_shards, monkeypatch, mtime_ns, capsys
):
    add, left = preparing.Journal.add, [5]

    def interrupt(self, file, record):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        add(self, file, record)

    with monkeypatch.context() as patch:
        patch.setattr(preparing.Journal, "add", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(source, tmp_path / "out")
    first = int(order.permutation(0, 0, 48)[0])
    replace_image(Path(Folder(source / "train").name(first)), seed=99, mtime_ns=mtime_ns)
    capsys.readouterr()
    prepare(source, tmp_path / "out")
    assert "shards that are made again, because images of them have changed: 1" in capsys.readouterr().out
    prepare(source, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_folders_that_cannot_be(image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "src")
    for dst in (tmp_path / "src", tmp_path / "src/out", tmp_path):
        with pytest.raises(ConfigError, match="within the other"):
            prepare(tmp_path / "src", dst)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        prepare(image_folder, tmp_path / "full")
    with pytest.raises(ConfigError, match="no such folder"):
        prepare(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="nothing to prepare"):
        prepare(tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pixels_are_not_prepared_again(raw, tmp_path):
    with pytest.raises(ConfigError, match="images of 32 pixels already"):
        prepare(raw, tmp_path / "out")


def test_a_folder_begun_from_other_images_is_refused(image_folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(preparing.Journal, "add", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(image_folder, tmp_path / "out")
    shutil.copytree(image_folder, tmp_path / "src")
    (tmp_path / "src/train/class0/000.jpg").unlink()
    with pytest.raises(ConfigError, match="another source"):
        prepare(tmp_path / "src", tmp_path / "out")
    with pytest.raises(ConfigError, match="another size"):
        prepare(image_folder, tmp_path / "out", size=SIZE + 1)


def test_a_disk_that_is_too_small_is_known_before(image_folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(preparing.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(KnltrainError, match=r"0\.2 GB|0\.0 GB are free"):
        prepare(image_folder, tmp_path / "out")


def test_a_disk_that_fills_up_is_one_line_and_the_same_command_goes_on(image_folder, tmp_path, small_shards, raw):
    reserve, left = os.posix_fallocate, [3]

    def full(*arguments):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing.os, "posix_fallocate", full)
        with pytest.raises(KnltrainError, match=r"No space left on device; run the same command again"):
            prepare(image_folder, tmp_path / "out")
    with pytest.raises(DataError, match="has not finished"):
        open_folder(tmp_path / "out", "train")
    prepare(image_folder, tmp_path / "out")
    assert len(open_folder(tmp_path / "out", "train")) == 48


def test_from_webdataset_and_from_imagenets_archives(image_folder, tmp_path, raw):
    """The same images from three kinds of source."""
    names = {"class0": "n00000001", "class1": "n00000002", "class2": "n00000003"}
    src = tmp_path / "archives"
    src.mkdir()
    with tarfile.open(src / "ILSVRC2012_img_train.tar", "w") as outer:
        for name, wnid in names.items():
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for path in sorted((image_folder / "train" / name).iterdir()):
                    tar.add(path, f"{wnid}_{path.stem}.JPEG")
            info = tarfile.TarInfo(f"{wnid}.tar")
            info.size = len(inner.getvalue())
            inner.seek(0)
            outer.addfile(info, inner)
    listed = ["ImageId,PredictionString"]
    with tarfile.open(src / "ILSVRC2012_img_val.tar", "w") as tar:
        number = 0
        for name, wnid in names.items():
            for path in sorted((image_folder / "val" / name).iterdir()):
                number += 1
                tar.add(path, f"ILSVRC2012_val_{number:08}.JPEG")
                listed.append(f"ILSVRC2012_val_{number:08},{wnid} 1 2 3 4 ")
    with pytest.raises(DataError, match=r"LOC_val_solution\.csv"):
        prepare(src, tmp_path / "out")
    (src / "LOC_train_solution.csv").write_text("ImageId,PredictionString\nn00000007_1,n00000007 1 2 3 4 \n")
    (src / "LOC_val_solution.csv").write_text("\n".join(listed))
    prepare(src, tmp_path / "out")
    prepare(image_folder, tmp_path / "web", format="tar", size=0)
    for part in ("train", "val"):
        expected = open_folder(raw, part)
        assert open_folder(tmp_path / "out", part).classes == tuple(names.values())
        for other in (open_folder(tmp_path / "out", part),):
            assert np.array_equal(other.labels, expected.labels)
            assert all(np.array_equal(other.image(i).pixels(), expected.image(i).pixels()) for i in range(len(other)))
    prepare(tmp_path / "web", tmp_path / "again")
    again, folder = open_folder(tmp_path / "again", "train"), open_folder(raw, "train")
    assert again.classes == folder.classes
    twice = order.permutation(0, 0, 48)
    assert all(np.array_equal(again.image(i).pixels(), folder.image(int(twice[i])).pixels()) for i in range(48))
    listed[3] = listed[3].replace(listed[3].split(",")[1][:9], "n99999999")
    (src / "LOC_val_solution.csv").write_text("\n".join(listed))
    with pytest.raises(DataError, match="'n99999999' is in val and not in train"):
        prepare(src, tmp_path / "other")


@pytest.mark.parametrize("number, codes", [(signal.SIGINT, {130}), (signal.SIGTERM, {143, -signal.SIGTERM})])
def test_a_signal_ends_the_command_which_says_how_to_go_on(image_folder, tmp_path, number, codes):
    """Sent to all its processes at once, as a terminal and Slurm do."""
    for copy in range(40):
        shutil.copytree(image_folder / "train", tmp_path / "src/train", dirs_exist_ok=True,
                        copy_function=lambda a, b, copy=copy: shutil.copy(a, f"{b[:-4]}-{copy}.jpg"))  # fmt: skip
    command = [sys.executable, "-m", "knltrain", "prepare", "src", "out", "--workers", "1", "--size", str(SIZE)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
    process = subprocess.Popen(command, start_new_session=True, **pipes)
    while not list(tmp_path.glob("out/train/*.part")):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, number)
    output, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors
    assert process.returncode in codes, errors
    assert "out is not finished; the same command goes on from there" in output
    again = subprocess.run(command, timeout=60, capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "not finished" not in again.stdout
    assert len(open_folder(tmp_path / "out", "train")) == 40 * 48


def test_the_command(image_folder, tmp_path):
    def knltrain(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "knltrain", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=200,
            cwd=tmp_path,
        )

    done = knltrain("prepare", image_folder, "raw", "--size", SIZE, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["counts"] == {"train": 48, "val": 13}
    assert "all checksums match" in knltrain("prepare", "--verify", "raw").stdout
    shown = knltrain("data", "raw", "--image-size", 24)
    assert shown.returncode == 0, shown.stderr
    assert "train: raw, 48 images in 3 classes" in shown.stdout
    with Image.open(tmp_path / "contact-sheet.png") as sheet:
        assert sheet.width == 8 * 120 + 7 * 6, "enlarged five times, for the names below"
    for wrong in (["prepare"], ["prepare", image_folder], ["prepare", image_folder, "x", "--verify", "raw"]):
        assert knltrain(*wrong).returncode == 2
    small = ("--model", "alexnet_bn_small", "--image-size", 32, "--global-batch", 16, "--max-steps", 2)
    trained = knltrain("train", "--recipe", "alexnet-bn-32k", "--data", "raw", *small)
    assert trained.returncode == 0, trained.stderr


def test_images_that_would_be_enlarged(image_folder, tmp_path, capsys):
    prepare(image_folder, tmp_path / "large", size=100, workers=1)
    assert "enlarged to 100; --size" in capsys.readouterr().out.replace("\n", " ")
    prepare(image_folder, tmp_path / "small", workers=1)
    assert "enlarged" not in capsys.readouterr().out


def test_png_sources_become_jpegs_or_pixels(tmp_path):
    for part in ("train", "val"):
        (tmp_path / "src" / part / "x").mkdir(parents=True)
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), np.uint8)).save(
            tmp_path / f"src/{part}/x/a.png"
        )
        write_jpeg(tmp_path / f"src/{part}/x/small.jpg", 20, 30, 0)
    prepare(tmp_path / "src", tmp_path / "tar", format="tar", size=SIZE)
    prepare(tmp_path / "src", tmp_path / "raw", size=SIZE)
    tar = open_folder(tmp_path / "tar", "train")
    assert {tar.image(i).pixels().shape for i in range(2)} == {(32, 38, 3), (20, 30, 3)}
    assert np.load(tmp_path / "raw/train/images-00000.npy").shape == (2, SIZE, SIZE, 3)


@pytest.mark.parametrize("size", [0, 64])
def test_a_gif_by_another_name_is_read_back(tmp_path, size):
    """It is kept as it came in no format that a tar file's reader looks for."""
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / "src" / part / name).mkdir(parents=True)
            Image.new("RGB", (50, 40), (200, 30, 30)).save(tmp_path / "src" / part / name / "one.jpg", "GIF")
    prepare(tmp_path / "src", tmp_path / "out", format="tar", size=size)
    image = open_folder(tmp_path / "out", "train").image(1).pixels()
    assert image.shape == (40, 50, 3)
    assert abs(image.mean((0, 1)) - (200, 30, 30)).max() < 3


def test_classes_from_the_devkit(image_folder, tmp_path):
    scipy_io = pytest.importorskip("scipy.io")
    wnids = ["n00000003", "n00000001", "n00000002"]  # numbered in an order of its own
    synsets = np.array([(number, wnid) for number, wnid in enumerate(wnids, 1)],
                       dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O")])  # fmt: skip
    scipy_io.savemat(tmp_path / "meta.mat", {"synsets": synsets})
    src = tmp_path / "src"
    src.mkdir()
    with tarfile.open(src / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "meta.mat", "ILSVRC2012_devkit_t12/data/meta.mat")
        (tmp_path / "truth.txt").write_text("2\n1\n3\n")
        tar.add(tmp_path / "truth.txt", "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt")
    webdataset(src / "ILSVRC2012_img_val.tar", [(f"ILSVRC2012_val_{i:08}.JPEG", jpeg(i)) for i in (1, 2, 3)])
    prepare(src, tmp_path / "out")
    val = open_folder(tmp_path / "out", "val")
    assert val.classes == ("n00000001", "n00000002", "n00000003")
    assert val.labels.tolist() == [[0, 2, 1][place] for place in order.permutation(0, 0, 3)]
    with pytest.raises(DataError, match="without train"):
        open_folder(tmp_path / "out", "train")
