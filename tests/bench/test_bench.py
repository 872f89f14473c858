"""What bench measures is what it says, and in the process and the order that it says. No time is judged."""

import dataclasses
import itertools
import json
import os
import signal
import time
from collections import OrderedDict

import pytest
import torch
from click.testing import CliRunner
from small_networks import why_no_engine
from torch import nn

from knltrain.bench import bench, layers
from knltrain.bench import step as step_module
from knltrain.bench.compare import ENGINES, _add_ratios, _split, compare
from knltrain.bench.process import Process
from knltrain.bench.step import StepTime, TrainingStep, spread, summary
from knltrain.bench.sweep import draw
from knltrain.cli.main import main
from knltrain.config import AugmentConfig, RunConfig
from knltrain.data.datasets import open_part
from knltrain.data.loader import Loader, RankBatch
from knltrain.errors import ConfigError, KnltrainError
from knltrain.models import model_of
from knltrain.runlog.console import Console

SMALL = RunConfig(model="alexnet_bn_small", image_size=32, global_batch=8, precision="fp32", engine="eager")
QUIET = Console(silent=True)


def with_data(folder):
    return dataclasses.replace(SMALL, data=str(folder), augment=AugmentConfig(name="rrc"), workers=1)


def test_spread_stays_within_what_was_measured():
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3, "quartile1": 2, "quartile3": 4, "min": 1, "max": 5}
    assert spread([1.0, 2.0])["quartile3"] == 1.75
    assert set(spread([7.0]).values()) == {7.0}


def test_summary_of_waiting():
    times = [StepTime(1.0, 0.1), StepTime(2.0, 0.2), StepTime(5.0, 1.7)]
    result = summary(times, {"batch": 8, "data": "folder"})
    assert result["images_per_s"] == 4.0
    assert result["data_fraction"] == pytest.approx(0.25)
    assert result["data_s"]["median"] == 0.2
    assert "data_s" not in summary(times, {"batch": 8})


def test_data_is_what_train_would_read(image_folder):
    """The same loader, augmentation and classes; the steps go on where the measurement of the input alone ended."""
    config = with_data(image_folder)
    step = TrainingStep(config)
    assert step.engine.model.classifier.fc6.out_features == 3
    assert step.input_alone(2) > 0
    loader = Loader(open_part(config, "train"), config, dtype=torch.float32, workers=1)
    expected = list(loader.training(RankBatch(8, 8, 0, 1), 0, 3))
    images, labels = next(step._batches)
    assert torch.equal(images, expected[2].images)
    assert torch.equal(labels, expected[2].labels)
    assert not torch.equal(images, expected[0].images)
    loader.close()
    step.close()


def test_the_wait_for_images_is_part_of_the_step():
    step = TrainingStep(SMALL)
    batch = next(step._batches)

    def slow():
        while True:
            time.sleep(0.02)
            yield batch

    step._batches = slow()
    step_s, data_s = step()
    assert step_s > data_s >= 0.02


def test_bench_through_the_input_path(image_folder):
    result = bench(with_data(image_folder), QUIET, steps=2)
    assert result["input_images_per_s"] > 0
    assert 0 <= result["data_fraction"] < 1
    assert result["data_s"]["max"] <= result["step_s"]["max"]
    assert result.items() >= {"augment": "rrc", "workers": 1, "steps": 2, "engine": "eager"}.items()
    assert not {"data_s", "data_fraction", "input_images_per_s", "workers"} & bench(SMALL, QUIET, steps=1).keys()


def test_compare_lists_what_does_not_run_with_the_reason(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))  # no compiler on it
    result = compare(SMALL, Console(), steps=3, engines=("compile", "eager"))
    absent, eager = result["engines"]
    assert absent.keys() == {"engine", "reason"}
    assert "g++" in absent["reason"]
    assert (eager["ratio"], result["ratio_to"], result["precision"]) == (1.0, "eager", "fp32")
    assert eager["images_per_s"] == pytest.approx(8 / eager["step_s"]["median"])
    assert eager["peak_rss_mb"] > 0
    printed = capsys.readouterr().out
    assert "compile does not run here: engine compile" in printed
    assert f"{eager['images_per_s']:.1f}" in printed
    with pytest.raises(KnltrainError, match=r"no engine runs here.*g\+\+"):
        compare(SMALL, QUIET, steps=1, engines=("compile",))


def test_ratios_are_to_the_slowest_where_eager_did_not_run():
    rows = {"a": {"images_per_s": 30.0}, "b": {"images_per_s": 20.0}, "c": {"reason": "missing"}}
    assert _add_ratios(rows) == "b"
    assert (rows["a"]["ratio"], rows["b"]["ratio"]) == (1.5, 1.0)
    assert "ratio" not in rows["c"]


def test_rounds_hold_all_steps():
    assert _split(12, 5) == [3, 3, 2, 2, 2]
    assert _split(2, 5) == [1, 1]


def test_every_engine_is_compared():
    assert set(ENGINES) == {"fused", "eager", "compile", "ipex"}


