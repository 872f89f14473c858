"""What is exported: read by the programs it is for, compared, and never there half."""

import importlib.util
import json
import os
import resource
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file

from knltrain import checkpoint
from knltrain.cli.main import main
from knltrain.config import RunConfig, override
from knltrain.errors import ConfigError, KnltrainError
from knltrain.models import model_of
from knltrain.models.alexnet import LocalResponseNorm
from knltrain.runlog.console import Console
from knltrain.training import trainer
from knltrain.training.evaluate import as_trained
from knltrain.weights import export
from knltrain.weights import load as weights

MODELS = {"alexnet_bn_small": 32, "resnet20": 32, "alexnet": 67, "alexnet_bn": 67, "resnet50": 32}
# A program is another for every network, but these two have nothing that the others lack.
PROGRAMS = [
    pytest.param(model, marks=pytest.mark.hand if model in ("alexnet_bn", "resnet50") else []) for model in MODELS
]
CLASSES = ["class0", "class1", "class2"]
QUIET = Console(silent=True)


@pytest.fixture(scope="module")
def runs(image_folder, tmp_path_factory):
    """Runs of a step, by model, made when they are asked for."""
    root, made = tmp_path_factory.mktemp("runs"), {}

    def run(model, **changes):
        if model not in made:
            made[model] = root / f"run{len(made)}"
            fields = {"data": str(image_folder), "out": str(made[model]), "model": model, "global_batch": 8,
                      "image_size": MODELS.get(model, 32), "max_steps": 1, "precision": "fp32", "engine": "eager",
                      "workers": 1, "optim.lr": 0.1}  # fmt: skip
            trainer.train(override(RunConfig(), fields), Console(silent=True))
        return made[model]

    return run


def network(run):
    """The run's network as it evaluates, and its configuration."""
    folder = checkpoint.newest(run)
    config = as_trained(RunConfig(), checkpoint.read_state(folder))
    model = model_of(config, len(CLASSES))
    checkpoint.load_weights(folder, model)
    return model.eval(), config


def images(config, count):
    return torch.randn(count, 3, config.image_size, config.image_size)


@torch.no_grad()
def assert_same_logits(run, logits_of):
    """For one image, and for more than were exported with."""
    model, config = network(run)
    for count in (1, 5):
        x = images(config, count)
        torch.testing.assert_close(logits_of(x), model(x), rtol=1e-4, atol=1e-5)


def needs_onnx():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            (pytest.fail if os.environ.get("KNLTRAIN_TEST_ALL") else pytest.skip)(
                f"{package} is not installed: pip install 'knltrain[export]'"
            )


def as_read(about):
    assert json.loads(about["classes"]) == CLASSES
    assert json.loads(about["mean"]) == [0.485, 0.456, 0.406]
    assert json.loads(about["std"]) == [0.229, 0.224, 0.225]
    return about["model"], int(about["image_size"]), int(about["resize"])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("format", ["safetensors", "pth"])
def test_state_dicts_are_plain(runs, tmp_path, model, format):
    run, file = runs(model), tmp_path / f"net.{format}"
    result = export.export(run, file, QUIET)
    assert (result["format"], result["model"], result["num_classes"]) == (format, model, 3)
    assert result["max_difference"] <= 1e-5
    assert result["bytes"] == file.stat().st_size
    state = load_file(file) if format == "safetensors" else torch.load(file, weights_only=True)
    expected = network(run)[0].state_dict()
    assert list(state) == list(expected) or format == "safetensors"
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name
        assert tensor.is_contiguous(), name
        assert tensor.dtype == (torch.int64 if name.endswith("num_batches_tracked") else torch.float32), name
    assert os.listdir(tmp_path) == [file.name]


def test_safetensors_says_what_it_is(runs, tmp_path):
    export.export(runs("alexnet_bn_small"), tmp_path / "net.safetensors", QUIET)
    with safe_open(tmp_path / "net.safetensors", "pt") as file:
        assert as_read(file.metadata()) == ("alexnet_bn_small", 32, 37)


