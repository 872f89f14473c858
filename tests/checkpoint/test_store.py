"""Checkpoints come back as they were written, and what is not whole is noticed."""

import errno
import json
import os
import shutil

import pytest
import torch
from checkpoint.state import CONFIG, META, names, save, stepped
from disk import Told, record
from safetensors.torch import load_file

from knltrain import checkpoint
from knltrain.checkpoint import Progress, store
from knltrain.config import OptimConfig
from knltrain.errors import KnltrainError
from knltrain.models import model_of
from knltrain.ops.native import load_error
from knltrain.optim import build_optimizer
from knltrain.training.engine import build_engine

OPTIMIZERS = [OptimConfig(), OptimConfig(name="sgd", variant="nesterov")]
FILES = ["model.safetensors", "optimizer.safetensors", "state.json"]


def assert_same_state(model, other):
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize("optim", OPTIMIZERS, ids=["lars", "sgd"])
def test_what_is_saved_comes_back(tmp_path, optim):
    model, optimizer = stepped(optim)
    folder = save(tmp_path, 7, model, optimizer)
    assert folder.name == "step-00000007"
    other, fresh = stepped(optim, seed=1)
    state = checkpoint.restore(folder, other, fresh)
    assert_same_state(model, other)
    saved, loaded = (o.state_dict()["state"] for o in (optimizer, fresh))
    assert saved.keys() == loaded.keys()
    for index, entries in saved.items():
        assert torch.equal(entries["momentum_buffer"], loaded[index]["momentum_buffer"])
    assert checkpoint.progress_of(state) == Progress(7, best_top1=50.0, wall_s=1.5)
    assert {name: state[name] for name in META} == META


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_live_engine_takes_a_checkpoint_as_a_new_one_does(tmp_path, precision):
    """Float32 weights and their bf16 working copies alike."""
    if load_error():
        pytest.skip(f"no native kernels: {load_error()}")
    folder = save(tmp_path, 1, *stepped())
    live = build_engine("fused", precision, *stepped(seed=1))
    checkpoint.restore(folder, live.model, live.optimizer)
    model, optimizer = stepped(seed=2)
    checkpoint.restore(folder, model, optimizer)
    new = build_engine("fused", precision, model, optimizer)
    assert_same_state(new.model, live.model)
    assert all(torch.equal(tensor, live.state_dict()[name]) for name, tensor in new.state_dict().items())
    assert all(torch.equal(tensor, live.state_dict()[name]) for name, tensor in load_file(folder / FILES[0]).items())


@pytest.mark.parametrize("rank, world_size, expected", [(0, 2, 1.0), (1, 2, 2.0), (0, 3, 0.0), (0, 1, 0.0)])
def test_ranks_get_their_own_running_statistics_back(tmp_path, rank, world_size, expected):
    """With another number of ranks, all get the average, which is with the weights."""
    model, optimizer = stepped()
    name = "features.norm1.running_mean"
    model.state_dict()[name].fill_(0)
    width = len(model.state_dict()[name])
    folder = save(tmp_path, 1, model, optimizer, statistics={name: torch.tensor([[1.0], [2.0]]).expand(2, width)})
    other, fresh = stepped(seed=1)
    checkpoint.restore(folder, other, fresh, rank=rank, world_size=world_size)
    assert other.state_dict()[name].unique().tolist() == [expected]


def test_the_last_and_the_best_are_kept_and_nothing_else_lies_around(tmp_path):
    model, optimizer = stepped()
    for step, top1 in ((1, 20.0), (2, 60.0), (3, 60.0), (4, 30.0), (5, None), (6, 50.0), (7, 40.0)):
        store.remove_old(tmp_path, save(tmp_path, step, model, optimizer, top1=top1), keep=2)
    assert names(tmp_path) == ["step-00000003", "step-00000006", "step-00000007"]
    assert checkpoint.find(tmp_path, "auto", pytest.fail)[0].name == "step-00000007"
    assert checkpoint.find(tmp_path, "never", pytest.fail) == (None, [])
    assert checkpoint.find(tmp_path, str(tmp_path), pytest.fail)[0].name == "step-00000007"
    assert checkpoint.find(tmp_path / "empty", "auto", pytest.fail) == (None, [])


def test_a_run_that_went_back_leaves_its_old_way(tmp_path):
    """Otherwise the next resume would take a checkpoint of that way for the newest."""
    model, optimizer = stepped()
    for step in (2, 4, 6):
        save(tmp_path, step, model, optimizer)
    store.remove_old(tmp_path, save(tmp_path, 3, model, optimizer), keep=5)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_a_checkpoint_replaces_one_of_its_name(tmp_path):
    save(tmp_path, 1, *stepped())
    model, optimizer = stepped(seed=1)
    folder = save(tmp_path, 1, model, optimizer)
    other, fresh = stepped(seed=2)
    checkpoint.restore(folder, other, fresh)
    assert_same_state(model, other)
    assert names(tmp_path) == ["step-00000001"]


