import json

import pytest
import torch

from knltrain import checkpoint
from knltrain.checkpoint import Progress
from knltrain.config import OptimConfig, RunConfig
from knltrain.errors import KnltrainError
from knltrain.models import model_of
from knltrain.optim import build_optimizer

CONFIG = RunConfig(model="alexnet_bn_small", image_size=32)
OPTIMIZERS = [OptimConfig(), OptimConfig(name="sgd", variant="nesterov")]


def stepped(optim=OPTIMIZERS[0], seed=0):
    torch.manual_seed(seed)
    model = model_of(CONFIG, 10)
    optimizer = build_optimizer(model, optim)
    model(torch.randn(8, 3, 32, 32)).square().mean().backward()
    optimizer.step()
    return model, optimizer


def save(out, step, model, optimizer, keep=2):
    progress = Progress(step, best_top1=50.0, wall_s=1.5)
    return checkpoint.save(out, progress, model.state_dict(), optimizer, meta={"a": 1}, keep=keep)


@pytest.mark.parametrize("optim", OPTIMIZERS, ids=["lars", "sgd"])
def test_what_is_saved_comes_back(tmp_path, optim):
    model, optimizer = stepped(optim)
    folder = save(tmp_path, 7, model, optimizer)
    assert folder.name == "step-00000007"
    other, fresh = stepped(optim, seed=1)
    checkpoint.load_weights(folder, other)
    checkpoint.load_optimizer(folder, fresh)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    saved, loaded = (o.state_dict()["state"] for o in (optimizer, fresh))
    assert saved.keys() == loaded.keys()
    for index, state in saved.items():
        assert torch.equal(state["momentum_buffer"], loaded[index]["momentum_buffer"])
    assert checkpoint.read_state(folder) == {"step": 7, "evaluated_step": 0, "best_top1": 50.0, "wall_s": 1.5, "a": 1}
    assert checkpoint.progress_of(checkpoint.read_state(folder)) == Progress(7, best_top1=50.0, wall_s=1.5)


def test_the_newest_are_kept_and_nothing_else_lies_around(tmp_path):
    model, optimizer = stepped()
    for step in (1, 2, 10, 9):
        save(tmp_path, step, model, optimizer)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000009", "step-00000010"]
    assert checkpoint.find(tmp_path, "auto").name == "step-00000010"
    assert checkpoint.find(tmp_path, "never") is None
    assert checkpoint.find(tmp_path, str(tmp_path)).name == "step-00000010"
    assert checkpoint.find(tmp_path / "empty", "auto") is None


def test_a_failed_write_leaves_the_older_checkpoint_and_no_rubbish(tmp_path, monkeypatch):
    model, optimizer = stepped()
    save(tmp_path, 1, model, optimizer)
    monkeypatch.setattr(
        checkpoint, "save_file", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(KnltrainError, match="No space left"):
        save(tmp_path, 2, model, optimizer)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("content", [b"", b"garbage", None])
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_damage_is_one_line(tmp_path, file, content):
    model, optimizer = stepped()
    folder = save(tmp_path, 1, model, optimizer)
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    with pytest.raises(KnltrainError) as raised:
        checkpoint.read_state(folder)
        checkpoint.load_weights(folder, model)
        checkpoint.load_optimizer(folder, optimizer)
    assert "\n" not in str(raised.value)
    assert str(folder) in str(raised.value)


def test_another_networks_checkpoint_is_refused(tmp_path):
    model, optimizer = stepped()
    folder = save(tmp_path, 1, model, optimizer)
    other = model_of(CONFIG, 12)
    with pytest.raises(KnltrainError, match="another network"):
        checkpoint.load_weights(folder, other)
    with pytest.raises(KnltrainError, match="another network"):
        checkpoint.load_optimizer(folder, build_optimizer(other, OptimConfig()))


def test_no_checkpoint_where_one_was_named(tmp_path):
    with pytest.raises(KnltrainError, match="no checkpoint"):
        checkpoint.find(tmp_path, str(tmp_path / "nowhere"))


def test_state_is_plain_json(tmp_path):
    model, optimizer = stepped()
    assert json.loads((save(tmp_path, 1, model, optimizer) / "state.json").read_text())["step"] == 1
