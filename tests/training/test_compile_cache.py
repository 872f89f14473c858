"""Libraries of torch.compile that a killed run has cut short."""

import fcntl
import itertools
import os
import shutil
import subprocess
import sys

import pytest

from knltrain import _kernels
from knltrain.training.compile_cache import remove_cut_libraries

TRAIN = """
import torch
from knltrain.config import OptimConfig
from knltrain.training.engine import build_engine
from knltrain.optim import build_optimizer

class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(x).relu() * 2

torch.manual_seed(0)
model = Network()
engine = build_engine("compile", "fp32", model, build_optimizer(model, OptimConfig(name="sgd", variant="nesterov")))
engine.model(torch.randn(4, 8)).square().sum().backward()
print(engine.model.fc.weight.grad.sum().item())
"""


def train(**environment):
    """The gradient of a compiled network, found in a process of its own."""
    return subprocess.run([sys.executable, "-c", TRAIN], capture_output=True, text=True, env=os.environ | environment,
                          timeout=600)  # fmt: skip


@pytest.fixture(scope="module")
def whole_cache(tmp_path_factory):
    """torch.compile's cache for the network, and the gradient."""
    if not shutil.which("g++"):
        pytest.skip("torch.compile needs g++")
    cache = tmp_path_factory.mktemp("inductor")
    first = train(TORCHINDUCTOR_CACHE_DIR=str(cache))
    assert first.returncode == 0, first.stderr
    return cache, first.stdout


@pytest.mark.hand
def test_a_library_that_was_cut_short_is_compiled_again(whole_cache):
    cache, gradient = whole_cache  # and not a copy of it: libraries hold the path that they were built at
    libraries = sorted(cache.glob("*/*.so"))
    assert len(libraries) > 1
    sizes = [path.stat().st_size for path in libraries]
    for path, length in zip(libraries, itertools.cycle((1000, 0))):
        os.truncate(path, length)
    again = train(TORCHINDUCTOR_CACHE_DIR=str(cache))
    assert again.returncode == 0, again.stderr
    assert again.stdout == gradient
    assert [path.stat().st_size for path in libraries] == sizes


def test_what_is_whole_and_what_is_being_built_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert remove_cut_libraries() == []
    (tmp_path / "aa").mkdir()
    (tmp_path / "locks").mkdir()
    names = ("whole.so", "begun.main.so", "cut.main.so", "cut_far.main.so")
    whole, begun, cut, cut_far = (tmp_path / "aa" / name for name in names)
    shutil.copy(_kernels.__file__, whole)
    begun.touch()
    cut.write_bytes(whole.read_bytes()[:-1])
    cut_far.write_bytes(whole.read_bytes()[:1000])
    with (tmp_path / "locks/begun.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert sorted(remove_cut_libraries()) == [cut, cut_far]
    assert remove_cut_libraries() == [begun]
    assert whole.exists()
