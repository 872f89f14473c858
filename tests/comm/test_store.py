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


def test_a_folder_that_cannot_be_used_is_said_by_the_first_rank(tmp_path):
    processes = start(tmp_path / "run", 2, tmp_path / "missing" / "place")
    assert wait_for(processes[:1], 60) == [0], outputs(tmp_path / "run")
    kill(processes[1:])
    (said,) = results(tmp_path / "run", 2)
    assert said == (
        f"rank 0 of 2 (torchrun) cannot use {tmp_path / 'missing'} (TMPDIR) for the rendezvous of the ranks of a "
        "node: No such file or directory"
    )
