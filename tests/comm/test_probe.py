"""Two ranks that end, whatever happens to them."""

import os
import subprocess

import pytest

from knltrain.comm import probe
from knltrain.comm.backend import choose_backend
from knltrain.comm.probe import DTYPES, run_two_rank_all_reduce
from knltrain.launch.world import Ranks


@pytest.fixture
def started(monkeypatch):
    """The processes that a probe starts; it leaves none of them, and none of its files."""
    processes = []

    class Noted(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            if "knltrain.comm.probe" in self.args:  # and not oneCCL's trial
                processes.append(self)

    monkeypatch.setattr(probe.subprocess, "Popen", Noted)
    yield processes
    assert len(processes) == 2
    assert all(process.returncode is not None for process in processes)
    assert not os.path.exists(os.path.dirname(processes[0].args[3]))


def test_every_type_is_added_up(started):
    results = run_two_rank_all_reduce(120)
    assert [one.dtype for one in results] == list(DTYPES) == ["fp32", "bf16"]
    assert [one.reason for one in results] == ["", ""]
    assert all(one.seconds > 0 for one in results)


def test_every_type_is_added_up_over_oneccl(started):
    if choose_backend("auto", Ranks("none", 0, 2, 0, 2)).name != "ccl":
        started += [subprocess.CompletedProcess(["", "", "", "/nowhere/store"], 0)] * 2
        pytest.skip("oneCCL is not installed")
    results = run_two_rank_all_reduce(120, "ccl")
    assert [(one.dtype, one.reason) for one in results] == [("fp32", ""), ("bf16", "")]
    assert all(one.seconds > 0 for one in results)


def test_an_interface_that_is_not_there_is_the_reason(started, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    for one in run_two_rank_all_reduce(120):
        assert "nowhere0" in one.reason
        assert one.seconds == 0


def test_ranks_that_are_late_are_ended_and_named(started):
    for one in run_two_rank_all_reduce(0.05):
        assert one.reason == "no answer of rank 0 and 1 within 0.05 s"
