"""Tar files and prepared folders that are damaged, or made to do harm: refused in one line, or done without."""

import gzip
import io
import json
import os
import tarfile

import numpy as np
import pytest
from prepared import jpeg, prepare, webdataset

from knltrain.data.datasets import open_folder
from knltrain.data.folder import DataError
from knltrain.data.stage import stage
from knltrain.data.tar_index import members
from knltrain.errors import ConfigError

# --- tar files ---


def tar_of(path, *infos):
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for info, data in infos:
            info.size = info.size or len(data)
            tar.addfile(info, io.BytesIO(data + bytes(info.size - len(data))))


@pytest.mark.parametrize("label", [b"9" * 5000, b"1048576", b"9" * 30, b"-1", "²".encode(), b""])
def test_labels_that_are_no_class_number(tmp_path, label):
    webdataset(tmp_path / "train-0.tar", [("1.jpg", jpeg(0)), ("1.cls", label)])
    with pytest.raises(DataError, match=r"1\.cls holds .* no class number"):
        open_folder(tmp_path, "train")


def test_members_that_are_no_plain_files_are_no_images(tmp_path):
    infos = []
    for kind, name in ((tarfile.SYMTYPE, "1.jpg"), (tarfile.LNKTYPE, "2.jpg"), (tarfile.CHRTYPE, "3.jpg"),
                       (tarfile.FIFOTYPE, "4.jpg"), (tarfile.DIRTYPE, "5.jpg")):  # fmt: skip
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd"
        infos.append((info, b""))
    tar_of(tmp_path / "train-0.tar", *infos)
    with pytest.raises(DataError, match="no images in its tar files"):
        open_folder(tmp_path, "train")


def test_sparse_members_are_refused(tmp_path):
    info = tarfile.TarInfo("1.jpg")
    info.type = tarfile.GNUTYPE_SPARSE
    tar_of(tmp_path / "train-0.tar", (info, jpeg(0)))
    with pytest.raises(DataError, match=r"1\.jpg is stored with gaps"):
        open_folder(tmp_path, "train")


def test_a_chain_of_headers_without_end(tmp_path):
    info = tarfile.TarInfo("x")
    info.type = tarfile.GNUTYPE_LONGNAME
    tar_of(tmp_path / "train-0.tar", *((info, b"name\0") for _ in range(3000)))
    with pytest.raises(DataError, match="a thousand headers"):
        open_folder(tmp_path, "train")


@pytest.mark.timeout(60)
def test_a_negative_size_is_no_way_back(tmp_path):
    webdataset(tmp_path / "train-0.tar", [("1.jpg", jpeg(0)), ("1.cls", b"0")])
    data = bytearray((tmp_path / "train-0.tar").read_bytes())
    data[124:136] = b"\xff" * 11 + b"\x00"  # -256, in base 256
    data[148:156] = b"        "
    data[148:156] = b"%06o\0 " % sum(data[:512])
    (tmp_path / "train-0.tar").write_bytes(data)
    with pytest.raises(DataError, match=r"train-0\.tar"):
        open_folder(tmp_path, "train")


def test_no_member_ends_behind_the_archive_that_it_is_of(tmp_path):
    """Of an archive within another, which goes on behind it."""
    webdataset(tmp_path / "0.tar", [("1.jpg", bytes(1000)), ("2.jpg", bytes(1000))])
    with open(tmp_path / "0.tar", "rb") as file:
        _, second = members(file)
        with pytest.raises(DataError, match=r"cut short within 2\.jpg"):
            list(members(file, 0, second.offset + second.size - 1))


