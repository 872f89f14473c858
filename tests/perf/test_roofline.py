"""perf/roofline.py: that what it measures is complete and booked on the right layers; no figure is asserted."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from knltrain.models.fused import FusedConv2d
from knltrain.ops.convgrad import Native

PERF = Path(__file__).parents[2] / "perf"


def roofline(out, *arguments):
    done = subprocess.run(
        [sys.executable, str(PERF / "roofline.py"), "--quick", "--json", "--out", str(out), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert json.loads((out / "roofline.json").read_text()) == result
    assert (out / "roofline.png").read_bytes().startswith(b"\x89PNG")
    assert result["ceilings"]["copy_gb_per_s"] > 0
    return result


def test_quick_roofline_lists_the_layers_of_a_step(tmp_path):
    result = roofline(tmp_path, "--engine", "eager", "--precision", "fp32")
    rows = {(row["layer"], row["kind"], row["part"]) for row in result["layers"]}
    for part in ("forward", "data gradient", "weight gradient"):
        assert ("features.conv3", "convolution", part) in rows
    assert ("features.conv1", "convolution", "data gradient") not in rows  # nobody asks for the images' gradient
    assert ("features.norm3", "batch norm", "forward") in rows
    assert ("features.norm3", "batch norm", "backward") in rows
    assert ("features.pool1", "pooling", "backward") in rows
    assert ("(loss)", "loss", "forward") in rows
    assert any(layer == "(optimizer)" and part == "update" for layer, _, part in rows)
    for row in result["layers"]:
        assert row["lost_s"] == pytest.approx(row["seconds"] - row["bound_s"])
    for key in ("layers", "kinds"):
        assert sum(row["seconds"] for row in result[key]) == pytest.approx(result["operations_s"])
        assert [row["lost_s"] for row in result[key]] == sorted((row["lost_s"] for row in result[key]), reverse=True)
    assert result["products_s"] > 0
    assert result["step_to_products"] == pytest.approx(result["step_s"] / result["products_s"])


@pytest.mark.hand
@pytest.mark.filterwarnings("ignore")
def test_quick_kernels(tmp_path):
    result = roofline(tmp_path, "--kernels")
    measured = {(row["kernel"], row["name"]) for row in result["kernels"] if "reason" not in row}
    assert {("LARS step, alexnet_bn_small", "knltrain"), ("LARS step, alexnet_bn_small", "torch foreach")} <= measured
    for row in result["kernels"]:
        if "reason" not in row:
            assert row["copy_fraction"] == pytest.approx(row["gb_per_s"] / result["ceilings"]["copy_gb_per_s"])


@pytest.fixture
def operations(monkeypatch):
    monkeypatch.syspath_prepend(str(PERF))
    spec = importlib.util.spec_from_file_location("_operations", PERF / "_operations.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "_operations", module)
    spec.loader.exec_module(module)
    return module


def test_flop_bytes_and_layers_of_a_convolution_in_groups(operations):
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False), nn.ReLU())
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    with operations.Timing(model) as timing:
        model(x).sum().backward()
    convolution = {one.part: one for one in timing.operations if one.kind == "convolution"}
    assert set(convolution) == {"forward", "data gradient", "weight gradient"}
    # Per output pixel and channel: two input channels of 3x3, multiplied and added.
    for one in convolution.values():
        assert one.layer == "0"
        assert one.flop == 2 * (2 * 6 * 5 * 5) * (2 * 3 * 3)
    # Input, weight and output, or the gradients in their places, once each; there is no bias.
    for one in convolution.values():
        assert one.num_bytes == 4 * (2 * 4 * 5 * 5 + 6 * 2 * 3 * 3 + 2 * 6 * 5 * 5)
    relu = [one for one in timing.operations if one.layer == "1"]
    assert {one.part for one in relu} == {"forward", "backward"}
    assert all(one.kind == "activation, addition" for one in relu)


@pytest.mark.parametrize("kernel, stride", [(3, 1), (5, 1), (1, 1), (1, 2)])
def test_convolutions_of_the_kernels_count_as_direct_sums(operations, kernel, stride):
    layer = FusedConv2d(32, 48, kernel, stride=stride, padding=kernel // 2)
    layer.by = Native(True, True, True)
    x = torch.randn(2, 32, 8, 8, requires_grad=True).to(memory_format=torch.channels_last)
    with operations.Timing(nn.Sequential(layer)) as timing:
        y = layer(x)
        y.sum().backward()
    flop = {one.part: one.flop for one in timing.operations if one.kind == "convolution"}
    assert flop == dict.fromkeys(("forward", "data gradient", "weight gradient"), 2 * y.numel() * 32 * kernel**2)


def test_products_of_a_step_are_told_from_the_rest(operations):
    with operations.InStep() as in_step:
        torch.randn(8, 8).relu().sum()
    assert in_step.seconds == 0
    with operations.InStep() as in_step:
        nn.Conv2d(4, 4, 3)(torch.randn(1, 4, 8, 8))
    assert in_step.seconds > 0


def test_timing_leaves_the_step_as_it_is(operations):
    def trained(timed):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Linear(8, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
        x = torch.randn(16, 8)
        for _ in range(2):
            optimizer.zero_grad()
            if timed:
                with operations.Timing(model):
                    model(x).square().mean().backward()
                    optimizer.step()
            else:
                model(x).square().mean().backward()
                optimizer.step()
        return model.state_dict()

    plain, timed = trained(timed=False), trained(timed=True)
    for name, value in plain.items():
        assert torch.equal(value, timed[name]), name
