"""What the tests of operations share."""

import sys

import pytest

from knltrain.ops import native


@pytest.fixture(params=["avx2", "avx512f", "avx512", "avx512_bf16", "torch"])
def each_isa(request, monkeypatch):
    """Runs the test with every variant of the kernels, and without them; yields the variant's name or "torch"."""
    name, module = request.param, native.kernels()
    if name == "torch":
        for user in [m for n, m in sys.modules.items() if n.startswith("knltrain.") and hasattr(m, "kernels")]:
            monkeypatch.setattr(user, "kernels", lambda: None)
        yield name
        return
    if module is None:
        pytest.skip(f"no native kernels: {native.load_error()}")
    if name not in module.supported_isas():
        pytest.skip(f"this processor does not run {name}")
    before = native.isa()
    monkeypatch.setenv("KNLTRAIN_ISA", name)
    module.use_isa(name)
    yield name
    module.use_isa(before)


@pytest.fixture
def generator():
    """Fresh random numbers; the seed is printed, for the log of a test that fails."""
    import torch

    generator = torch.Generator()
    print("torch.Generator().manual_seed", generator.seed())
    return generator
