import pytest
import torch
from torch import nn

from knltrain.ops.lrn import local_response_norm


def formula(x, size, alpha):
    """In float64, one channel at a time."""
    y = torch.empty_like(x)
    for channel in range(x.shape[1]):
        around = x[:, max(0, channel - size // 2) : channel + size // 2 + 1]
        y[:, channel] = x[:, channel] / (1 + alpha / size * (around**2).sum(1)) ** 0.75
    return y


@pytest.mark.parametrize("size, alpha", [(5, 1e-4), (5, 0.5), (3, 0.1), (1, 1.0)])
@pytest.mark.parametrize("channels", [1, 2, 7, 96])
def test_forward_and_backward_are_the_formulas(size, alpha, channels):
    torch.manual_seed(0)
    x = (torch.randn(2, channels, 3, 4, dtype=torch.float64) * 3).requires_grad_()
    weights = torch.randn_like(x)
    expected = formula(x, size, alpha)
    (expected_grad,) = torch.autograd.grad((expected * weights).sum(), x)
    single = x.detach().float().to(memory_format=torch.channels_last).requires_grad_()
    y = local_response_norm(single, size=size, alpha=alpha)
    (grad,) = torch.autograd.grad((y * weights.float()).sum(), single)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-5, atol=1e-5)


def test_is_torchs():
    x = torch.randn(2, 7, 3, 3) * 30
    torch.testing.assert_close(local_response_norm(x), nn.LocalResponseNorm(5)(x))


def test_computes_in_float32_under_autocast():
    x = (torch.randn(2, 7, 3, 3) * 30).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = local_response_norm(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, local_response_norm(x.float()).bfloat16(), rtol=0, atol=0)


def test_keeps_channels_last():
    x = torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    y = local_response_norm(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.is_contiguous(memory_format=torch.channels_last)