def test_names_that_lead_elsewhere_are_only_names(tmp_path):
    names = ["/absolute/1", "../../up/2", "a/../../../3", "\n/4"]
    files = [(f"{name}.{kind}", data) for name in names for kind, data in (("jpg", jpeg(0)), ("cls", b"0"))]
    webdataset(tmp_path / "src" / "train-0.tar", files)
    before = sorted(tmp_path.rglob("*"))
    prepare(tmp_path / "src", tmp_path / "out" / "raw", workers=1)
    prepare(tmp_path / "src", tmp_path / "out" / "tar", format="tar", workers=1)
    new = {path.relative_to(tmp_path).as_posix() for path in set(tmp_path.rglob("*")) - set(before)}
    assert {path for path in new if not path.startswith("out")} == {"src/train-index-v3.npz"}
    with tarfile.open(tmp_path / "out" / "tar" / "train-00000.tar") as tar:
        assert {name.partition(".")[0] for name in tar.getnames()} == {f"train-{place:08}" for place in range(4)}


BAD_INDEXES = [
    {"offset": [0, 1024]}, {"offset": [-512, 1024]}, {"size": [1 << 40, 5]}, {"size": [-1, 5]}, {"shard": [0, 1]},
    {"shard": [0, -1]}, {"label": [0, 1 << 40]}, {"label": [0]}, {"label": [[0, 1]]}, {"label": [0.5, 1.0]},
    {"label": ["a", "b"]}, {"shard": []},
]  # fmt: skip


@pytest.mark.parametrize("wrong", BAD_INDEXES, ids=range(len(BAD_INDEXES)))
def test_an_index_that_lies_is_made_anew(tmp_path, wrong):
    webdataset(
        tmp_path / "train-0.tar", [(f"{n}.{k}", d) for n in (1, 2) for k, d in (("jpg", jpeg(n)), ("cls", b"3"))]
    )
    whole = open_folder(tmp_path, "train")
    (path,) = tmp_path.glob("*.npz")
    arrays = dict(np.load(path))
    np.savez(path, **{**arrays, **{name: np.array(value) for name, value in wrong.items()}})
    again = open_folder(tmp_path, "train")
    assert again.labels.tolist() == whole.labels.tolist() == [3, 3]
    again.check(2)


@pytest.mark.parametrize("content", [b"PK\x03\x04 cut short", b"\x93NUMPY\x01\x00", b"", b"\x80\x04N."])
def test_an_index_that_is_none_is_made_anew(tmp_path, content):
    webdataset(tmp_path / "train-0.tar", [("1.jpg", jpeg(0)), ("1.cls", b"0")])
    open_folder(tmp_path, "train")
    (path,) = tmp_path.glob("*.npz")
    path.write_bytes(content)
    open_folder(tmp_path, "train").check(1)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "name, content",
    [("0.csv", b"\xff\xfe"), ("0.csv", b'"' + b"x" * 200_000), ("0.txt", None),
     ("ILSVRC2012_devkit_t12.tar.gz", b"\x1f\x8b"),
     ("ILSVRC2012_devkit_t12.tar.gz", gzip.compress(b"x" * 9999)[:-9]), ("ILSVRC2012_devkit_t12.tar.gz", None)],
    ids=range(6),
)  # fmt: skip
def test_ground_truth_that_is_none(tmp_path, name, content):
    webdataset(tmp_path / "ILSVRC2012_img_val.tar", [("ILSVRC2012_val_00000001.JPEG", jpeg(0))])
    if content is None:
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((DataError, OSError)):
        prepare(tmp_path, tmp_path.parent / f"{tmp_path.name}-raw", workers=1)
    if name.startswith("0."):
        (tmp_path / name).unlink()
        (tmp_path / "0.csv").write_bytes(b"\xff\xfe")
        (tmp_path / "1.csv").write_text("ILSVRC2012_val_00000001,n00000001 1 2 3 4\n")
        assert prepare(tmp_path, tmp_path.parent / f"{tmp_path.name}-raw", workers=1)["counts"] == {"val": 1}


# --- prepared folders ---