@pytest.mark.slow
def test_a_process_hands_over_its_errors_and_its_end():
    with pytest.raises(ConfigError, match="no 'lenet'"):
        Process(dataclasses.replace(SMALL, model="lenet"))
    with pytest.raises(KnltrainError, match="memory"):
        Process(dataclasses.replace(SMALL, global_batch=10**10))
    with Process(SMALL, threads=1) as process:
        times, peak = process.measure(2)
        assert (len(times), process.settings["threads"]) == (2, 1)
        assert peak > 0
        os.kill(process._process.pid, signal.SIGKILL)
        with pytest.raises(KnltrainError, match="ended by SIGKILL; perhaps for lack of memory"):
            process.measure(1)


def invoke(*arguments):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1]), result.stderr


def test_sweep_measures_every_point_and_names_those_it_cannot(tmp_path):
    result, table = invoke("bench", "--model", "alexnet_bn_small", "--batches", "4,10000000000", "--threads", 1,
                           "--steps", 1, "--out", tmp_path, "--json")  # fmt: skip
    measured, failed = result["points"]
    assert (measured["batch"], measured["threads"]) == (4, 1)
    assert measured["images_per_s"] == pytest.approx(4 / measured["step_s"]["median"])
    assert failed.keys() == {"batch", "threads", "reason"}
    assert "not measured" in table
    assert json.loads((tmp_path / "sweep.json").read_text())["points"] == result["points"]
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("batches, threads", [((8, 16, 64), (1, 2)), ((8,), (1, 2, 4)), ((8,), (1,))])
def test_sweeps_are_drawn(tmp_path, batches, threads):
    points = [
        {"batch": b, "threads": t, "images_per_s": 10.0 * t, **summary([StepTime(b / t / 10, 0)] * 3, {"batch": b})}
        for b, t in itertools.product(batches, threads)
    ]
    draw(points, tmp_path / "plot.png", "title")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_profile_of_a_network():
    result, table = invoke("bench", "--model", "alexnet_bn_small", "--batch", 4, "--steps", 2, "--precision", "fp32",
                           "--engine", "eager", "--profile", "--json")  # fmt: skip
    rows = {row["layer"]: row for row in result["layers"]}
    assert len(rows) == len(result["layers"])
    assert sum(row["gradient_bytes"] for row in result["layers"]) == 4 * sum(
        p.numel() for p in model_of(SMALL, 1000).parameters()
    )
    assert rows["features.conv1"]["gradient_bytes"] == 4 * (32 * 3 * 9 + 32)
    kinds = {name: row["kind"] for name, row in rows.items()}
    expected = {"conv1": "conv", "norm1": "norm", "relu1": "activation", "pool5": "pool"}
    assert {name: kinds[f"features.{name}"] for name in expected} == expected
    assert (kinds["classifier.fc6"], kinds["classifier.drop6"], kinds["(loss)"]) == ("linear", "dropout", "loss")
    ready = [name for name in rows if rows[name]["gradient_bytes"]]
    assert ready[:2] == ["classifier.fc6", "features.norm5"]
    assert ready[-1] == "features.conv1"
    parts = sum(row["forward_s"] + row["backward_s"] for row in result["layers"])
    assert parts + result["optimizer_s"] + result["other_s"] == pytest.approx(result["profiled_step_s"])
    assert "features.conv3" in table


class Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, forward_s, backward_s):
        time.sleep(forward_s)
        ctx.backward_s = backward_s
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(ctx.backward_s)
        return gradient, None, None


class SlowLayer(nn.Module):
    def forward(self, x):
        return Slow.apply(x, 0.02, 0.04)


class Block(nn.Module):
    """Has layers, and computes by itself; with an in-place operation on what a layer gave."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.slow = SlowLayer()

    def forward(self, x):
        x = Slow.apply(self.slow(torch.relu_(self.conv(x))), 0.06, 0.01)
        return x.mean((2, 3))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_time_is_that_of_the_layer_it_was_spent_in(monkeypatch, precision):
    if reason := why_no_engine(SMALL.engine, precision):
        pytest.skip(reason)
    network = nn.Sequential(OrderedDict(block=Block(), fc=nn.Linear(4, 1000)))
    monkeypatch.setattr(step_module, "model_of", lambda config, classes: network)
    config = dataclasses.replace(SMALL, precision=precision, force_bf16=True)
    result = layers.profile(config, QUIET, steps=1)
    rows = {row["layer"]: row for row in result["layers"]}
    assert list(rows) == ["(loss)", "fc", "block.slow", "block", "block.conv"]
    assert rows["block.slow"]["forward_s"] >= 0.02
    assert rows["block.slow"]["backward_s"] >= 0.04
    assert rows["block"]["forward_s"] >= 0.06
    assert rows["block"]["backward_s"] >= 0.01
    # Had a child's time been its parent's too, these would not fit into the step.
    assert sum(row["forward_s"] for row in rows.values()) <= result["profiled_step_s"] - 0.05
    assert [row["gradient_bytes"] for row in rows.values()] == [0, 4 * 5000, 0, 0, 4 * 4 * 27]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
