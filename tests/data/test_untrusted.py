"""Names, links and images that are damaged, or made to do harm: refused in one line, without a wait."""

import contextlib
import errno
import io
import os
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import write_jpeg
from PIL import Image
from prepared import jpeg, prepare, webdataset

from knltrain.config import AugmentConfig, RunConfig
from knltrain.data.convert import read, to_square
from knltrain.data.datasets import open_folder
from knltrain.data.decode import DecodeError, EncodedImage, read_image
from knltrain.data.folder import DataError, Folder
from knltrain.data.loader import Loader
from knltrain.data.tar import Tar
from knltrain.errors import KnltrainError

# --- names, links, and what is no file ---


def special(kind, path):
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        here = os.open(".", os.O_RDONLY)
        os.chdir(path.parent)  # an address of a socket has 107 characters
        try:
            with socket.socket(socket.AF_UNIX) as one:
                one.bind(path.name)
        finally:
            os.fchdir(here)
            os.close(here)
    else:
        path.symlink_to(
            {"device": "/dev/zero", "nowhere": "/nowhere/0.jpg", "loop": path.name, "folder": path.parents[1]}[kind]
        )


KINDS = ["pipe", "socket", "device", "nowhere", "loop", "folder"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.timeout(60)
def test_what_is_named_like_an_image_and_is_no_file_is_a_bad_image(folder, kind):
    special(kind, folder / "train" / "a" / "1.jpg")
    part = Folder(folder / "train")
    assert len(part) == (1 if kind == "folder" else 2)  # a link to a folder is a folder, and this one a circle
    if len(part) == 2:
        advice = "see that it can be read" if kind == "nowhere" else ".*--on-bad skip"
        with pytest.raises(DataError, match=rf"1\.jpg: .*{advice}"):
            part.check(2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.timeout(60)
def test_what_is_no_file_is_no_shard_either(tmp_path, kind):
    special(kind, tmp_path / "train-0.tar")
    with pytest.raises((KnltrainError, OSError)):
        open_folder(tmp_path, "train").check(1)


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.timeout(60)
def test_prepare_lists_what_is_no_file(folder, kind):
    special(kind, folder / "train" / "a" / "1.jpg")
    assert prepare(folder, folder.parent / f"{folder.name}-raw", workers=1, on_bad="skip")["rejected"] == 1


def evaluated(dataset):
    """Labels of the images that evaluation sees, and how many were replaced, where bad ones are skipped."""
    config = RunConfig(image_size=16, on_bad="skip", augment=AugmentConfig(resize=16))
    loader = Loader(dataset, config, dtype=torch.float32, workers=1)
    with contextlib.closing(loader):
        labels = torch.cat([batch.labels for batch in loader.evaluation(batch=4, rank=0, world_size=1)])
        return labels.tolist(), loader.skipped(lambda *values: list(values))


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "loop"])
@pytest.mark.timeout(60)
def test_what_is_no_file_is_skipped_where_that_is_asked_for(folder, kind):
    special(kind, folder / "train" / "a" / "1.jpg")
    assert evaluated(Folder(folder / "train")) == ([0, 0], 1)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE, errno.ENOENT])
def test_what_ails_the_disk_or_the_network_is_never_skipped(folder, monkeypatch, number):
    """The images are good, and would be replaced by others without a word to say which."""
    write_jpeg(folder / "train" / "a" / "1.jpg", 20, 20, 1)
    webdataset(folder / "tar" / "train-0.tar", [(f"{n}.{k}", d) for n in range(2) for k, d in
                                                (("jpg", jpeg(n)), ("cls", b"0"))])  # fmt: skip
    folder_part, tar = Folder(folder / "train"), Tar(folder / "tar", "train")

    def failing_once(read):
        errors = [OSError(number, os.strerror(number))]

        def fail(*arguments):
            if errors:
                raise errors.pop()
            return read(*arguments)

        return fail

    monkeypatch.setattr("knltrain.data.folder.read_image", failing_once(read_image))
    monkeypatch.setattr(tar, "_pread", failing_once(tar._pread))
    for part, where in ((folder_part, r"a/0\.jpg"), (tar, r"train-0\.tar: 0\.jpg")):
        with pytest.raises(DataError, match=rf"{where}: {os.strerror(number)}; see that .* can be read$"):
            evaluated(part)
        assert evaluated(part) == ([0, 0], 0)


