"""What oneDNN ran is seen, and what it has no fast code for is named."""

import pytest
import torch
import torch.nn.functional as F

from knltrain.bench import bench, primitives
from knltrain.bench import step as step_module
from knltrain.bench.primitives import Primitive, onednn_version, record_primitives, slow_convolutions
from knltrain.config import RunConfig
from knltrain.runlog.console import Console

FAST = Primitive("convolution", "forward", "brgconv:avx512_core", ("f32",) * 3, "mb2_ic16oc16", 3.0)
SLOW = [
    Primitive("convolution", "forward", "ref:any", ("f32",) * 3, "mb2_ic16oc16", 5.0),
    Primitive("convolution", "weight gradient", "gemm:jit", ("f32",) * 3, "mb4_ic16oc16", 9.0),
]
PRODUCT = Primitive("matmul", "undef", "gemm:jit:f32", ("f32",) * 3, "7x12800:12800x64", 39.0)


def test_convolutions_without_fast_code_are_named():
    said = slow_convolutions([FAST, *SLOW, PRODUCT])
    assert "no fast code here for 2 of 3 convolutions (gemm:jit, ref:any)" in said
    assert "weight gradient of mb4_ic16oc16, took 9.0 ms" in said
    assert f"torch {torch.__version__} with oneDNN {onednn_version()}" in said


@pytest.mark.parametrize("ran", [[FAST, PRODUCT], []])
def test_fast_code_is_not_spoken_of(ran):
    assert slow_convolutions(ran) == ""


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
def test_a_convolution_is_seen(capfd):
    x, weight = (torch.randn(size).to(memory_format=torch.channels_last) for size in ((16, 16, 32, 32), (16, 16, 3, 3)))
    seen = [one for one in record_primitives(lambda: F.conv2d(x, weight, padding=1)) if one.kind == "convolution"]
    assert [one.direction for one in seen] == ["forward"]
    assert seen[0].gflop == pytest.approx(2e-9 * 16 * 30 * 30 * 16 * 16 * 9, rel=0.2)
    F.conv2d(x, weight, padding=1)
    assert "onednn_verbose" not in capfd.readouterr().out


def test_bench_warns(monkeypatch, capsys):
    monkeypatch.setattr(step_module, "record_primitives", lambda step: step() and SLOW)
    config = RunConfig(model="alexnet_bn_small", image_size=32, global_batch=8, precision="fp32", engine="eager")
    result = bench(config, Console(), steps=1)
    assert result["slow_convolutions"] == primitives.slow_convolutions(SLOW)
    assert "no fast code here for 2 of 2 convolutions" in " ".join(capsys.readouterr().out.split())
