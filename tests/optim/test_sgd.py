"""SGD as Goyal et al. give it: torch's fused one against the formula with momentum correction."""

import numpy as np
import pytest
import torch

from knltrain.config import OptimConfig, RunConfig
from knltrain.optim import build_optimizer

STEPS = 25


def rate(step):
    return 0.1 + 0.3 * step / 5 if step < 5 else 0.4 if step < 15 else 0.04


def momentum_corrected(weight, gradients, *, momentum, decay, nesterov):
    """Goyal et al. 2017, equation 9 with remark 2: the rate is inside the buffer, whose old part is corrected."""
    velocity = np.zeros_like(weight)
    for step, gradient in enumerate(gradients):
        lr = rate(step)
        full = gradient + decay * weight
        correction = lr / rate(step - 1) if step else 1.0
        velocity = momentum * correction * velocity + lr * full
        weight = weight - (lr * full + momentum * velocity if nesterov else velocity)
    return weight


@pytest.mark.parametrize("variant", ["heavy-ball", "nesterov"])
def test_sgd_has_momentum_correction(variant):
    rng = np.random.default_rng(0)
    model = torch.nn.Linear(6, 4, bias=False)
    weight = rng.normal(size=(4, 6))
    gradients = rng.normal(size=(STEPS, 4, 6))
    model.weight.data = torch.tensor(weight, dtype=torch.float32)
    optimizer = build_optimizer(model, OptimConfig(name="sgd", variant=variant, weight_decay=1e-2))
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        model.weight.grad = torch.tensor(gradients[step], dtype=torch.float32)
        optimizer.step()
    expected = momentum_corrected(weight, gradients, momentum=0.9, decay=1e-2, nesterov=variant == "nesterov")
    np.testing.assert_allclose(model.weight.detach().numpy(), expected, rtol=2e-5, atol=2e-5)


def test_linear_scaling():
    optim = OptimConfig(name="sgd", variant="nesterov", lr=0.1, lr_scaling="linear")
    assert RunConfig(optim=optim, global_batch=8192).peak_lr == pytest.approx(3.2)
    assert RunConfig(optim=OptimConfig(lr=7.0), global_batch=8192).peak_lr == 7.0
