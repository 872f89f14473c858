"""bf16 layers against float64, on processors for which PyTorch has oneDNN's bf16 and on those for which it has not."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from ops.checks import BF16, FLOAT32, assert_within, seed_anew

from knltrain.ops import bf16


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 40), (700, 64)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_linear(shape, with_bias, autocast):
    seed_anew()
    x, weight = torch.randn(shape).bfloat16(), torch.randn(24, shape[-1]).bfloat16()
    sources = [x, weight, torch.randn(24).bfloat16()] if with_bias else [x, weight]
    given = [t.requires_grad_() for t in sources]
    wide = [t.detach().double().requires_grad_() for t in sources]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = bf16.linear(*given)
    dy = torch.randn(y.shape).bfloat16()
    expected = F.linear(*wide)
    results = [y, *torch.autograd.grad(y, given, dy)]
    exact = [expected, *torch.autograd.grad(expected, wide, dy.double())]
    for name, got, true in zip(("y", "dx", "dweight", "dbias"), results, exact, strict=False):
        assert got.dtype == torch.bfloat16
        assert_within(got, true, BF16 * true.abs() + 1000 * FLOAT32 * (true.abs().max() + 1), name)


@pytest.mark.parametrize("asked, computes", [("AVX2", False), ("avx2_vnni", False), ("nothing", None), ("", None)])
def test_onednn_is_asked_as_the_environment_leaves_it(asked, computes):
    """A value that oneDNN does not know restricts nothing."""
    script = """
import torch
from knltrain.node.topology import read_node
from knltrain.ops.bf16 import onednn_computes_bf16
x = torch.ones(1, 1, 4, 4).bfloat16()
y = torch.conv2d(x, x)
print(onednn_computes_bf16(), read_node().computes_bf16)
"""

    def answer(**environment):
        unrestricted = {key: value for key, value in os.environ.items() if key != "ONEDNN_MAX_CPU_ISA"}
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True,
                                env={**unrestricted, **environment})  # fmt: skip
        return result.stdout.split()

    expected = answer() if computes is None else [str(computes)] * 2
    assert answer(ONEDNN_MAX_CPU_ISA=asked) == expected