@pytest.mark.parametrize("model", PROGRAMS)
def test_onnx_runs_in_onnxruntime(runs, tmp_path, model):
    needs_onnx()
    import onnx
    import onnxruntime

    run, file = runs(model), tmp_path / "net.onnx"
    result = export.export(run, file, QUIET)
    assert result["max_difference"] <= 1e-5 + 1e-4 * result["largest_logit"]
    onnx.checker.check_model(str(file), full_check=True)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert_same_logits(run, lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]))
    assert [i.name for i in session.get_inputs()] == ["images"]
    assert [o.name for o in session.get_outputs()] == ["logits"]
    assert as_read(session.get_modelmeta().custom_metadata_map)[0] == model
    assert os.listdir(tmp_path) == ["net.onnx"]


@pytest.mark.parametrize("model", PROGRAMS)
def test_pt2_is_a_program_of_torch(runs, tmp_path, model):
    run, file = runs(model), tmp_path / "net.pt2"
    export.export(run, file, QUIET)
    extra = {"knltrain.json": ""}
    program = torch.export.load(file, extra_files=extra).module()
    assert_same_logits(run, program)
    assert as_read(json.loads(extra["knltrain.json"]))[0] == model


def test_pt2_needs_nothing_of_this_package(runs, tmp_path):
    """Not even the operator of AlexNet's normalisation."""
    export.export(runs("alexnet"), tmp_path / "net.pt2", QUIET)
    code = (
        "import sys, torch; print(torch.export.load(sys.argv[1]).module()(torch.zeros(4, 3, 67, 67)).shape);"
        "assert not any(name.startswith('knltrain') for name in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "net.pt2"], capture_output=True, text=True, timeout=120
    )
    assert result.stdout == "torch.Size([4, 3])\n", result.stderr


def test_torchs_normalisation_is_ours():
    """Where the sums are large: on a trained network's activations the two could differ unseen."""
    model = torch.nn.Sequential(LocalResponseNorm())
    x = 300 * torch.randn(2, 7, 3, 3)
    torch.testing.assert_close(export._with_torch_operators(model)(x), LocalResponseNorm()(x))
    assert type(model[0]) is torch.nn.LocalResponseNorm


@pytest.mark.parametrize("name", ["resnet50", "torchvision:mobilenet_v3_small", "torchvision:googlenet"])
@pytest.mark.parametrize("format", ["safetensors", "pth"])
def test_torchvision_takes_it(torchvision, runs, tmp_path, name, format):
    """Under its own names, into a network that it made."""
    run, file = runs(name), tmp_path / f"net.{format}"
    export.export(run, file, QUIET)
    options = {"aux_logits": False, "init_weights": False} if "googlenet" in name else {}
    theirs = torchvision.models.get_model(name.removeprefix("torchvision:"), weights=None, num_classes=3, **options)
    theirs.load_state_dict(load_file(file) if format == "safetensors" else torch.load(file, weights_only=True))
    assert_same_logits(run, theirs.eval())


@pytest.mark.parametrize("format", ["safetensors", "pth"])
def test_a_run_starts_from_what_another_exported(runs, tmp_path, format):
    run, file = runs("alexnet_bn_small"), tmp_path / f"net.{format}"
    export.export(run, file, QUIET)
    model = model_of(network(run)[1], 3)
    assert weights.load(file, model) == []
    assert_same_logits(run, model.eval())


@pytest.mark.parametrize("format", export.FORMATS)
def test_the_command(runs, tmp_path, format, knltrain):
    """The name is free where the format is given, and what torch and others say of themselves is not passed on."""
    if format == "onnx":
        needs_onnx()
    result = knltrain("export", runs("alexnet_bn_small"), tmp_path / "net.bin", "--format", format, "--json")
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert (said["format"], said["bytes"]) == (format, (tmp_path / "net.bin").stat().st_size)
    (line,) = result.stderr.splitlines()
    assert "net.bin: alexnet_bn_small of" in line
    assert "logits differ by" in line


