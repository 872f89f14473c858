"""OneCCL is tried in a process of its own: libfabric ends that one where the network that was asked for is missing."""

import os

import pytest

from knltrain.comm import oneccl, segments, trial
from knltrain.comm.backend import choose_backend
from knltrain.errors import ConfigError
from knltrain.launch.world import Ranks

RANKS = Ranks("torchrun", 0, 2, 0, 2, "env://")


@pytest.fixture(autouse=True)
def needs_oneccl(monkeypatch):
    try:
        oneccl.find_library()
    except oneccl.UnavailableError as error:
        pytest.skip(str(error))
    for name in ("FI_PROVIDER", *os.environ):
        if name.startswith(("CCL_", "FI_", "I_MPI_")):
            monkeypatch.delenv(name, raising=False)


def test_a_provider_without_its_hardware_is_no_reason_to_crash(monkeypatch):
    monkeypatch.setenv("FI_PROVIDER", "psm2")
    before = set(os.listdir("/dev/shm"))
    chosen = choose_backend("auto", RANKS)
    assert chosen.name == "gloo"
    assert "oneCCL does not start here" in chosen.note
    assert "FI_PROVIDER=psm2" in chosen.note
    with pytest.raises(ConfigError, match=r"comm\.backend ccl: oneCCL does not start here"):
        choose_backend("ccl", RANKS)
    assert not [name for name in set(os.listdir("/dev/shm")) - before if name.endswith(":0:0")]


def test_one_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(trial, "_TIMEOUT_S", 0.01)
    assert "no answer in 0.01 s" in choose_backend("auto", RANKS).note


def test_where_shared_memory_is_small_ranks_are_told_that_it_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setattr(segments, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(segments, "_SEGMENT_BYTES", 1 << 60)
    assert choose_backend("auto", RANKS).note.startswith(f"{tmp_path} has ")
    monkeypatch.setattr(segments, "_SEGMENT_BYTES", 1)
    assert f"{tmp_path} has " not in choose_backend("auto", RANKS).note
