"""The store of the ranks of one node, also after a run that was killed there."""

import os
import signal
import time

import pytest
from comm.ranks import outputs, results, start_ranks, wait_for

MEET = """
import json, sys, time
from dataclasses import replace
from pathlib import Path
from knltrain.comm.group import Group
from knltrain.errors import KnltrainError
from knltrain.launch.world import discover
folder, place, then = sys.argv[1:]
ranks = replace(discover(), init_method=f"file://{place}")
time.sleep(2.0 * (ranks.rank == 0))  # the others look first, at what an earlier run has left
try:
    with Group(ranks, "gloo") as group:
        said = group.sum(ranks.rank + 1.0)
        if then == "wait":
            Path(folder, f"rank{ranks.rank}.met").touch()
            time.sleep(600)
except KnltrainError as error:
    said = str(error)
Path(folder, f"rank{ranks.rank}.json").write_text(json.dumps(said))
"""


def start(folder, size, place, then="end"):
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(MEET)
    return start_ranks(script, size, folder, place, then, MASTER_ADDR="127.0.0.1", MASTER_PORT="1")


def kill(processes):
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.wait()


def until(happened, seconds=60):
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["while it waits", "after all have met"])
def test_a_run_that_was_killed_misleads_no_later_one_at_the_same_place(killed, tmp_path):
    """A script that starts knltrain again under the same mpiexec, or in the same step of Slurm."""
    meeting, place = tmp_path / "meeting", tmp_path / "meeting" / "place"
    meeting.mkdir()
    earlier = start(tmp_path / "earlier", 2, place, "wait")
    if killed == "while it waits":
        os.kill(earlier[1].pid, signal.SIGSTOP)  # before it has even begun
        until(place.exists)
    else:
        until(lambda: len(list((tmp_path / "earlier").glob("*.met"))) == 2)
    kill(earlier)
    assert place.exists() == (killed == "while it waits")
    assert wait_for(start(tmp_path / "later", 2, place), 60) == [0, 0], outputs(tmp_path / "later")
    assert results(tmp_path / "later", 2) == [[3.0], [3.0]]
    assert not place.exists()


def test_what_ranks_met_in_is_gone_after_them(tmp_path):
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    assert wait_for(start(tmp_path / "run", 3, meeting / "place"), 60) == [0, 0, 0], outputs(tmp_path / "run")
    assert list(meeting.iterdir()) == []


def first_of_two(folder, place):
    """What the first rank says."""
    processes = start(folder, 2, place)
    assert wait_for(processes[:1], 60) == [0], outputs(folder)
    kill(processes[1:])
    return results(folder, 2)[0]


def test_a_folder_that_cannot_be_used_is_said_by_the_first_rank(tmp_path):
    folder = tmp_path / "gone" / "missing"
    assert first_of_two(tmp_path / "run", folder / "place") == (
        f"rank 0 of 2 (torchrun) cannot use {folder} (TMPDIR) for the rendezvous of the ranks of a node: "
        "No such file or directory"
    )


def of_another_account(folder, path):
    folder.mkdir()
    os.chown(folder, 12345, -1)


def open_to_all(folder, path):
    folder.mkdir()
    folder.chmod(0o777)


def link(folder, path):
    (path / "elsewhere").mkdir()
    folder.symlink_to(path / "elsewhere")


@pytest.mark.parametrize("make", [of_another_account, open_to_all, link])
def test_a_folder_in_which_others_may_have_put_something_is_refused(make, tmp_path):
    """Any account of the node can tell its name, and make it first."""
    if make is of_another_account and os.geteuid():
        pytest.skip("only root can give a folder to another account")
    folder = tmp_path / "knltrain-1000"
    make(folder, tmp_path)
    said = first_of_two(tmp_path / "run", folder / "place")
    assert said.startswith(f"{folder}, where the ranks of this node connect, is not a folder that this account alone")
    assert "set TMPDIR to a folder of your own" in said


def test_a_folder_that_is_missing_is_made_for_its_user_alone(tmp_path):
    folder = tmp_path / "knltrain-1000"
    assert wait_for(start(tmp_path / "run", 2, folder / "place"), 60) == [0, 0], outputs(tmp_path / "run")
    assert folder.stat().st_mode & 0o777 == 0o700
