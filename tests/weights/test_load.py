"""Starting from weights in files: of this project, of torchvision's kind, and of people who mean harm."""

import argparse
import errno
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from knltrain.comm.group import Group
from knltrain.config import OptimConfig, RunConfig, override
from knltrain.config.checks import unused_field_warnings
from knltrain.errors import ConfigError, KnltrainError
from knltrain.launch.world import Ranks
from knltrain.models import model_of
from knltrain.ops.native import load_error
from knltrain.optim import build_optimizer
from knltrain.runlog.console import Console
from knltrain.training import trainer
from knltrain.weights import load as weights

CONFIG = RunConfig(model="alexnet_bn_small", image_size=32)
HEAD = ["classifier.fc6.weight", "classifier.fc6.bias"]


def network(classes=10, seed=0):
    torch.manual_seed(seed)
    return model_of(CONFIG, classes)


@pytest.fixture(scope="module")
def trained():
    """A state dict that no fresh network has, plain and contiguous as others write it."""
    model = network(seed=1)
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(8, 3, 32, 32))
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


def same(state, expected):
    assert state.keys() == expected.keys()
    return all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def training_references(state):
    """As torchvision's reference/classification/train.py leaves it."""
    optimizer = build_optimizer(network(), OptimConfig())
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [30, 60])
    return {"model": state, "optimizer": optimizer.state_dict(), "lr_scheduler": schedule.state_dict(), "epoch": 3,
            "args": argparse.Namespace(lr=0.1, output_dir="."), "scaler": None}  # fmt: skip


WRITTEN = {
    "plain.safetensors": lambda state, path: save_file(state, path),
    "plain.pth": torch.save,
    "before-2020.pth": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "data-parallel.pt": lambda state, path: torch.save({f"module.{k}": v for k, v in state.items()}, path),
    "reference.pth": lambda state, path: torch.save(training_references(state), path),
    "lightning.ckpt": lambda state, path: torch.save(
        {"state_dict": {f"model.{k}": v for k, v in state.items()}, "epoch": 1, "hyper_parameters": {"lr": 0.1}}, path
    ),
    "compiled-in-parallel.pth": lambda state, path: torch.save(
        {"state_dict": {f"module._orig_mod.{k}": v for k, v in state.items()}}, path
    ),
    "compiled-average.pth": lambda state, path: torch.save(
        {"n_averaged": torch.tensor(3), **{f"module._orig_mod.{k}": v for k, v in state.items()}}, path
    ),
    "parts-in-parallel.pth": lambda state, path: torch.save(
        {k.replace("features.", "features.module."): v for k, v in state.items()}, path
    ),
    "deepspeed.pt": lambda state, path: torch.save({"module": state, "global_steps": 7}, path),
    "blog.pt": lambda state, path: torch.save({"model_state_dict": state, "epoch": 3, "loss": torch.tensor(0.5)}, path),
    "kuangliu.pth": lambda state, path: torch.save({"net": {f"module.{k}": v for k, v in state.items()}}, path),
    "with-a-loss.ckpt": lambda state, path: torch.save(
        {"state_dict": {**{f"model.{k}": v for k, v in state.items()}, "criterion.weight": torch.ones(10)}}, path
    ),
    "with-a-loss.pth": lambda state, path: torch.save(
        {"model": state, "criterion": {"weight": torch.ones(10)}, "rng": torch.ones(3)}, path
    ),
    "safetensors-by-content.bin": lambda state, path: save_file(state, path),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_every_writer_is_read(trained, tmp_path, name):
    WRITTEN[name](trained, tmp_path / name)
    model = network()
    assert weights.load(tmp_path / name, model) == []
    assert same(model.state_dict(), trained)
    assert model.features.conv2.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "write, places",
    [
        (lambda state: {"model": state, "model_ema": state}, "'model', 'model_ema'"),
        (lambda state: {"state_dict": state, "state_dict_ema": {f"module.{k}": v for k, v in state.items()}},
         "'state_dict', 'state_dict_ema'"),
        (lambda state: {"state_dict": {f"{p}.{k}": v for k, v in state.items() for p in ("model", "ema_model")}},
         "'state_dict: ema_model.', 'state_dict: model.'"),
    ],
)  # fmt: skip
def test_of_several_networks_none_is_guessed(trained, tmp_path, write, places):
    torch.save(write(trained), tmp_path / "two.pth")
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(KnltrainError) as raised:
        weights.load(tmp_path / "two.pth", model)
    assert f"two.pth holds several networks ({places}); save the one that is meant" in str(raised.value)
    assert same(model.state_dict(), before)


