import pytest
import torch
import torch.nn.functional as F

from knltrain.ops.dropout import dropout

LAST = torch.channels_last


def seeded(seed, function):
    torch.manual_seed(seed)
    return function()


def both_ways(x, dy, **arguments):
    x = x.detach().clone().requires_grad_()
    y = seeded(0, lambda: dropout(x, **arguments))
    (dx,) = torch.autograd.grad(y, x, dy)
    return y.detach(), dx


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 17), (5, 33, 3, 2), (128, 257)])
def test_scales_what_it_keeps_both_ways(each_isa, generator, shape, p, dtype, relu):
    x = torch.randn(shape, generator=generator).to(dtype)
    dy = torch.randn(shape, generator=generator).to(dtype)
    y, dx = both_ways(x, dy, p=p, relu=relu)
    # Ones show the mask: the same seed drops the same positions.
    kept = both_ways(torch.ones_like(x), dy, p=p)[0] > 0
    passed = kept & (x > 0) if relu else kept
    rounding = 2**-22 + (2**-8 if dtype == torch.bfloat16 else 0)
    torch.testing.assert_close(y.double(), (x.double() / (1 - p)).where(passed, 0), rtol=rounding, atol=0)
    torch.testing.assert_close(dx.double(), (dy.double() / (1 - p)).where(passed, 0), rtol=rounding, atol=0)
    assert y.dtype == dx.dtype == dtype


@pytest.mark.parametrize("p", [0.05, 0.5, 0.8])
def test_drops_with_the_probability_and_independently(each_isa, generator, p):
    count = 1 << 20
    dropped = seeded(generator.initial_seed(), lambda: dropout(torch.ones(count), p)).eq(0).double() - p
    again = dropout(torch.ones(count), p).eq(0).double() - p
    deviation = (p * (1 - p)) ** 0.5
    # Means and correlations of so many independent numbers lie within six of their standard deviations.
    assert abs(dropped.mean()) < 6 * deviation / count**0.5
    for distance in (1, 2, 8, 16, 257, 4096, 65536):
        assert abs((dropped[:-distance] * dropped[distance:]).mean()) < 6 * deviation**2 / (count - distance) ** 0.5
    assert abs((dropped * again).mean()) < 6 * deviation**2 / count**0.5
    blocks = dropped.view(1024, 1024).sum(1) / (deviation * 32)
    assert 0.7 < blocks.var() < 1.3


@pytest.mark.parametrize("bit", [0, 7, 16, 31])
@pytest.mark.parametrize("word", [0, 1])
def test_keys_that_differ_in_a_bit_give_unrelated_masks(each_isa, word, bit):
    key = torch.tensor([0x12345678, 0x9ABCDEF0])
    other = key.clone()
    other[word] ^= 1 << bit
    count = 1 << 18
    one, two = (torch.ops.knltrain.dropout(torch.ones(count), k, 0.5, False) > 0 for k in (key, other))
    assert abs((one == two).double().mean() - 0.5) < 6 * 0.5 / count**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("relu", [False, True])
def test_every_variant_drops_the_same(each_isa, monkeypatch, dtype, relu):
    x = torch.linspace(-3, 3, 70001).to(dtype)
    y, dx = both_ways(x, x.flip(0), p=0.3, relu=relu)
    monkeypatch.setattr("knltrain.ops.dropout.kernels", lambda: None)
    assert torch.equal(y, both_ways(x, x.flip(0), p=0.3, relu=relu)[0])
    assert torch.equal(dx, both_ways(x, x.flip(0), p=0.3, relu=relu)[1])


def test_the_mask_is_one_of_memory_positions(each_isa):
    x = torch.ones(2, 5, 3, 4).to(memory_format=LAST)
    y, dx = both_ways(x, torch.ones(2, 5, 3, 4), p=0.5)
    assert y.is_contiguous(memory_format=LAST)
    assert torch.equal(y, dx)
    flat = both_ways(torch.ones(120), torch.ones(120), p=0.5)[0]
    assert torch.equal(y.permute(0, 2, 3, 1).flatten(), flat)


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_no_number_depends_on_the_threads(each_isa, generator, threads):
    x = torch.randn(100_003, generator=generator)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            results.append(both_ways(x, x, p=0.5))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_follows_torchs_generator(each_isa):
    x = torch.ones(4096)
    first, again = seeded(3, lambda: dropout(x)), seeded(3, lambda: dropout(x))
    assert torch.equal(first, again)
    assert not torch.equal(first, dropout(x))


@pytest.mark.parametrize("relu", [False, True])
def test_keeps_nan_infinity_huge_and_denormal_values_or_drops_them(each_isa, relu):
    x = torch.tensor([float("nan"), float("inf"), float("-inf"), 3e38, 1e-39, -1e-45, -0.0]).repeat(300)
    y, dx = both_ways(x, torch.ones_like(x), p=0.5, relu=relu)
    kept = both_ways(torch.ones_like(x), torch.ones_like(x), p=0.5)[0] > 0
    wide = F.relu(x) if relu else x
    torch.testing.assert_close(y, (wide * 2).where(kept, 0.0), rtol=0, atol=0, equal_nan=True)
    # As in torch, ReLU passes the gradient of NaN on.
    torch.testing.assert_close(dx, torch.where(kept & (wide > 0 if relu else True) | (kept & x.isnan()), 2.0, 0.0))


def test_all_none_and_evaluation(each_isa):
    x = torch.tensor([1.0, -2.0, float("nan")])
    y, dx = both_ways(x, torch.ones(3), p=1.0)
    assert torch.equal(y, torch.zeros(3))
    assert torch.equal(dx, torch.zeros(3))
    assert dropout(x, 0.5, training=False) is x
    assert torch.equal(dropout(x[:2], 0.5, training=False, relu=True), torch.tensor([1.0, 0.0]))
    assert dropout(torch.empty(0, 4)).shape == (0, 4)


@pytest.mark.parametrize("relu", [False, True])
def test_keeps_no_mask(relu):
    kept = []
    x = torch.randn(64, 64).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = dropout(x, relu=relu)
    # The key, and the result that the next layer keeps too.
    assert sorted(t.numel() for t in kept) == ([2, y.numel()] if relu else [2])


@pytest.mark.parametrize(
    "x, p, message",
    [
        (torch.zeros(3), 1.5, "between 0 and 1"),
        (torch.zeros(3), float("nan"), "between 0 and 1"),
        (torch.zeros(3, dtype=torch.float64), 0.5, "float64"),
        (torch.zeros(3, 4).T, 0.5, "contiguous"),
        (torch.zeros(3, 4)[:, ::2], 0.5, "contiguous"),
    ],
)
def test_refuses_what_the_kernel_cannot_read(each_isa, x, p, message):
    with pytest.raises(ValueError, match=message):
        dropout(x, p)


def test_backward_refuses_results_of_another_layout(each_isa):
    dy, key = torch.zeros(2, 3, 4, 5), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="laid out as dy"):
        torch.ops.knltrain.dropout_backward(dy, dy.to(memory_format=LAST), key, 0.5)
    with pytest.raises(ValueError, match="y has shape"):
        torch.ops.knltrain.dropout_backward(dy, dy[:1], key, 0.5)


@pytest.mark.parametrize("each_isa", ["torch", "avx2"], indirect=True)
@pytest.mark.parametrize("relu", [False, True])
def test_is_a_well_behaved_operator(each_isa, relu):
    x = torch.randn(2, 5, 3, 4).to(memory_format=LAST).requires_grad_()
    torch.library.opcheck(torch.ops.knltrain.dropout, (x, torch.tensor([1, 2**32 - 1]), 0.5, relu))