@pytest.mark.parametrize(
    "name, words",
    [
        ("there.pth", "there.pth exists already; give another name"),
        ("link.pth", "link.pth exists already"),
        ("folder.onnx", "folder.onnx exists already"),
        ("net.h5", r"its suffix is not a format; use \.safetensors, \.pth, \.onnx, \.pt2, or give --format"),
        ("net", "its suffix is not a format"),
        ("nowhere/net.pth", "no folder .*nowhere"),
    ],
)
def test_refusals(runs, tmp_path, name, words):
    (tmp_path / "there.pth").write_text("mine")
    (tmp_path / "link.pth").symlink_to("nowhere")
    (tmp_path / "folder.onnx").mkdir()
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ConfigError, match=words):
        export.export(runs("alexnet_bn_small"), tmp_path / name, QUIET)
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "there.pth").read_text() == "mine"


def test_no_checkpoint_is_one_line(tmp_path):
    result = CliRunner().invoke(main, ["export", str(tmp_path), str(tmp_path / "net.pth")])
    assert result.exit_code == 1
    assert result.stderr == f"knltrain: {tmp_path}: no checkpoint, and no run that has one\n"


def test_missing_packages_are_named(runs, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    with pytest.raises(ConfigError, match=r"onnxscript not installed; pip install 'knltrain\[export\]'"):
        export.export(runs("alexnet_bn_small"), tmp_path / "net.onnx", QUIET)


@pytest.mark.parametrize("wrong", [0.01, float("nan"), float("inf")])
@pytest.mark.parametrize("format", ["pth", "pt2"])
def test_a_file_that_computes_something_else_is_removed(runs, tmp_path, monkeypatch, wrong, format):
    original = export._read

    def read(*arguments):
        logits = original(*arguments)
        logits[-1, -1] += wrong
        return logits

    monkeypatch.setattr(export, "_read", read)
    with pytest.raises(KnltrainError, match=r"gives other logits than .*: they differ by .*; nothing was written"):
        export.export(runs("alexnet_bn_small"), tmp_path / f"net.{format}", QUIET)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (RuntimeError("not\nfor people"), "alexnet_bn_small cannot be written as pth: not$"),
        (AssertionError(), "cannot be written as pth: AssertionError$"),
    ],
)
def test_what_fails_leaves_nothing(runs, tmp_path, monkeypatch, error, words):
    def write(model, images, path, *_):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(export, "_write", write)
    with pytest.raises((KnltrainError, OSError), match=words):
        export.export(runs("alexnet_bn_small"), tmp_path / "net.pth", QUIET)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("format", ["pth", "safetensors", "pt2"])
def test_a_full_disk_is_one_line_with_what_is_needed(runs, tmp_path, monkeypatch, format):
    """torch's writer of pt2 ended the process there."""
    folder = runs("alexnet_bn_small")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            export.export(folder, tmp_path / f"net.{format}", QUIET)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.value.filename == str(tmp_path / f"net.{format}")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("format", ["pth", "safetensors"])
@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_umask_says_who_may_read_a_file(runs, tmp_path, format, mask, mode):
    folder, before = runs("alexnet_bn_small"), os.umask(mask)
    try:
        export.export(folder, tmp_path / f"net.{format}", QUIET)
    finally:
        os.umask(before)
    assert (tmp_path / f"net.{format}").stat().st_mode & 0o777 == mode


def test_a_network_too_large_for_onnx(runs, tmp_path, monkeypatch):
    needs_onnx()
    monkeypatch.setattr(export, "_MAX_ONNX_BYTES", 1000)
    with pytest.raises(KnltrainError, match=r"cannot be written as onnx: its weights are 0\.0 GiB.*use pt2"):
        export.export(runs("alexnet_bn_small"), tmp_path / "net.onnx", QUIET)
    assert os.listdir(tmp_path) == []
