"""200 steps of our optimizers beside timm's and optax's on one network, where the formulas coincide.

All in float64, so that what is compared is the formula: in float32 a network multiplies differences of the last bit.
``test_float32_stays_near`` says how far that goes.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from knltrain.optim import LAMB, LARS

STEPS = 200
RELATIVE = 1e-5


def constant(step):
    return 1.0


def changing(step):
    """Warm-up and polynomial decay, as a run has them."""
    return (step + 1) / 20 if step < 20 else (1 - step / STEPS) ** 2


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(200, 10)
    ).to(dtype)


def batch(step, dtype):
    generator = torch.Generator().manual_seed(step % 10)
    labels = torch.randint(10, (32,), generator=generator)
    images = torch.randn(32, 3, 12, 12, generator=generator) + labels[:, None, None, None] / 5
    return images.to(dtype), labels


def backward(model, step):
    dtype = next(model.parameters()).dtype
    images, labels = batch(step, dtype)
    model.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    return loss.item()


def train(model, optimizer, peak, rate):
    """Trains, and returns the losses."""
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = peak * rate(step)
        losses.append(backward(model, step))
        optimizer.step()
    return losses


def train_with_optax(model, transform):
    """Trains with optax's updates of torch's gradients, and returns the losses."""
    import jax.numpy as jnp
    import optax

    values = [jnp.asarray(parameter.detach().numpy()) for parameter in model.parameters()]
    state = transform.init(values)
    losses = []
    for step in range(STEPS):
        losses.append(backward(model, step))
        grads = [jnp.asarray(parameter.grad.numpy()) for parameter in model.parameters()]
        updates, state = transform.update(grads, state, values)
        values = optax.apply_updates(values, updates)
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), values, strict=True):
                parameter.copy_(torch.from_numpy(np.array(value)))
    return losses


def assert_together(one, other, losses, others, relative=RELATIVE):
    assert losses[-1] < 0.8 * losses[0], "it learns, so the steps are not nothing"
    np.testing.assert_allclose(losses, others, rtol=relative)
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        distance = float((mine - theirs).detach().double().norm() / theirs.detach().double().norm())
        assert distance <= relative


@pytest.mark.parametrize(
    "rate, momentum, decay, clip",
    [(constant, 0.9, 5e-4, False), (changing, 0.0, 5e-4, False), (constant, 0.9, 0.0, True)],
    ids=["constant rate", "no momentum", "larc without decay"],
)
def test_lars_and_timms(rate, momentum, decay, clip):
    """timm keeps the rate outside the buffer: the same where it is constant, or where there is no buffer.

    Its clipped form keeps the decay in the denominator: the same without decay.
    """
    timm_optim = pytest.importorskip("timm.optim", exc_type=ImportError)
    ours, theirs = network(), network()
    mine = LARS(ours.parameters(), momentum=momentum, weight_decay=decay, trust_coefficient=0.01, clip=clip)
    other = timm_optim.Lars(
        theirs.parameters(), momentum=momentum, weight_decay=decay, trust_coeff=0.01, eps=0.0, trust_clip=clip,
        always_adapt=True,
    )  # fmt: skip
    assert_together(ours, theirs, train(ours, mine, 1.0, rate), train(theirs, other, 1.0, rate))


@pytest.mark.parametrize("momentum, nesterov", [(0.9, False), (0.9, True), (0.0, False)])
def test_lars_and_optaxs(momentum, nesterov):
    """optax takes the norm of gradient and decay together: the same without decay. The rate may change."""
    optax = pytest.importorskip("optax")
    import jax

    with jax.enable_x64(True):
        ours, theirs = network(), network()
        transform = optax.lars(
            lambda count: changing(int(count)), weight_decay=0.0, trust_coefficient=0.01, eps=0.0, momentum=momentum,
            nesterov=nesterov,
        )  # fmt: skip
        mine = LARS(ours.parameters(), momentum=momentum, trust_coefficient=0.01, nesterov=nesterov)
        losses = train(ours, mine, 1.0, changing)
        assert_together(ours, theirs, losses, train_with_optax(theirs, transform))


def test_lamb_and_timms():
    timm_optim = pytest.importorskip("timm.optim", exc_type=ImportError)
    ours, theirs = network(), network()
    mine = LAMB(ours.parameters(), weight_decay=0.01, eps=1e-6)
    other = timm_optim.Lamb(theirs.parameters(), weight_decay=0.01, eps=1e-6, max_grad_norm=None, always_adapt=True)
    assert_together(ours, theirs, train(ours, mine, 0.02, changing), train(theirs, other, 0.02, changing))


def test_lamb_and_optaxs():
    optax = pytest.importorskip("optax")
    import jax

    with jax.enable_x64(True):
        ours, theirs = network(), network()
        transform = optax.lamb(lambda count: 0.02 * changing(int(count)), weight_decay=0.01, eps=1e-6)
        losses = train(ours, LAMB(ours.parameters(), weight_decay=0.01, eps=1e-6), 0.02, changing)
        assert_together(ours, theirs, losses, train_with_optax(theirs, transform))


def test_float32_stays_near():
    """Our kernel in float32 beside timm in float32."""
    timm_optim = pytest.importorskip("timm.optim", exc_type=ImportError)
    ours, theirs = network(torch.float32), network(torch.float32)
    mine = LARS(ours.parameters(), weight_decay=5e-4, trust_coefficient=0.002)
    other = timm_optim.Lars(theirs.parameters(), momentum=0.9, weight_decay=5e-4, trust_coeff=0.002, eps=0.0,
                            always_adapt=True)  # fmt: skip
    assert_together(ours, theirs, train(ours, mine, 1.0, constant), train(theirs, other, 1.0, constant), 1e-3)