def test_files_that_are_too_large_vanish_or_shrink_are_bad_images(folder, monkeypatch):
    part = Folder(folder / "train")
    path = folder / "train" / "a" / "0.jpg"
    whole = path.read_bytes()
    for change in (lambda: path.write_bytes(whole[:100]), lambda: os.truncate(path, 1 << 40), path.unlink):
        change()
        with pytest.raises(DataError, match=r"0\.jpg: "):
            part.check(1)


def test_images_of_any_length_are_refused_before_they_are_read(folder, monkeypatch):
    """A gigabyte is the most, in a file of its own, in a shard, and for what prepare reads of either."""
    webdataset(folder / "train-0.tar", [("1.jpg", jpeg(0)), ("1.cls", b"0")])
    parts = Folder(folder / "train"), Tar(folder, "train")
    for part in parts:
        part.check(1)
        read(*part.where(0))
    monkeypatch.setattr("knltrain.data.decode._MAX_FILE_BYTES", 100)
    for part in parts:
        with pytest.raises(DataError, match=r"\.jpg: more than 100 bytes; .*--on-bad skip"):
            part.check(1)
        with pytest.raises(OSError, match="more than 100 bytes"):
            read(*part.where(0))


def test_names_are_what_people_make_them(tmp_path):
    classes = ["-rf", "a\nb", "é", "quoted \"'`$(x)", "x" * 255, " "]
    for name in classes:
        write_jpeg(tmp_path / "train" / name / "1\n\x1b.jpg", 20, 20, 0)
    part = open_folder(tmp_path, "train")
    assert part.classes == tuple(sorted(classes))
    os.truncate(tmp_path / "train" / "a\nb" / "1\n\x1b.jpg", 30)
    with pytest.raises(DataError, match=r"a\\nb/1\\n\\x1b\.jpg: ") as raised:
        part.check(len(part))
    assert str(raised.value).isprintable()


def test_classes_whose_name_no_file_can_hold_are_refused(tmp_path):
    for name in (b"caf\xe9", b"a"):
        os.makedirs(os.path.join(os.fsencode(tmp_path), b"train", name))
    with pytest.raises(DataError, match=r"caf\\udce9: the name of a class has to be UTF-8; rename the folder"):
        open_folder(tmp_path, "train")


def test_files_whose_name_is_no_text_are_read(tmp_path):
    write_jpeg(tmp_path / "train" / "a" / "0.jpg", 20, 20, 0)
    os.rename(tmp_path / "train" / "a" / "0.jpg", os.fsencode(tmp_path) + b"/train/a/\xff.jpg")
    open_folder(tmp_path, "train").check(1)
    assert prepare(tmp_path, tmp_path.parent / f"{tmp_path.name}-raw", workers=1)["counts"] == {"train": 1}


def test_links_to_folders_elsewhere_are_classes_and_those_to_nowhere_are_not_left_out(folder):
    """Data sets are often made of links. One that leads nowhere was to be a class."""
    write_jpeg(folder / "elsewhere" / "0.jpg", 20, 20, 1)
    (folder / "train" / "b").symlink_to(folder / "elsewhere")
    assert open_folder(folder, "train").classes == ("a", "b")
    (folder / "train" / "a" / "up").symlink_to(folder / "train")  # a circle, which is not walked
    assert len(open_folder(folder, "train")) == 2
    for target, reason in (("/nowhere", "No such file"), ("c", "Too many levels")):
        (folder / "train" / "c").symlink_to(target)
        with pytest.raises(DataError, match=f"train/c: {reason}"):
            open_folder(folder, "train")
        (folder / "train" / "c").unlink()


def test_thousands_of_empty_classes_are_one_line(tmp_path):
    for number in range(2000):
        (tmp_path / "train" / f"{number:04}").mkdir(parents=True)
    with pytest.raises(DataError, match="0000: no image in it and 1999 other classes") as raised:
        open_folder(tmp_path, "train")
    assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("what", [".", "train", "train/a", "train/a/0.jpg"])
