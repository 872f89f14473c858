"""The published CIFAR-10 archive: what is made of it, and what is refused."""

import gzip
import io
import json
import os
import pickle
import struct
import tarfile

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from knltrain.cli.main import main
from knltrain.data.folder import Folder

CLASSES = [b"airplane", b"automobile", b"bird"]
TRAIN, VAL = 4, 3  # images a batch


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, as the published files have them."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_bytes(self, value):
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = save_bytes


def pickled(value):
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def batch(seed, count):
    rng = np.random.default_rng(seed)
    return {
        b"batch_label": b"a batch",
        b"labels": [index % len(CLASSES) for index in range(count)],
        b"data": rng.integers(0, 256, (count, 3072), np.uint8),
        b"filenames": [b"x.png"] * count,
    }


def contents():
    files = {f"data_batch_{number}": batch(number, TRAIN) for number in range(1, 6)}
    return {**files, "test_batch": batch(6, VAL), "batches.meta": {b"num_vis": 3072, b"label_names": CLASSES}}


def write_archive(path, files):
    with tarfile.open(path, "w:gz") as tar:
        for name, value in {"readme.html": b"<html>", **files}.items():
            content = value if isinstance(value, bytes) else pickled(value)
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def invoke(*arguments, code=0):
    result = CliRunner().invoke(main, ["data", *map(str, arguments)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


@pytest.fixture
def archive(tmp_path):
    return write_archive(tmp_path / "cifar-10-python.tar.gz", contents())


def test_images_and_classes_are_those_of_the_archive(archive, tmp_path):
    out = tmp_path / "made" / "cifar10"
    result = invoke("cifar10", archive, out, "--json")
    assert result.stderr.strip() == f"{out}: 20 train and 3 val images of 32 x 32 px in 3 classes"
    assert json.loads(result.stdout) == {
        "out": str(out), "classes": ["airplane", "automobile", "bird"], "counts": {"train": 20, "val": 3}}  # fmt: skip
    train, val = Folder(out / "train"), Folder(out / "val")
    assert (len(train), len(val), train.classes) == (20, 3, ("airplane", "automobile", "bird"))
    second = contents()["data_batch_2"]
    for index in range(TRAIN):
        path = out / "train" / CLASSES[second[b"labels"][index]].decode() / f"{TRAIN + index:05}.png"
        red, green, blue = second[b"data"][index].reshape(3, 32, 32)
        assert (np.asarray(Image.open(path)) == np.stack([red, green, blue], axis=-1)).all()
    assert sorted(path.name for path in out.parent.iterdir()) == ["cifar10"]


def test_a_fortran_array_has_the_same_images(tmp_path):
    files = contents()
    files["test_batch"][b"data"] = np.asfortranarray(files["test_batch"][b"data"])
    invoke("cifar10", write_archive(tmp_path / "a.tar.gz", files), tmp_path / "out")
    found = np.asarray(Image.open(tmp_path / "out" / "val" / "bird" / "00002.png"))
    assert (found.transpose(2, 0, 1).reshape(-1) == batch(6, VAL)[b"data"][2]).all()


class Hostile:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def changed(name, **fields):
    files = contents()
    files[name] = {**files[name], **{key.encode(): value for key, value in fields.items()}}
    return files


@pytest.mark.parametrize(
    "files, words",
    [
        ({**contents(), "test_batch": Hostile(os.mkdir, "hacked")}, "it names posix.mkdir"),
        ({**contents(), "data_batch_3": Hostile(eval, "1")}, "it names __builtin__.eval"),
        (changed("test_batch", data=Hostile(np.fromfile, "x")), "test_batch is not a batch"),
        (changed("test_batch", data=np.zeros((VAL, 3072), np.float32)), "an array of f4, not of unsigned bytes"),
        (changed("test_batch", data=np.zeros((VAL, 3072), object)), "not of unsigned bytes"),
        (changed("test_batch", data=np.zeros((VAL, 3071), np.uint8)), "data of test_batch are not N x 3072 bytes"),
        (changed("test_batch", data=np.zeros(VAL * 3072, np.uint8)), "data of test_batch are not N x 3072 bytes"),
        (changed("test_batch", data=[0] * VAL), "data of test_batch are not N x 3072 bytes"),
        (changed("test_batch", labels=[0] * (VAL + 1)), "test_batch has not as many labels as images"),
        (changed("test_batch", labels=[0, 1, 3]), "a label of test_batch is not one of 0 to 2"),
        (changed("test_batch", labels=[0, 1, -1]), "a label of test_batch is not one of 0 to 2"),
        (changed("test_batch", labels=[0, 1, b"x"]), "a label of test_batch is not one of 0 to 2"),
        (changed("batches.meta", label_names=[b"a", b"../b"]), "batches.meta has no list of class names"),
        (changed("batches.meta", label_names=[b"a", b"a"]), "batches.meta has no list of class names"),
        (changed("batches.meta", label_names=[b"a", b"b\n"]), "batches.meta has no list of class names"),
        (changed("batches.meta", label_names=3), "batches.meta has no list of class names"),
        (changed("batches.meta", label_names=[]), "batches.meta has no list of class names"),
        ({**contents(), "test_batch": [1, 2]}, "test_batch is not a batch of CIFAR-10 (a list)"),
        ({**contents(), "test_batch": b""}, "test_batch is not a batch of CIFAR-10"),
        ({**contents(), "test_batch": pickled(batch(6, VAL))[:-100]}, "test_batch is not a batch of CIFAR-10"),
        ({"test_batch": batch(6, VAL)}, "no cifar-10-batches-py/batches.meta in it"),
    ],
)
def test_another_archive_is_refused_in_a_line(files, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    archive = write_archive(tmp_path / "a.tar.gz", files)
    (line,) = invoke("cifar10", archive, tmp_path / "out", code=1).stderr.splitlines()
    assert words in line
    assert line.endswith("it takes cifar-10-python.tar.gz as it is published")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar.gz"]


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda whole: whole[: len(whole) // 2], "a damaged one"),
        (lambda whole: b"hello" * 999, "no gzipped tar file"),
        (lambda whole: b"", "no gzipped tar file"),
        (lambda whole: gzip.compress(b"hello" * 999), "no gzipped tar file"),
        (lambda whole: whole[:9000] + bytes(9) + whole[9009:], "a damaged one (CRC check failed"),
    ],
)
def test_a_damaged_archive_is_refused_in_a_line(archive, tmp_path, damage, words):
    archive.write_bytes(damage(archive.read_bytes()))
    (line,) = invoke("cifar10", archive, tmp_path / "out", code=1).stderr.splitlines()
    assert words in line
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_read_or_written_is_one_line(archive, tmp_path, monkeypatch):
    assert "/nowhere: No such file" in invoke("cifar10", "/nowhere", tmp_path / "out", code=1).stderr
    assert "Is a directory" in invoke("cifar10", tmp_path, tmp_path / "out", code=1).stderr
    (tmp_path / "file").write_text("")
    assert "file is there already; give another name" in invoke("cifar10", archive, tmp_path / "file", code=2).stderr
    assert "Not a directory" in invoke("cifar10", archive, tmp_path / "file" / "out", code=1).stderr

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    (line,) = invoke("cifar10", archive, tmp_path / "out", code=1).stderr.splitlines()
    assert line == f"knltrain: {tmp_path / 'out'}: No space left on device"
    assert sorted(path.name for path in tmp_path.iterdir()) == [archive.name, "file"]


@pytest.mark.parametrize(
    "words, told",
    [
        (["cifar10", "a"], "cifar10 a: give one FOLDER to look at, or cifar10 ARCHIVE DIR"),
        (["a", "b", "c"], "a b c: give one FOLDER to look at"),
        (["cifar10", "a", "b", "c"], "give one FOLDER to look at"),
        (["cifar10", "a", "b", "--recipe", "cifar-2k", "--sheet", "x"], "--recipe --sheet has no effect"),
        ([], "FOLDER | cifar10 ARCHIVE DIR"),
    ],
)
def test_words_that_mean_nothing(words, told):
    assert told in invoke(*words, code=2).stderr


def test_a_folder_called_cifar10_is_looked_at(archive, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    invoke("cifar10", archive, "cifar10")
    for name in ("cifar10", "./cifar10"):
        result = invoke(name, "--image-size", 32, "--json")
        assert json.loads(result.stdout)["parts"]["train"]["images"] == 20
