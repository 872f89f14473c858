"""LAMB against the published formula in float64, and against timm's."""

import math

import numpy as np
import pytest
import torch

from knltrain.config import OptimConfig, RunConfig, override
from knltrain.errors import ConfigError
from knltrain.ops.optimizers import lamb_step
from knltrain.optim import LAMB, build_optimizer

SHAPES = [(16, 3, 3, 3), (7,), (5, 16), (1,), (33, 2)]
STEPS = 40
BETAS, DECAY, EPS = (0.9, 0.98), 0.01, 1e-6


def rate(step):
    return 0.02 * (step + 1) / 5 if step < 5 else 0.02 * (1 - step / STEPS) ** 2


def start():
    """Weights of very different norms, one of them zero."""
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=shape) * scale for shape, scale in zip(SHAPES, (1.0, 1e-3, 40.0, 1.0, 1.0), strict=True)]
    weights[3][:] = 0.0
    return weights


def gradients(step):
    """Gradients of very different norms; one tensor's is always zero, which without decay makes its step zero."""
    rng = np.random.default_rng([1, step])
    grads = [rng.normal(size=shape) * scale for shape, scale in zip(SHAPES, (1e-2, 1.0, 1e-4, 1.0, 5.0), strict=True)]
    grads[4][:] = 0.0
    return grads


def published(decay=DECAY, plain=()):
    """Algorithm 2 of You et al. 2019, one weight at a time; ``plain`` lists tensors that are not adapted."""
    weights = start()
    first, second = ([np.zeros_like(w) for w in weights] for _ in range(2))
    for step in range(STEPS):
        for i, g in enumerate(gradients(step)):
            first[i] = BETAS[0] * first[i] + (1 - BETAS[0]) * g
            second[i] = BETAS[1] * second[i] + (1 - BETAS[1]) * g * g
            corrected = first[i] / (1 - BETAS[0] ** (step + 1)), second[i] / (1 - BETAS[1] ** (step + 1))
            r = corrected[0] / (np.sqrt(corrected[1]) + EPS) + decay * weights[i]
            norms = math.sqrt((weights[i] ** 2).sum()), math.sqrt((r**2).sum())
            trust = 1.0 if i in plain or 0.0 in norms else norms[0] / norms[1]
            weights[i] = weights[i] - rate(step) * trust * r
    return weights


def parameters(dtype=torch.float64):
    return [torch.nn.Parameter(torch.tensor(w, dtype=dtype)) for w in start()]


def run(optimizer, params, steps=range(STEPS)):
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        for param, grad in zip(params, gradients(step), strict=True):
            param.grad = torch.tensor(grad, dtype=param.dtype)
        optimizer.step()
    return [param.detach().double().numpy() for param in params]


@pytest.mark.parametrize("decay", [DECAY, 0.0])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_follows_the_published_formula(dtype, tolerance, decay):
    params = parameters(dtype)
    plain = (1,)
    groups = [{"params": [p for i, p in enumerate(params) if i not in plain]},
              {"params": [params[i] for i in plain], "adapt": False}]  # fmt: skip
    ours = run(LAMB(groups, betas=BETAS, weight_decay=decay, eps=EPS), params)
    for got, expected in zip(ours, published(decay, plain), strict=True):
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("decay", [DECAY, 0.0])
def test_equals_timm(decay):
    timm_optim = pytest.importorskip("timm.optim", exc_type=ImportError)
    ours, theirs = parameters(), parameters()
    other = timm_optim.Lamb(
        theirs, betas=BETAS, weight_decay=decay, eps=EPS, max_grad_norm=None, always_adapt=True, grad_averaging=True
    )
    mine = LAMB(ours, betas=BETAS, weight_decay=decay, eps=EPS)
    for got, expected in zip(run(mine, ours), run(other, theirs), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


def test_state_dict_round_trip_continues_exactly():
    whole, first = parameters(), parameters()
    expected = run(LAMB(whole, betas=BETAS), whole)
    optimizer = LAMB(first, betas=BETAS)
    run(optimizer, first, range(STEPS // 2))
    second = [torch.nn.Parameter(param.detach().clone()) for param in first]
    resumed = LAMB(second)
    resumed.load_state_dict(optimizer.state_dict())
    for got, wanted in zip(run(resumed, second, range(STEPS // 2, STEPS)), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_working_copies_are_the_new_weights():
    weight = torch.randn(4, 8)
    copy = torch.empty(4, 8, dtype=torch.bfloat16)
    moments = [torch.zeros(4, 8) for _ in range(2)]
    lamb_step([weight], [torch.ones(4, 8).bfloat16()], moments[:1], moments[1:], [copy], steps=[1], lr=[0.1],
              beta1=[0.9], beta2=[0.99], weight_decay=[0.0], eps=[1e-6], adapt=[True])  # fmt: skip
    assert torch.equal(copy, weight.bfloat16())
    assert float(moments[0][0, 0]) == pytest.approx(0.1)


def test_the_operator_is_what_torch_library_asks_for():
    weights, states = [torch.randn(5, 3), torch.randn(20)], [[torch.zeros(5, 3), torch.zeros(20)] for _ in range(2)]
    copies = [torch.empty(5, 3, dtype=torch.bfloat16), torch.empty(0, dtype=torch.bfloat16)]
    torch.library.opcheck(
        torch.ops.knltrain.lamb_step.default,
        (weights, [torch.ones(5, 3), torch.ones(20)], *states, copies, [1, 1], [0.1] * 2, [0.9] * 2, [0.99] * 2,
         [0.0] * 2, [1e-6] * 2, [True] * 2),
    )  # fmt: skip


def test_a_number_that_is_none_is_not_swallowed():
    param = torch.nn.Parameter(torch.ones(2))
    param.grad = torch.tensor([math.nan, 1.0])
    LAMB([param], 0.1).step()
    assert torch.isnan(param).all()


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"lr": math.nan}, {"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)},
                                     {"weight_decay": -1e-4}, {"eps": 0.0}])  # fmt: skip
def test_constructor_refuses(options):
    with pytest.raises(ValueError, match="Invalid"):
        LAMB([torch.nn.Parameter(torch.ones(1))], **options)


def test_a_configuration_names_it():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    config = OptimConfig(name="lamb", variant="mlperf", momentum=0.8, beta2=0.95, eps=1e-6, weight_decay=0.1)
    optimizer = build_optimizer(model, config)
    assert isinstance(optimizer, LAMB)
    assert optimizer.defaults["betas"] == (0.8, 0.95)
    by_kind = {group["kind"]: (group["adapt"], group["weight_decay"]) for group in optimizer.param_groups}
    assert by_kind == {"weight": (True, 0.1), "norm": (False, 0.0), "bias": (False, 0.0)}
    with pytest.raises(ConfigError, match="1e-6 is usual"):
        override(RunConfig(), {"optim.name": "lamb"})