def test_what_may_not_be_read_is_named(what):
    """As root everything may be read: then as nobody, in another process."""
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom knltrain.data.datasets import open_folder\n"
        "def use():\n"
        "    try: open_folder(Path(sys.argv[1]), 'train').check(1)\n"
        "    except Exception as error: print(type(error).__name__, error)\n"
        "use()\n"  # as root this loads all modules, which nobody may not be allowed to read
        "if os.geteuid() == 0: os.setgid(65534); os.setuid(65534); use()\n"
    )
    # Not pytest's folder, which is closed to others.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        write_jpeg(folder / "train" / "a" / "0.jpg", 20, 20, 0)
        (folder / what).chmod(0)
        result = subprocess.run(
            [sys.executable, "-c", code, folder], capture_output=True, text=True, timeout=60, cwd="/"
        )
        (folder / what).chmod(0o700)
    assert result.stdout.startswith(f"DataError {folder / what}: Permission denied"), result.stderr


# --- images ---


def with_size(data, height, width):
    """A JPEG that claims another size."""
    at = next(data.index(marker) for marker in (b"\xff\xc0", b"\xff\xc2") if marker in data)
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


@pytest.mark.parametrize("progressive", [False, True])
def test_pictures_that_claim_too_many_pixels_are_not_decoded(progressive):
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "JPEG", progressive=progressive)
    with pytest.raises(DecodeError, match="65,500 x 65,500 pixels are more than"):
        EncodedImage(with_size(buffer.getvalue(), 65500, 65500))
    thin = EncodedImage(with_size(buffer.getvalue(), 1, 65500))  # unusual, and few
    assert (thin.height, thin.width) == (1, 65500)


def test_other_formats_are_held_to_the_same():
    for kind in ("PNG", "PPM", "BMP"):
        buffer = io.BytesIO()
        Image.new("1", (13000, 13000)).save(buffer, kind)
        with pytest.raises(DecodeError, match="13,000 x 13,000 pixels are more than"):
            EncodedImage(buffer.getvalue())


def test_a_thin_picture_is_not_scaled_to_billions_of_pixels(folder):
    """Its pixels are few until its short side is as long as the others' short sides."""
    Image.new("RGB", (100_000, 1)).save(folder / "train" / "a" / "1.png")
    reason = "4,000,000 x 40 pixels after scaling are more than"
    with pytest.raises(DecodeError, match=reason):
        to_square((folder / "train" / "a" / "1.png").read_bytes(), 40)
    for on_bad in ("fail", "skip"):
        config = RunConfig(image_size=32, on_bad=on_bad, augment=AugmentConfig(name="none", resize=40))
        loader = Loader(open_folder(folder, "train"), config, dtype=torch.float32, workers=1)
        with contextlib.closing(loader):
            if on_bad == "fail":
                with pytest.raises(DataError, match=rf"a/1\.png: {reason}"):
                    next(loader.evaluation(batch=2, rank=0, world_size=1))
            else:
                (batch,) = loader.evaluation(batch=2, rank=0, world_size=1)
                assert torch.equal(batch.images[0], batch.images[1])


def test_a_jpeg_of_endless_scans_is_not_decoded():
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    scan = data[data.rindex(b"\xff\xda") : -2]
    assert EncodedImage(data[:-2] + 9 * scan + data[-2:]).height == 64
    with pytest.raises(DecodeError, match="more than 500 scans"):
        EncodedImage(data[:-2] + 600 * scan + data[-2:])


def test_no_format_is_handed_to_another_program(tmp_path, monkeypatch):
    """Pillow has Ghostscript execute EPS files, whatever their name."""
    gs = tmp_path / "gs"
    gs.write_text(f"#!/bin/sh\ntouch {tmp_path}/executed\necho 10.0\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "EPS")
    with pytest.raises(DecodeError):
        EncodedImage(buffer.getvalue()).pixels()
    assert not (tmp_path / "executed").exists()
