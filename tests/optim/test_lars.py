"""LARS against independent float64 formulas, timm and optax."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch

from knltrain.optim import LARS

SHAPES = [(16, 3, 3, 3), (7,), (5, 16), (1,), (33, 2)]
STEPS = 30


def rates(step):
    """A learning rate that warms up and decays: formulas that differ in where the rate acts come apart."""
    return 0.3 * (step + 1) / 5 if step < 5 else 0.3 * (1 - step / STEPS) ** 2


def start(seed=0):
    """Weights of very different norms, one of them zero."""
    rng = np.random.default_rng(seed)
    weights = [rng.normal(size=shape) * scale for shape, scale in zip(SHAPES, (1.0, 1e-3, 40.0, 1.0, 1.0), strict=True)]
    weights[3][:] = 0.0
    return weights


def gradients(step, seed=1):
    """Gradients of very different norms; one tensor's is zero at every third step."""
    rng = np.random.default_rng([seed, step])
    grads = [rng.normal(size=shape) * scale for shape, scale in zip(SHAPES, (1e-2, 1.0, 1e-4, 1.0, 5.0), strict=True)]
    if step % 3 == 0:
        grads[4][:] = 0.0
    return grads


def reference(variant, *, wd=5e-4, eta=0.01, momentum=0.9, eps=0.0, rate=rates, plain=()):
    """The published formulas, one weight at a time, in float64. ``plain``: what mlperf and nesterov leave alone."""
    weights = start()
    velocity = [np.zeros_like(w) for w in weights]
    for step in range(STEPS):
        lr = rate(step)
        for i, g in enumerate(gradients(step)):
            w = weights[i]
            w_norm = math.sqrt(float((w * w).sum()))
            g_norm = math.sqrt(float((g * g).sum()))
            decay = wd
            if variant in ("mlperf", "nesterov") and i in plain:
                local, decay = lr, 0.0
            elif w_norm == 0 or g_norm == 0:
                local = lr
            elif variant == "larc":
                local = min(lr, eta * w_norm / (g_norm + eps))
            else:
                local = lr * eta * w_norm / (g_norm + wd * w_norm + eps)
            step_now = local * (g + decay * w)
            velocity[i] = momentum * velocity[i] + step_now
            weights[i] = w - (step_now + momentum * velocity[i] if variant == "nesterov" else velocity[i])
    return weights


def run(optimizer, params, rate=rates):
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        for param, grad in zip(params, gradients(step), strict=True):
            param.grad = torch.tensor(grad, dtype=param.dtype)
        optimizer.step()
    return [param.detach().double().numpy() for param in params]


def parameters(dtype=torch.float64):
    return [torch.nn.Parameter(torch.tensor(w, dtype=dtype)) for w in start()]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("variant", ["paper", "mlperf", "larc", "nesterov"])
@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_follows_the_published_formula(variant, eps, dtype, tolerance):
    params = parameters(dtype)
    plain = (1, 3)
    options = {"weight_decay": 5e-4, "trust_coefficient": 0.01, "eps": eps}
    options |= {"clip": variant == "larc", "nesterov": variant == "nesterov"}
    if variant in ("mlperf", "nesterov"):
        groups = [
            {"params": [params[i] for i in range(5) if i not in plain]},
            {"params": [params[i] for i in plain], "adapt": False, "weight_decay": 0.0},
        ]
        optimizer = LARS(groups, 1.0, **options)
    else:
        optimizer = LARS(params, 1.0, **options)
    ours = run(optimizer, params)
    for got, expected in zip(ours, reference(variant, eps=eps, plain=plain), strict=True):
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


def test_the_variants_differ():
    """Otherwise the test above could not tell them apart."""
    results = [reference(v, plain=(1, 3)) for v in ("paper", "mlperf", "larc", "nesterov")]
    for first, second in itertools.combinations(range(4), 2):
        distances = [np.abs(a - b).max() for a, b in zip(results[first], results[second], strict=True)]
        assert max(distances) > 1e-3