def test_a_file_that_lacks_something_is_no_file_of_several_networks(tmp_path):
    """Each block of a residual network ends in the same names as the network itself begins with."""
    model = pytest.importorskip("torchvision", exc_type=ImportError).models.resnet18(num_classes=12)
    state = model.state_dict()
    headless = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    without_statistics = {name: tensor for name, tensor in state.items() if "running_" not in name}
    for write, lacking in ((headless, "'fc.weight', 'fc.bias'"), (without_statistics, "'bn1.running_mean'")):
        torch.save({f"module.{name}": tensor for name, tensor in write.items()}, tmp_path / "part.pth")
        with pytest.raises(KnltrainError, match=f"part.pth is of another network: missing {lacking}"):
            weights.load(tmp_path / "part.pth", model)


def test_a_file_that_cannot_be_read_now_is_not_damaged(trained, tmp_path, monkeypatch):
    def refuse(path, *_):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)

    for name in ("plain.safetensors", "plain.pth"):
        WRITTEN[name](trained, tmp_path / name)
    monkeypatch.setattr(weights, "open_regular", refuse)
    for name in ("plain.safetensors", "plain.pth"):
        with pytest.raises(OSError, match=f"Stale file handle: .*{name}"):
            weights.load(tmp_path / name, network())


def test_what_older_and_smaller_files_have(trained, tmp_path):
    """Files of before 2018 have no counter of batches; weights may be stored in halves."""
    state = {name: tensor.half() for name, tensor in trained.items() if not name.endswith(".num_batches_tracked")}
    torch.save(state, tmp_path / "old.pth")
    model = network()
    weights.load(tmp_path / "old.pth", model)
    got = model.state_dict()
    assert all(torch.equal(got[name], tensor.float()) for name, tensor in state.items())
    assert got["features.norm1.num_batches_tracked"] == 0


def test_torchvisions_resnet50(torchvision, tmp_path):
    theirs = torchvision.models.resnet50(num_classes=5)
    torch.save(theirs.state_dict(), tmp_path / "resnet50.pth")
    model = model_of(RunConfig(model="resnet50", image_size=32), 5)
    assert weights.load(tmp_path / "resnet50.pth", model) == []
    assert same(model.state_dict(), theirs.state_dict())


def test_another_number_of_classes_starts_the_last_layer_fresh(trained, tmp_path):
    save_file(trained, tmp_path / "ten.safetensors")
    model = network(classes=7)
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert weights.load(tmp_path / "ten.safetensors", model) == HEAD
    got = model.state_dict()
    assert same({n: got[n] for n in HEAD}, {n: fresh[n] for n in HEAD})
    assert same({n: t for n, t in got.items() if n not in HEAD}, {n: t for n, t in trained.items() if n not in HEAD})


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s.pop("features.conv2.weight"), r"missing 'features\.conv2\.weight'$"),
        (lambda s: s.pop(HEAD[0]), r"missing 'classifier\.fc6\.weight'$"),
        (lambda s: s.update(extra=torch.ones(1)), "unknown 'extra'$"),
        (lambda s: s.update({"two\nlines" * 50: torch.ones(1)}), r"unknown 'two\\nlinestwo.{,100}$"),
        (
            lambda s: s.update({"features.conv1.weight": torch.ones(32, 3, 5, 5)}),
            r"of another shape 'features\.conv1\.weight' 32x3x5x5 instead of 32x3x3x3$",
        ),
        (lambda s: s.update({HEAD[0]: torch.ones(9, 1024)}), "of another shape.*9x1024 instead of 10x1024$"),
        (
            lambda s: s.update({HEAD[0]: torch.ones(9, 4), HEAD[1]: torch.ones(9)}),
            "of another shape.*9x4 instead of 10x1024",
        ),
        (lambda s: s.update({HEAD[1]: torch.tensor(0.0)}), "of another shape.*a number instead of 10$"),
        (lambda s: [s.pop(n) for n in list(s) if "conv" in n], r"missing 'features\.conv1\.weight'.* and 7 more$"),
        (
            lambda s: s["features.norm3.bias"][0].fill_(float("nan")),
            r"'features\.norm3\.bias' contains NaN or Inf",
        ),
        (lambda s: s["features.conv3.bias"][1].fill_(float("inf")), "NaN or Inf"),
        (lambda s: s.update({HEAD[1]: torch.ones(10, dtype=torch.int32)}), "torch.int32, not torch.float32"),
        (lambda s: s.update({HEAD[1]: torch.ones(10, dtype=torch.complex64)}), "complex64, not torch.float32"),
    ],
)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_another_networks_file_is_refused_and_changes_nothing(trained, tmp_path, change, words, suffix):
    state = {name: tensor.clone() for name, tensor in trained.items()}
    change(state)
    file = tmp_path / f"other{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(state, file)
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(KnltrainError, match=words) as raised:
        weights.load(file, model)
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert same(model.state_dict(), before)


