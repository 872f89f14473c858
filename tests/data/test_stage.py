"""--stage: a copy on each node, checked, kept, and refused where it does not fit."""

import os
import shutil
import threading
import time

import pytest

from knltrain.data import stage as staging
from knltrain.data.datasets import open_folder
from knltrain.data.folder import DataError
from knltrain.data.prepare import prepare
from knltrain.data.stage import stage, stage_on_every_node
from knltrain.errors import ConfigError, KnltrainError
from knltrain.runlog.console import Console


@pytest.fixture(scope="module", params=["raw", "tar"])
def prepared(image_folder, tmp_path_factory, request):
    out = tmp_path_factory.mktemp("prepared") / "out"
    prepare(image_folder, out, Console(), format=request.param, size=32, workers=1, on_bad="fail")
    return out


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_is_the_same_data(prepared, tmp_path):
    seen = []
    copy = stage(prepared, tmp_path / "local", lambda done, total: seen.append((done, total)))
    assert files(copy) == {name: data for name, data in files(prepared).items() if not name.endswith(".npz")}
    assert seen[-1][0] == seen[-1][1] > 0
    assert len(open_folder(copy, "train")) == 48


def test_is_kept_and_completed(prepared, tmp_path):
    copy = stage(prepared, tmp_path)
    whole = files(copy)
    assert stage(prepared, tmp_path, lambda *_: pytest.fail("it is there")) == copy
    name = next(name for name in whole if "00000" in name)
    (copy / name).write_bytes(whole[name][:100])  # as a job that was ended leaves it
    (copy / "meta.json").unlink()
    assert stage(prepared, tmp_path) == copy
    assert files(copy) == whole


def test_what_is_no_longer_what_it_was_is_copied_again(prepared, tmp_path):
    """Of the same size, with an old time: a file of another preparation, or labels that were written over."""
    copy = stage(prepared, tmp_path)
    whole = files(copy)
    for name in whole:
        if name.endswith((".npy", ".tar")):
            data = bytearray(whole[name])
            data[-1000 if len(data) > 5000 else -1] ^= 1
            (copy / name).write_bytes(data)
            os.utime(copy / name, ns=(10**18, 10**18))
    assert files(copy) != whole
    stage(prepared, tmp_path)
    assert files(copy) == whole


def test_what_is_whole_is_not_written_again(prepared, tmp_path):
    """All ranks of a node come for it at once, and read it while others come."""
    meta = stage(prepared, tmp_path) / "meta.json"
    first = meta.stat()
    stage(prepared, tmp_path)
    assert (meta.stat().st_ino, meta.stat().st_mtime_ns) == (first.st_ino, first.st_mtime_ns)
    meta.write_bytes(b"{")
    copies, start = [], threading.Barrier(8)

    def come():
        start.wait(30)
        copies.append((stage(prepared, tmp_path) / "meta.json").read_bytes())

    threads = [threading.Thread(target=come) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert copies == [(prepared / "meta.json").read_bytes()] * 8
    assert not list(tmp_path.rglob("*.part"))


def test_what_was_not_prepared_is_refused(image_folder, tmp_path):
    with pytest.raises(ConfigError, match="prepare it first"):
        stage(image_folder, tmp_path)


def test_damage_on_the_way_is_found(prepared, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(prepared, damaged)
    name = next(name for name in files(damaged) if "00000" in name)
    data = bytearray((damaged / name).read_bytes())
    data[1000] ^= 1
    (damaged / name).write_bytes(data)
    with pytest.raises(DataError, match=name):
        stage(damaged, tmp_path / "local")
    assert not list((tmp_path / "local").rglob("meta.json"))


def test_a_disk_that_is_too_small(prepared, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(KnltrainError, match=r"0\.0 GB are to be copied and 0\.0 GB are free"):
        stage(prepared, tmp_path)


class Ranks:
    """Sums over threads that stand for ranks."""

    def __init__(self, count):
        self.barrier = threading.Barrier(count, timeout=30)
        self.lock = threading.Lock()
        self.given = []

    def total(self, *values):
        with self.lock:
            self.given.append(values)
        self.barrier.wait()
        sums = [float(sum(column)) for column in zip(*self.given, strict=True)]
        if self.barrier.wait() == 0:
            self.given = []
        self.barrier.wait()
        return sums


def on_ranks(roots, into, local_ranks, stops=None):
    ranks, results = Ranks(len(roots)), ["nothing"] * len(roots)

    def run(number):
        try:
            results[number] = stage_on_every_node(
                roots[number], into[number], ranks.total, lambda _: None, local_rank=local_ranks[number],
                stop_requested=(stops or {}).get(number, lambda: False),
            )  # fmt: skip
        except KnltrainError as error:
            results[number] = str(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(roots))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_one_rank_of_a_node_copies_and_all_find_it(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(staging, "_POLL_INTERVAL_S", 0.01)
    node = [tmp_path / "a", tmp_path / "a", tmp_path / "b", tmp_path / "b"]
    found = on_ranks([prepared] * 4, node, [0, 1, 0, 1])
    assert [path.parent for path in found] == node
    assert files(found[0]) == files(found[2])


def test_all_fail_with_the_one_that_fails(prepared, tmp_path, monkeypatch, image_folder):
    monkeypatch.setattr(staging, "_POLL_INTERVAL_S", 0.01)
    (tmp_path / "b").write_text("no folder")
    node = [tmp_path / "a", tmp_path / "a", tmp_path / "b", tmp_path / "b"]
    found = on_ranks([prepared] * 4, node, [0, 1, 0, 1])
    assert "--stage" in found[2]
    assert [found[0], found[1], found[3]] == [
        "another node could not stage the data; see its messages for the cause"
    ] * 3  # fmt: skip


def test_one_rank_that_is_asked_to_stop_ends_the_copying_on_all(prepared, tmp_path, monkeypatch):
    """A copy of a terabyte is given up in the middle of a file, and what is whole stays."""
    monkeypatch.setattr(staging, "_POLL_INTERVAL_S", 0.01)
    monkeypatch.setattr(staging, "_BLOCK_BYTES", 64)
    copied = threading.Event()
    original = staging._copy

    def slow(source, target, digest, done, progress):
        def at(count):
            copied.set()
            progress(count)
            time.sleep(0.02)

        return original(source, target, digest, done, at)

    monkeypatch.setattr(staging, "_copy", slow)
    found = on_ranks([prepared] * 2, [tmp_path / "a"] * 2, [0, 1], {1: copied.is_set})
    assert found == [None, None]
    assert not list((tmp_path / "a").glob("*/meta.json"))
    monkeypatch.undo()
    monkeypatch.setattr(staging, "_POLL_INTERVAL_S", 0.01)
    assert files(on_ranks([prepared], [tmp_path / "a"], [0])[0]) == files(prepared)