def test_a_checkpoint_gets_its_name_when_it_is_on_disk(tmp_path, monkeypatch):
    """A power cut at any moment leaves a whole one of that name, or none."""
    told = record(monkeypatch)
    folder = save(tmp_path, 1, *stepped())
    aside = folder.with_name(".step-00000001.tmp")
    contents, after = told[: len(FILES)], told[len(FILES) :]
    assert {(kind, path): holds for kind, path, holds in contents} == {
        ("sync", aside / name): (folder / name).read_bytes() for name in FILES
    }
    assert after == [
        Told("sync", aside, set(FILES)),
        Told("name", folder, set(FILES)),
        Told("sync", folder.parent, {folder.name}),
        Told("sync", tmp_path, {"checkpoints"}),
    ]


def test_a_failed_write_leaves_the_older_checkpoint_and_no_rubbish(tmp_path, monkeypatch):
    model, optimizer = stepped()
    save(tmp_path, 1, model, optimizer)

    def full(path, parts):
        path.write_bytes(b"half of")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write_file", full)
    for step in (1, 2):
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, step, model, optimizer)
    assert names(tmp_path) == ["step-00000001"]
    checkpoint.verify(tmp_path / "checkpoints" / "step-00000001")


def damage(path, how):
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "cut short":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "garbage":
        path.write_bytes(os.urandom(len(content)))
    elif how == "one bit":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif how == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.unlink()
        os.mkfifo(path)


@pytest.mark.parametrize("how", ["missing", "cut short", "empty", "garbage", "one bit", "folder", "pipe"])
@pytest.mark.parametrize("file", FILES)
def test_damage_is_passed_over_with_a_line_and_refused_where_named(tmp_path, file, how):
    model, optimizer = stepped()
    save(tmp_path, 1, model, optimizer)
    damaged = save(tmp_path, 2, model, optimizer)
    damage(damaged / file, how)
    said = []
    assert checkpoint.find(tmp_path, "auto", said.append)[0].name == "step-00000001"
    (line,) = said
    assert str(damaged) in line
    assert file in line
    assert "\n" not in line
    with pytest.raises(KnltrainError) as raised:
        checkpoint.find(tmp_path, str(damaged), pytest.fail)
    assert "\n" not in str(raised.value)
    assert str(damaged) in str(raised.value)


def test_no_whole_checkpoint_among_damaged_ones_is_an_error(tmp_path):
    folder = save(tmp_path, 1, *stepped())
    damage(folder / FILES[0], "empty")
    said = []
    with pytest.raises(KnltrainError, match="none of its 1 checkpoints is intact"):
        checkpoint.find(tmp_path, "auto", said.append)
    assert "has 0 of" in said[0]


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
    save(tmp_path, 1, *stepped())
    shutil.copytree(tmp_path / "checkpoints" / "step-00000001", tmp_path / "checkpoints" / ".step-00000002.tmp")
    checkpoint.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"step": "seven"}, "Expected `int`"),
        ({"classes": None}, "Expected `array`"),
        ({"files": {}}, "lists other files"),
        ({"files": {"../../escape": {"bytes": 1, "crc32": "0"}}}, "lists other files"),
    ],
)
def test_a_state_that_no_checkpoint_wrote_is_refused(tmp_path, changes, words):
    """Its own checksum is right."""
    folder = save(tmp_path, 1, *stepped())
    state = {**checkpoint.read_state(folder), **changes}
    (folder / "state.json").write_text(store.seal(state))
    with pytest.raises(KnltrainError, match=words):
        checkpoint.verify(folder)


def test_another_networks_checkpoint_is_refused(tmp_path):
    folder = save(tmp_path, 1, *stepped())
    other = model_of(CONFIG, 12)
    with pytest.raises(KnltrainError, match="another network"):
        checkpoint.load_weights(folder, other)
    with pytest.raises(KnltrainError, match="another network"):
        checkpoint.load_optimizer(folder, build_optimizer(other, OptimConfig()))


def test_the_folder_of_a_runs_checkpoints_names_the_run(tmp_path):
    folder = save(tmp_path, 1, *stepped())
    assert (
        checkpoint.newest(tmp_path / "checkpoints", pytest.fail) == checkpoint.newest(tmp_path, pytest.fail) == folder
    )


def test_a_checkpoint_that_cannot_be_read_now_is_not_removed(tmp_path, monkeypatch):
    """It may be the best."""
    model, optimizer = stepped()
    for step in (1, 2, 3):
        save(tmp_path, step, model, optimizer, top1=10.0 * step)
    original = os.open

    def open_(path, *arguments, **options):
        if "step-00000001" in str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return original(path, *arguments, **options)

    monkeypatch.setattr(os, "open", open_)
    store.remove_old(tmp_path, checkpoint.folder_of(tmp_path, 3), keep=1)
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_no_checkpoint_where_one_was_named(tmp_path):
    with pytest.raises(KnltrainError, match="no checkpoint"):
        checkpoint.find(tmp_path, str(tmp_path / "nowhere"), pytest.fail)


def test_state_is_plain_json(tmp_path):
    assert json.loads((save(tmp_path, 1, *stepped()) / "state.json").read_text())["step"] == 1
