"""What libfabric leaves in /dev/shm: a rank's own files, those of the dead, and everybody else's."""

import os
import signal
import subprocess
import time

import pytest
from comm.ranks import outputs, start_ranks, wait_for

from knltrain.comm import segments
from knltrain.comm.backend import choose_backend
from knltrain.launch.rendezvous import START_TIMEOUT_S
from knltrain.launch.world import Ranks

# Joins, says so, and then ends as it is told, or stays. Rank 0 fails by waiting in vain for rank 1.
RANK = """
import os, sys, time
from pathlib import Path
import torch.distributed as dist
from knltrain.comm.group import Group
from knltrain.launch.world import Ranks
folder, way, rank = Path(sys.argv[1]), sys.argv[2], int(os.environ["RANK"])
with Group(Ranks("torchrun", rank, 2, rank, 2, f"file://{folder}/store"), "ccl") as group:
    group.barrier()
    (folder / f"joined{group.rank}").write_text(str(os.getpid()))
    if way == "stay":
        time.sleep(600)
    if way == "fail" and rank == 0:
        group.set_timeout(1.0)
        try:
            group.barrier()
        finally:
            (folder / "given up").touch()
    if way == "fail":
        deadline = time.monotonic() + 60
        while not (folder / "given up").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        raise ValueError("as asked")
"""


@pytest.fixture
def gone():
    """The id of a process that is no more."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def age(*paths):
    """Makes files as old as those of a run whose ranks have all found each other."""
    for path in paths:
        os.utime(path, (0, time.time() - START_TIMEOUT_S - 1))


def test_only_files_of_this_users_dead_processes_are_removed(gone, tmp_path, monkeypatch):
    monkeypatch.setattr(segments, "SHARED_MEMORY", tmp_path)
    dead = [f"{gone}:0:0", f"{gone}:12:3"]
    others = [f"{os.getpid()}:0:0", f"{os.getppid()}:0:0", "1:0:0", f"{gone}:0", f"{gone}:0:0:0", f"{gone}:0:0 ",
              f"a{gone}:0:0", f"sem.{gone}:0:0", f"0{gone}:0:0", "0:0:0", "99999999999999999999:0:0"]  # fmt: skip
    for name in (*dead, *others):
        (tmp_path / name).touch()
    (tmp_path / f"{gone}:7:7").mkdir()
    segments.remove_dead_segments()
    assert set(dead) <= set(os.listdir(tmp_path)), "new: of a rank in another container, perhaps, that starts"
    age(*tmp_path.iterdir())
    segments.remove_dead_segments()
    assert sorted(os.listdir(tmp_path)) == sorted([*others, f"{gone}:7:7"])
    segments.remove_own_segments()
    assert sorted(os.listdir(tmp_path)) == sorted([*others[1:], f"{gone}:7:7"])


def test_another_users_files_stay(gone, tmp_path, monkeypatch):
    monkeypatch.setattr(segments, "SHARED_MEMORY", tmp_path)
    (tmp_path / f"{gone}:0:0").touch()
    age(tmp_path / f"{gone}:0:0")
    monkeypatch.setattr(segments.os, "geteuid", lambda: os.getuid() + 1)
    segments.remove_dead_segments()
    assert os.listdir(tmp_path) == [f"{gone}:0:0"]


def test_a_machine_without_shared_memory_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(segments, "SHARED_MEMORY", tmp_path / "nowhere")
    segments.remove_dead_segments()
    segments.remove_own_segments()


@pytest.fixture
def start(tmp_path):
    """Starts two ranks and returns them and their folder, once both have joined."""
    if choose_backend("auto", Ranks("none", 0, 2, 0, 2)).name != "ccl":
        pytest.skip("oneCCL is not installed")
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    started = []

    def run(way):
        folder = tmp_path / way
        folder.mkdir()
        processes = start_ranks(script, 2, folder, way)
        started.extend(processes)
        deadline = time.monotonic() + 90
        while len(list(folder.glob("joined*"))) < 2:
            assert time.monotonic() < deadline, outputs(folder)
            time.sleep(0.05)
        return processes

    yield run
    wait_for(started, 0)


def left(processes):
    return [name for name in os.listdir("/dev/shm") if name.split(":")[0] in {str(one.pid) for one in processes}]


@pytest.mark.parametrize("way", ["leave", "fail"])
def test_a_rank_that_leaves_takes_its_files_along(way, start):
    processes = start(way)
    codes = wait_for(processes, 60)
    assert all((code != 0) == (way == "fail") for code in codes), codes
    assert left(processes) == []


def test_the_next_start_removes_what_killed_ranks_left(start):
    killed = start("stay")
    assert len(left(killed)) == 2, "libfabric names its files in another way now"
    for process in killed:
        process.send_signal(signal.SIGKILL)
    wait_for(killed, 30)
    assert len(left(killed)) == 2
    age(*(segments.SHARED_MEMORY / name for name in left(killed)))
    assert wait_for(start("leave"), 60) == [0, 0]
    assert left(killed) == []