@pytest.fixture
def raw(folder, tmp_path_factory):
    """A raw folder and its manifest."""
    root = tmp_path_factory.mktemp("raw") / "data"
    prepare(folder, root, workers=1)
    return root, json.loads((root / "meta.json").read_text())


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "train/../../secret", "", ".", "a\0b"])
def test_no_path_of_a_manifest_leaves_its_folder(raw, path, tmp_path):
    root, manifest = raw
    (root.parent / "secret").write_bytes(b"do not read or write this")
    manifest["shards"]["train"][0].update(file=path, bytes=25)
    (root / "meta.json").write_text(json.dumps(manifest))
    for use in (lambda: open_folder(root, "train"), lambda: stage(root, tmp_path / "node")):
        with pytest.raises(DataError, match="is not a file of this folder"):
            use()
    assert not list((tmp_path / "node").glob("*"))


@pytest.mark.parametrize(
    "change",
    [
        {"labels": {"../x": "0"}}, {"shards": {"../x": []}}, {"counts": {"test": 1}}, {"size": -1}, {"size": 10**6},
        {"classes": [1]}, {"rejected": -1}, {"classes": []}, {"shards": {"train": []}},
        {"shards": {"train": [{"file": "train/images-00000.npy", "images": 7, "bytes": 3200, "sha256": ""}]}},
    ],
)  # fmt: skip
def test_manifests_that_lie(raw, change):
    root, manifest = raw
    (root / "meta.json").write_text(json.dumps({**manifest, **change}))
    with pytest.raises(DataError):
        open_folder(root, "train")


@pytest.mark.parametrize("content", [b"[" * 10**5, b'{"format": ' + b"[" * 10**5, b'{"format": "\xff"}', b"\0", b"{}x"])
def test_manifests_that_are_none(raw, content):
    root, _ = raw
    (root / "meta.json").write_bytes(content)
    with pytest.raises(DataError, match=r"meta\.json: "):
        open_folder(root, "train")


def saved(write):
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


LABELS = [
    saved(lambda file: np.savez(file, labels=np.array([0]))), saved(lambda file: np.save(file, np.array(0))),
    saved(lambda file: np.save(file, np.array([0.5]))), saved(lambda file: np.save(file, np.array(["a"]))),
    saved(lambda file: np.save(file, np.array([1]))), saved(lambda file: np.save(file, np.array([1 << 63], np.uint64))),
    saved(lambda file: np.save(file, np.array([{}]), allow_pickle=True)), b"\x93NUMPY\x01\x00\xff\xff", b"",
    saved(lambda file: np.save(file, np.array([0]))).replace(b"(1,)", b"(9999999999999,)"),
]  # fmt: skip


@pytest.mark.parametrize("content", LABELS, ids=range(len(LABELS)))
def test_labels_that_are_none(raw, content):
    root, _ = raw
    (root / "train" / "labels.npy").write_bytes(content)
    with pytest.raises(DataError, match=r"labels\.npy: "):
        open_folder(root, "train")


def test_shards_of_another_memory_layout_are_refused(raw):
    root, manifest = raw
    path = root / manifest["shards"]["train"][0]["file"]
    np.save(path, np.asfortranarray(np.load(path)))
    assert path.stat().st_size == manifest["shards"]["train"][0]["bytes"]
    manifest["shards"]["train"][0]["sample"] = ""  # as older versions wrote it: pixels are not compared
    (root / "meta.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="not images"):
        open_folder(root, "train")


@pytest.mark.parametrize(
    "lines",
    [[[]], [{}], ["x"], [{"images_a_shard": 0}], [{"images_a_shard": "many"}], [{"images_a_shard": 1}, {"file": "x"}],
     [{"images_a_shard": 1}, {"file": "x", "images": 1, "bytes": 1, "sha256": "", "rejected": [1]}]],
)  # fmt: skip
def test_journals_that_are_none(folder, tmp_path_factory, lines):
    dst = tmp_path_factory.mktemp("dst")
    (dst / "prepare.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ConfigError, match=r"prepare\.jsonl is damaged; give another folder, or delete this one"):
        prepare(folder, dst, workers=1)
    (dst / "prepare.jsonl").write_bytes(b"\xff\xfe\n")  # nothing that was finished: it begins anew
    assert prepare(folder, dst, workers=1)["counts"] == {"train": 1}