@pytest.mark.parametrize("clip", [False, True])
def test_equals_timm_at_a_constant_rate(clip):
    """timm applies the rate outside the buffer, which is the same while it does not change.

    Its clipped form keeps the decay in the denominator, so that one is compared without decay.
    """
    timm_optim = pytest.importorskip("timm.optim", exc_type=ImportError)
    decay = 0.0 if clip else 5e-4
    ours, theirs = parameters(), parameters()
    mine = LARS(ours, 0.2, weight_decay=decay, trust_coefficient=0.01, clip=clip)
    other = timm_optim.Lars(
        theirs, lr=0.2, momentum=0.9, weight_decay=decay, trust_coeff=0.01, eps=0.0, trust_clip=clip, always_adapt=True
    )
    constant = lambda step: 0.2  # noqa: E731
    for got, expected in zip(run(mine, ours, constant), run(other, theirs, constant), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
def test_equals_optax_without_decay(nesterov):
    """optax takes the norm of gradient and decay together, which is the same where there is no decay.

    Its rate acts inside the buffer, as ours does, so the rate may change.
    """
    optax = pytest.importorskip("optax")
    import jax
    import jax.numpy as jnp

    with jax.enable_x64(True):
        theirs = [jnp.asarray(w) for w in start()]
        transform = optax.lars(
            lambda count: rates(int(count)), weight_decay=0.0, trust_coefficient=0.01, eps=0.0, momentum=0.9,
            nesterov=nesterov,
        )  # fmt: skip
        state = transform.init(theirs)
        for step in range(STEPS):
            updates, state = transform.update([jnp.asarray(g) for g in gradients(step)], state, theirs)
            theirs = optax.apply_updates(theirs, updates)
        ours = parameters()
        optimizer = LARS(ours, 1.0, trust_coefficient=0.01, nesterov=nesterov)
        for got, expected in zip(run(optimizer, ours), theirs, strict=True):
            np.testing.assert_allclose(got, np.asarray(expected), rtol=1e-9, atol=1e-12)


def test_leaves_gradients_alone_and_skips_parameters_without_one():
    used, unused = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    used.grad = torch.tensor([1.0, 2.0, 3.0])
    LARS([used, unused], 0.1, weight_decay=0.1).step()
    assert used.grad.tolist() == [1.0, 2.0, 3.0]
    assert unused.tolist() == [1.0, 1.0, 1.0]


def test_state_dict_round_trip_continues_exactly():
    first = parameters()
    optimizer = LARS(first, 0.1, weight_decay=5e-4, trust_coefficient=0.01)
    half = STEPS // 2
    for step in range(half):
        for param, grad in zip(first, gradients(step), strict=True):
            param.grad = torch.tensor(grad)
        optimizer.step()
    second = [torch.nn.Parameter(param.detach().clone()) for param in first]
    resumed = LARS(second, 9.9)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(half, STEPS):
        for params, stepper in ((first, optimizer), (second, resumed)):
            for param, grad in zip(params, gradients(step), strict=True):
                param.grad = torch.tensor(grad)
            stepper.step()
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_weights_that_somebody_has_written_to_have_another_norm(dtype):
    def stepped(optimizer, params):
        for param, grad in zip(params, gradients(1), strict=True):
            param.grad = torch.tensor(grad, dtype=dtype)
        optimizer.step()

    options = {"lr": 0.5, "momentum": 0.0, "weight_decay": 5e-4, "trust_coefficient": 0.01}
    params = parameters(dtype)
    optimizer = LARS(params, **options)
    optimizer.carries_norms = True
    stepped(optimizer, params)
    with torch.no_grad():
        for param in params:
            param.mul_(3.0)
    copies = [torch.nn.Parameter(param.detach().clone()) for param in params]
    stepped(optimizer, params)
    stepped(LARS(copies, **options), copies)
    for param, fresh in zip(params, copies, strict=True):
        torch.testing.assert_close(param, fresh, rtol=1e-6, atol=0)


def test_a_state_from_before_there_was_nesterov_goes_on_without():
    def begun():
        param = torch.nn.Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        optimizer = LARS([param], 0.1)
        optimizer.step()
        return param, optimizer

    (param, optimizer), (expected, undisturbed) = begun(), begun()
    state = copy.deepcopy(optimizer.state_dict())
    del state["param_groups"][0]["nesterov"]
    optimizer.load_state_dict(state)
    optimizer.step()
    undisturbed.step()
    assert torch.equal(param, expected)


def test_nan_is_not_swallowed():
    param = torch.nn.Parameter(torch.ones(2))
    param.grad = torch.tensor([math.nan, 1.0])
    LARS([param], 0.1).step()
    assert torch.isnan(param).any()


def test_closure_returns_the_loss():
    param = torch.nn.Parameter(torch.ones(2))

    def closure():
        param.grad = None
        loss = (param**2).sum()
        loss.backward()
        return loss

    assert LARS([param], 0.1).step(closure).item() == 2.0


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"lr": math.nan},
        {"momentum": 1.0},
        {"momentum": -0.1},
        {"weight_decay": -1e-4},
        {"eps": -1.0},
        {"trust_coefficient": 0.0},
        {"maximize": True},
    ],
)
def test_constructor_refuses(options):
    with pytest.raises(ValueError, match=r"Invalid|maximize"):
        LARS([torch.nn.Parameter(torch.ones(1))], **options)


def test_sparse_gradients_are_refused():
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.sparse_coo_tensor([[0]], [1.0], (3,), check_invariants=True)
    with pytest.raises(RuntimeError, match="sparse"):
        LARS([param]).step()