class Harm:
    """What a pickle can do where it is let: here, write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("name", ["harm.pth", "harm.safetensors", "harm.bin"])
@pytest.mark.parametrize("kind", ["beside", "instead", "old format", "bare pickle"])
def test_a_pickle_is_never_executed(trained, tmp_path, name, kind):
    file, trace = tmp_path / name, tmp_path / "executed"
    state = {**trained, "features.conv1.weight": Harm(trace)} if kind == "instead" else trained
    content = {"model": state, "args": Harm(trace)} if kind in ("beside", "old format") else state
    if kind == "bare pickle":
        file.write_bytes(pickle.dumps(Harm(trace)))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=kind != "old format")
    with pytest.raises(KnltrainError) as raised:
        weights.load(file, network())
    assert "\n" not in str(raised.value)
    assert str(file) in str(raised.value)
    if name != "harm.safetensors" and kind != "bare pickle":
        assert "'posix.system' beside tensors, which is not executed" in str(raised.value)
    assert not trace.exists()
    # It would have been; under a name that no torch takes for safetensors.
    file = file.rename(tmp_path / "harm")
    torch.load(file, weights_only=False) if kind != "bare pickle" else pickle.loads(file.read_bytes())
    assert trace.exists()


@pytest.mark.parametrize(
    "write, words",
    [
        (lambda path, state: path.write_bytes(b""), "cannot be read"),
        (lambda path, state: path.write_bytes(b"garbage" * 100), "cannot be read"),
        (lambda path, state: path.write_bytes(path.read_bytes()[:5000]), "cannot be read"),
        (lambda path, state: path.unlink(), "no such file"),
        (lambda path, state: (path.unlink(), path.mkdir()), "no checkpoint"),
        (lambda path, state: (path.unlink(), os.mkfifo(path)), "neither a file nor"),
    ],
)
@pytest.mark.parametrize("name", ["plain.safetensors", "plain.pth", "before-2020.pth"])
def test_damage_is_one_line(trained, tmp_path, name, write, words):
    file = tmp_path / name
    WRITTEN[name](trained, file)
    write(file, trained)
    with pytest.raises(KnltrainError, match=words) as raised:
        weights.load(weights.find(file, print), network())
    assert "\n" not in str(raised.value)
    assert str(file) in str(raised.value)


@pytest.mark.parametrize(
    "content",
    [[1, 2], {}, 3, {"a": 1}, {"state_dict": {"a": {"b": torch.ones(1)}}}, {1: torch.ones(1)},
     {"a": torch.ones(2, 2).to_sparse()}, {"a": torch.ones(1, device="meta")}, torch.ones(3)],
    ids=str,
)  # fmt: skip
def test_what_is_no_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(KnltrainError, match="no state dict") as raised:
        weights.load(tmp_path / "x.pth", network())
    assert "\n" not in str(raised.value)


class Others(Group):
    """Ranks of which the others answer as they are told to."""

    def __init__(self, rank, *, same):
        super().__init__(Ranks("none", 0, 1, 0, 1))
        self.rank, self.world_size, self.same, self.calls = rank, 2, same, []

    def barrier(self):
        self.calls.append("barrier")

    def gather(self, values):
        self.calls.append("gather")
        return torch.stack([values, values if self.same else values.flip(0)])


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_read_different_files_stop(trained, tmp_path, rank, monkeypatch):
    file = tmp_path / "a.safetensors"
    save_file(trained, file)
    config, load = override(CONFIG, {"init_from": str(file)}), weights.load
    group = Others(rank, same=True)
    monkeypatch.setattr(weights, "load", lambda *a: group.calls.append("load") or load(*a))
    said = weights.initialize(network(), config, tmp_path, group, Console(silent=True), resumed=False)
    assert said["fresh"] == []
    assert group.calls == (["load", "barrier", "gather"] if rank == 0 else ["barrier", "load", "gather"])
    with pytest.raises(KnltrainError, match="ranks read different files"):
        weights.initialize(network(), config, tmp_path, Others(rank, same=False), Console(silent=True), resumed=False)


# The run -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(image_folder, tmp_path, trained, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    save_file(trained, tmp_path / "start.safetensors")
    return override(
        CONFIG,
        {
            "data": str(image_folder),
            "out": str(tmp_path / "run"),
            "init_from": str(tmp_path / "start.safetensors"),
            "global_batch": 16,
            "epochs": 3,
            "max_steps": 1,
            "precision": "fp32",
            "engine": "eager",
            "workers": 2,
            # A step that changes nothing worth speaking of.
            "optim.lr": 1e-9,
            "optim.weight_decay": 0.0,
        },
    )


def run(config, **changes):
    return trainer.train(override(config, changes), Console(silent=True))


def record(out):
    return json.loads(Path(out, "config.json").read_text())["init_from"]


def learnt(out):
    return load_file(max(Path(out, "checkpoints").iterdir()) / "model.safetensors")


@pytest.mark.parametrize("engine, precision", [("eager", "fp32"), ("fused", "fp32"), ("fused", "bf16")])
def test_a_run_starts_from_the_file(config, trained, engine, precision, capsys):
    """Its float32 weights, whatever the engine works on; the last layer is fresh, for there are three classes."""
    if engine == "fused" and load_error():
        pytest.skip(f"no native kernels: {load_error()}")
    changes = {"engine": engine, "precision": precision, "force_bf16": True}
    trainer.train(override(config, changes), Console())
    assert "classifier.fc6.weight and classifier.fc6.bias start fresh: other classes" in capsys.readouterr().out
    got = learnt(config.out)
    for name, tensor in trained.items():
        if name.endswith((".weight", ".bias")) and name not in HEAD:
            torch.testing.assert_close(got[name], tensor, rtol=1e-6, atol=1e-7, msg=name)
    said = record(config.out)
    assert (said["file"], said["fresh"]) == (config.init_from, HEAD)
    assert len(said["sha256"]) == 64


def test_the_folder_of_a_run_or_of_a_checkpoint(config):
    run(config, max_steps=2)
    newest = Path(config.out, "checkpoints", "step-00000002")
    assert weights.find(Path(config.out), print) == weights.find(newest, print) == newest / "model.safetensors"


def test_a_run_of_this_project_goes_on_as_another(config, trained, tmp_path):
    run(config, max_steps=2)
    second = {"out": str(tmp_path / "second"), "init_from": config.out, "max_steps": 1}
    run(config, **second)
    first, got = learnt(config.out), learnt(second["out"])
    for name in HEAD:
        torch.testing.assert_close(got[name], first[name], rtol=1e-5, atol=1e-7)
    assert record(second["out"])["file"].endswith("step-00000002/model.safetensors")
    assert record(second["out"])["fresh"] == []
    # The first run may go on, and its checkpoints come and go: the second has its weights.
    run(config, max_steps=4)
    assert run(config, **{**second, "max_steps": 2})[0]["steps"] == 2


def test_it_is_part_of_the_configuration(config, trained, tmp_path):
    run(config)
    with pytest.raises(ConfigError, match=r"another configuration \(init_from: .*start.safetensors -> \)"):
        run(config, init_from="")
    before = record(config.out)
    assert run(config, max_steps=2)[0]["steps"] == 2
    assert record(config.out) == before
    save_file({**trained, HEAD[1]: trained[HEAD[1]] + 1}, config.init_from)
    with pytest.raises(ConfigError, match=r"started from another .*start.safetensors; give another --out"):
        run(config, max_steps=3)
    Path(config.init_from).unlink()
    assert run(config, max_steps=3)[0]["steps"] == 3
    assert record(config.out) == before


def test_a_checkpoint_of_another_run_wins_aloud(config, tmp_path, capsys):
    run(config)
    trainer.train(override(config, {"out": str(tmp_path / "branch"), "resume": config.out, "max_steps": 2}), Console())
    said = capsys.readouterr().out
    assert "init-from has no effect: the run resumes from a checkpoint" in said
    assert "starts from" not in said
    assert record(tmp_path / "branch") is None


def test_a_file_that_does_not_fit_leaves_no_run(config, tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(KnltrainError, match="of another network"):
        run(config, init_from=str(tmp_path / "other.safetensors"))
    with pytest.raises(KnltrainError, match="no such file"):
        run(config, init_from=str(tmp_path / "nowhere.safetensors"))
    assert not Path(config.out, "config.json").exists()


def test_a_start_over_reads_the_file_again(config, tmp_path):
    """After a crash before the first checkpoint, or in a folder whose checkpoints were removed."""
    run(config)
    shutil.rmtree(Path(config.out, "checkpoints"))
    assert run(config)[0]["steps"] == 1
    assert record(config.out)["file"] == config.init_from


def test_gamma_zero_has_no_effect_on_weights_from_a_file():
    config = override(RunConfig(), {"model": "resnet50", "init_from": "a.pth", "zero_init_residual": True})
    assert unused_field_warnings(config, ["zero_init_residual"])[0].startswith(
        "zero-init-residual has no effect without"
    )
    assert not unused_field_warnings(override(config, {"init_from": ""}), ["zero_init_residual"])
