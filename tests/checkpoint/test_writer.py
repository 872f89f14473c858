"""Checkpoints written in the background: what they hold, who waits, and what becomes of errors."""

import os
import threading
import time

import pytest
import torch
from checkpoint.state import META, names, stepped
from safetensors.torch import load_file

from knltrain.checkpoint import CheckpointWriter, Progress, writer
from knltrain.errors import KnltrainError


@pytest.fixture
def said():
    return []


@pytest.fixture
def background(tmp_path, said):
    with CheckpointWriter(tmp_path, keep=2, cpus=(), warn=said.append, timeout_s=60) as background:
        yield background


@pytest.fixture
def gate(monkeypatch):
    """Keeps the writer from its work until it is set."""
    event, original = threading.Event(), writer.write

    def held(*arguments):
        assert event.wait(60)
        original(*arguments)

    monkeypatch.setattr(writer, "write", held)
    yield event
    event.set()


def begin(background, step, model, optimizer, **options):
    background.begin(Progress(step), model.state_dict(), optimizer, meta=META, **options)


def test_a_checkpoint_holds_the_moment_at_which_it_was_begun(background, gate, tmp_path):
    model, optimizer = stepped()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    momentum = next(iter(optimizer.state.values()))["momentum_buffer"].clone()
    begin(background, 1, model, optimizer)
    assert background.writing
    optimizer.step()
    for tensor in model.state_dict().values():
        tensor.zero_()
    gate.set()
    assert background.finish() is None
    folder = tmp_path / "checkpoints" / "step-00000001"
    assert all(torch.equal(tensor, before[name]) for name, tensor in load_file(folder / "model.safetensors").items())
    assert any(torch.equal(tensor, momentum) for tensor in load_file(folder / "optimizer.safetensors").values())


def test_one_is_under_way_and_the_next_waits_for_it_aloud(background, gate, tmp_path, said, monkeypatch):
    monkeypatch.setattr(writer, "_WARN_WAIT_S", 0.05)
    model, optimizer = stepped()
    begin(background, 1, model, optimizer)
    threading.Timer(0.2, gate.set).start()
    begin(background, 2, model, optimizer)
    assert (tmp_path / "checkpoints" / "step-00000001" / "state.json").exists()
    assert background.finish() is None
    assert background.waited_s > 0.1
    (line,) = said
    assert "training waited" in line
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("last", [False, True])
def test_it_makes_way_for_training_until_there_is_none(background, monkeypatch, last):
    seen, before = [], os.getpriority(os.PRIO_PROCESS, 0)
    monkeypatch.setattr(writer, "write", lambda *_: seen.append(os.getpriority(os.PRIO_PROCESS, 0)))
    begin(background, 1, *stepped(), last=last)
    background.finish()
    assert seen == [before if last else min(before + 10, 19)]
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


@pytest.mark.parametrize("last", [False, True])
def test_a_full_disk_is_a_warning_or_where_nothing_follows_an_error(background, monkeypatch, said, tmp_path, last):
    monkeypatch.setattr(writer, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    model, optimizer = stepped()
    begin(background, 1, model, optimizer, last=last)
    failure = background.finish()
    assert "step-00000001: No space left on device" in str(failure)
    assert "MiB free" in str(failure)
    assert ["training goes on" in line for line in said] == ([] if last else [True])
    monkeypatch.undo()
    begin(background, 2, model, optimizer)
    assert background.finish() is None
    assert names(tmp_path) == ["step-00000002"]


@pytest.mark.parametrize("at_the_end", [False, True])
def test_what_is_no_fault_of_the_disk_ends_training(tmp_path, monkeypatch, at_the_end):
    """At the next checkpoint, or at the end."""
    monkeypatch.setattr(writer, "write", lambda *_: (_ for _ in ()).throw(ValueError("a mistake")))
    background = CheckpointWriter(tmp_path, keep=1, cpus=(), warn=pytest.fail, timeout_s=60)
    begin(background, 1, *stepped())
    deadline = time.monotonic() + 60
    while background.writing:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(ValueError, match="a mistake"):
        background.finish() if at_the_end else begin(background, 2, *stepped())


def test_storage_that_hangs_is_given_up(gate, tmp_path):
    model, optimizer = stepped()
    background = CheckpointWriter(tmp_path, keep=1, cpus=(), warn=pytest.fail, timeout_s=0.1)
    begin(background, 1, model, optimizer)
    assert "does the storage hang?" in str(background.finish())
    with pytest.raises(KnltrainError, match=r"not on disk after 0\.1 s"):
        begin(background, 2, model, optimizer)
    gate.set()
    deadline = time.monotonic() + 60
    while background.writing:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_who_interrupts_does_not_wait(gate, tmp_path):
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(
        tmp_path, keep=1, cpus=(), warn=pytest.fail, timeout_s=600
    ) as background:  # fmt: skip
        begin(background, 1, *stepped())
        raise KeyboardInterrupt
    assert background.writing
    gate.set()
    assert background.finish() is None
