import pytest
import torch
from torch import nn

from knltrain.ops.lrn import local_response_norm

LAST = torch.channels_last


def formula(x, size, alpha):
    """In float64, one channel at a time."""
    y = torch.empty_like(x)
    for channel in range(x.shape[1]):
        around = x[:, max(0, channel - size // 2) : channel + size // 2 + 1]
        y[:, channel] = x[:, channel] / (1 + alpha / size * (around**2).sum(1)) ** 0.75
    return y


def both_ways(function, x, dy):
    x = x.detach().clone().requires_grad_()
    y = function(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    return y.detach(), dx


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size, alpha", [(5, 1e-4), (5, 0.5), (3, 0.1), (1, 1.0), (9, 2.0)])
@pytest.mark.parametrize(
    "shape", [(2, 1, 3, 4), (2, 2, 3, 4), (1, 7, 1, 1), (3, 17, 5, 1), (2, 96, 3, 4), (1, 259, 3, 3)]
)
def test_forward_and_backward_are_the_formulas(each_isa, generator, shape, size, alpha, dtype):
    x = (torch.randn(shape, generator=generator) * 3).to(dtype).to(memory_format=LAST)
    dy = torch.randn(shape, generator=generator).to(dtype).to(memory_format=LAST)
    y, dx = both_ways(lambda x: local_response_norm(x, size=size, alpha=alpha), x, dy)
    expected_y, expected_dx = both_ways(lambda x: formula(x, size, alpha), x.double(), dy.double())
    # Some ten roundings in float32, of which the largest term decides; then one to bf16.
    epsilon = 2**-20 + (2**-8 if dtype == torch.bfloat16 else 0)
    torch.testing.assert_close(y.double(), expected_y, rtol=epsilon, atol=1e-30)
    torch.testing.assert_close(
        dx.double(), expected_dx, rtol=epsilon, atol=2**-20 * float(dy.abs().max()) * (1 + alpha)
    )


def test_is_torchs(each_isa):
    x = torch.randn(2, 7, 3, 3) * 30
    torch.testing.assert_close(local_response_norm(x), nn.LocalResponseNorm(5)(x))


def test_computes_in_float32_under_autocast(each_isa):
    x = (torch.randn(2, 7, 3, 3) * 30).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = local_response_norm(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, local_response_norm(x.float()).bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
def test_keeps_the_layout(each_isa, layout):
    x = torch.randn(2, 8, 5, 5).to(memory_format=layout).requires_grad_()
    y = local_response_norm(x)
    assert y.is_contiguous(memory_format=layout)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.is_contiguous(memory_format=layout)


def test_nan_and_infinity_stay_in_their_windows(each_isa):
    x = torch.ones(1, 40, 1, 2).to(memory_format=LAST)
    x[0, 20, 0, 0], x[0, 30, 0, 1] = float("nan"), float("inf")
    y, dx = both_ways(lambda x: local_response_norm(x, alpha=1.0), x, torch.ones_like(x))
    channels = torch.arange(40)
    for pixel, odd_one in ((0, 20), (1, 30)):
        # The window of y is five channels; dx sees the windows of those.
        assert torch.equal(y[0, :, 0, pixel].isfinite(), (channels - odd_one).abs() > (2 if pixel == 0 else 0))
        assert dx[0, (channels - odd_one).abs() > 4, 0, pixel].isfinite().all()
        assert not dx[0, odd_one, 0, pixel].isfinite()


def test_huge_and_denormal_values(each_isa):
    x = torch.tensor([1e30, -1e30, 1e-39, 1e15, -1e-45, 3e38]).repeat(4).view(1, 24, 1, 1).to(memory_format=LAST)
    y, dx = both_ways(lambda x: local_response_norm(x, alpha=1e-4), x, torch.ones_like(x))
    expected = formula(x.double(), 5, 1e-4)
    # Squares beyond float32 make an infinite denominator, and what is divided by it 0 instead of about 1e-12.
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-11)
    assert dx.isfinite().all()


def test_tiny_values_pass_as_they_are(each_isa):
    x = torch.tensor([1e-39, -1e-45, 2e-38, 1e-20]).repeat(5).view(1, 20, 1, 1).to(memory_format=LAST)
    assert torch.equal(local_response_norm(x), x)


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_no_number_depends_on_the_threads(each_isa, generator, threads):
    x = torch.randn(3, 96, 23, 21, generator=generator).bfloat16().to(memory_format=LAST)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, threads, threads):
            torch.set_num_threads(count)
            results.append(both_ways(lambda x: local_response_norm(x, alpha=1.0), x, torch.ones_like(x)))
    finally:
        torch.set_num_threads(before)
    for y, dx in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(dx, results[0][1])


def test_keeps_only_its_input():
    kept = []
    x = torch.randn(2, 8, 6, 6).to(memory_format=LAST).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        local_response_norm(x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


def test_no_images_are_no_images(each_isa):
    x = torch.empty(0, 8, 6, 6).to(memory_format=LAST)
    y, dx = both_ways(local_response_norm, x, x)
    assert y.shape == dx.shape == x.shape


@pytest.mark.parametrize(
    "x, size, message",
    [
        (torch.zeros(1, 2, 4, 4, dtype=torch.float64), 5, "float64"),
        (torch.zeros(2, 4, 4), 5, "N x C x H x W"),
        (torch.zeros(1, 2, 4, 4), 4, "odd"),
        (torch.zeros(1, 2, 4, 4), -1, "odd"),
    ],
)
def test_refuses_what_the_kernel_cannot_read(each_isa, x, size, message):
    with pytest.raises(ValueError, match=message):
        local_response_norm(x, size=size)


@pytest.mark.parametrize("each_isa", ["torch", "avx2"], indirect=True)
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
def test_is_a_well_behaved_operator(each_isa, layout):
    x = torch.randn(2, 7, 3, 4).to(memory_format=layout).requires_grad_()
    torch.library.opcheck(torch.ops.knltrain.local_response_norm, (x, 5, 0.1))
