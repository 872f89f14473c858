"""PowerSGD against the means that it approximates."""

import json
import socket

import pytest
import torch
from comm.ranks import outputs, results, start_ranks, wait_for

from knltrain.comm.powersgd import PowerSGD


class Bucket:
    """What DistributedDataParallel hands to a hook."""

    def __init__(self, parameters, gradients, *, last=True):
        self._parameters, self._last = parameters, last
        self._buffer = torch.zeros(sum(gradient.numel() for gradient in gradients), dtype=gradients[0].dtype)
        parts = self._buffer.split([gradient.numel() for gradient in gradients])
        self._views = [part.as_strided(gradient.shape, gradient.stride(), part.storage_offset())
                       for part, gradient in zip(parts, gradients, strict=True)]  # fmt: skip
        for view, gradient in zip(self._views, gradients, strict=True):
            view.copy_(gradient)

    def parameters(self):
        return self._parameters

    def gradients(self):
        return self._views

    def buffer(self):
        return self._buffer

    def is_last(self):
        return self._last


def low_rank(rows, columns, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)


def alone(rank):
    return PowerSGD(rank, lambda flat: None)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_of_low_rank_comes_back_whole(memory_format, dtype):
    weight = low_rank(32, 16 * 9, 2, 0).view(32, 16, 3, 3).to(dtype)
    if memory_format == torch.channels_last:  # low rank as it lies in memory
        weight = low_rank(32, 9 * 16, 2, 0).view(32, 3, 3, 16).permute(0, 3, 1, 2).to(dtype)
    bias, norm = torch.randn(32).to(dtype), torch.randn(4, 4).to(dtype)
    bucket = Bucket(["weight", "bias", "small"], [weight, bias, norm])
    future = alone(2).all_reduce(bucket)
    assert future.done()
    assert future.value() is bucket.buffer()
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 0.2}
    torch.testing.assert_close(bucket.gradients()[0], weight, **close)
    assert torch.equal(bucket.gradients()[1], bias), "what saves nothing is sent whole"
    assert torch.equal(bucket.gradients()[2], norm)


def test_what_is_left_out_of_a_step_comes_later():
    """The sum of what was passed on follows the sum of the gradients, however many columns a matrix needs."""
    torch.manual_seed(0)
    gradient, power, passed = torch.randn(40, 30), alone(1), torch.zeros(40, 30)
    misses = []
    for step in range(1, 121):
        bucket = Bucket(["weight"], [gradient])
        power.all_reduce(bucket)
        passed += bucket.gradients()[0]
        misses.append(float((passed / step - gradient).norm() / gradient.norm()))
    assert misses[0] > 0.7
    assert misses[-1] < 0.25
    assert misses[-1] < 0.5 * misses[29]


def test_buckets_wait_for_the_last():
    power = alone(1)
    first = Bucket(["a"], [low_rank(20, 20, 1, 1)], last=False)
    last = Bucket(["b"], [low_rank(20, 20, 1, 2)])
    waiting = power.all_reduce(first)
    assert not waiting.done()
    power.all_reduce(last)
    assert waiting.value() is first.buffer()
    torch.testing.assert_close(first.gradients()[0], low_rank(20, 20, 1, 1), rtol=1e-4, atol=1e-4)


def test_what_was_left_out_can_be_forgotten():
    power, first, second = alone(1), torch.randn(30, 30), low_rank(30, 30, 1, 5)
    power.all_reduce(Bucket(["weight"], [first]))
    power.reset()
    power.all_reduce(bucket := Bucket(["weight"], [second]))
    torch.testing.assert_close(bucket.gradients()[0], second, rtol=1e-4, atol=1e-4)


def test_a_number_that_is_none_is_seen_by_all_and_gone_with_the_step():
    power, good = alone(1), low_rank(20, 20, 1, 3)
    spoiled = good.clone()
    spoiled[3, 4] = float("nan")
    power.all_reduce(bucket := Bucket(["weight"], [spoiled]))
    assert not bucket.gradients()[0].isfinite().all()
    power.all_reduce(bucket := Bucket(["weight"], [good]))
    torch.testing.assert_close(bucket.gradients()[0], good, rtol=1e-4, atol=1e-4)


SCRIPT = """
import json, sys, torch
from pathlib import Path
from torch import nn
from knltrain.comm.gradients import data_parallel
from knltrain.comm.group import Group
from knltrain.config import CommConfig
from knltrain.launch.world import discover
ranks, backend = discover(), sys.argv[2]
group = Group(ranks, backend)
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(4, 32, 3), nn.BatchNorm2d(32), nn.Flatten(), nn.Linear(32 * 16, 40))
model.to(memory_format=torch.channels_last)
carried = {}
config = CommConfig(compression="powersgd", powersgd_rank=2, bucket_mb=0.02)
parallel, clock = data_parallel(model, config, group, carried)
torch.manual_seed(1 + ranks.rank)
steps = []
for step in range(4):
    model.zero_grad(set_to_none=True)
    weight = model[3].weight
    if step == 2:
        carried[weight] = torch.full_like(weight, 3.0)
    parallel(torch.randn(8, 4, 6, 6)).square().mean().backward()
    timing = clock.pop_step()
    steps.append({"gradients": [p.grad.flatten().tolist() for p in model.parameters()],
                  "exposed": 0 < timing.exposed <= timing.on_wire})
    group.set_timeout(60) if step == 0 else None
Path(sys.argv[1], f"rank{ranks.rank}.json").write_text(json.dumps(steps))
parallel = None
group.close()
"""


@pytest.mark.parametrize("backend", ["gloo", "ccl"])
def test_all_ranks_get_the_same_gradients(backend, tmp_path):
    if backend == "ccl":
        from comm.test_oneccl import need_library

        need_library()
    (tmp_path / "script.py").write_text(SCRIPT)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    ranks = start_ranks(tmp_path / "script.py", 2, tmp_path, backend, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    codes = wait_for(ranks, 120)
    assert codes == [0, 0], outputs(tmp_path)
    one, two = results(tmp_path, 2)
    assert json.dumps(one) == json.dumps(two)
    assert all(step["exposed"] for step in one)
    means = [torch.tensor(step["gradients"][4]).mean() for step in one]
    assert means[2] > 1.0, "what earlier micro-batches accumulated is sent too"
    assert abs(means[1]) < 0.5
