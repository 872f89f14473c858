import pytest
import torch
import torch.nn.functional as F

from knltrain.ops.pool import max_pool2d

LAST = torch.channels_last
# Images, channels, height, width, and what torch's function takes.
GEOMETRIES = [
    ((2, 64, 14, 13), {"kernel_size": 3, "stride": 2, "padding": 1}),  # ResNet's stem
    ((2, 96, 14, 13), {"kernel_size": 3, "stride": 2, "ceil_mode": True}),  # AlexNet's
    ((3, 17, 6, 9), {"kernel_size": 2}),
    ((1, 1, 7, 7), {"kernel_size": 3, "stride": 1, "padding": 1}),
    ((2, 3, 5, 8), {"kernel_size": (1, 4), "stride": (2, 3), "padding": (0, 2)}),
    ((2, 33, 9, 4), {"kernel_size": (4, 3), "stride": (3, 1), "padding": (2, 1), "ceil_mode": True}),
    ((1, 40, 8, 7), {"kernel_size": 2, "stride": 3, "ceil_mode": True}),  # windows that leave pixels out
    ((1, 31, 20, 17), {"kernel_size": (15, 17), "stride": 1}),  # as large as they come
    ((1, 16, 1, 1), {"kernel_size": 1}),
    ((2, 5, 3, 2), {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}),
    # A window more would begin at the first pixel beyond the image.
    ((2, 21, 4, 7), {"kernel_size": 2, "stride": 4, "padding": (0, 1), "ceil_mode": True}),
]


def both_ways(function, x, dy):
    x = x.clone().requires_grad_()
    y = function(x)
    (dx,) = torch.autograd.grad(y, x, dy(y))
    return y.detach(), dx


def assert_is_torchs(x, generator, *, relu=False, **geometry):
    """Results to the bit; gradients added up in float64 and rounded once."""
    made = {}

    def dy(y):
        if not made:
            made["dy"] = torch.randn(y.shape, generator=generator).to(x.dtype).to(memory_format=LAST)
        return made["dy"].to(y.dtype)

    y, dx = both_ways(lambda x: max_pool2d(x, **geometry, relu=relu), x, dy)
    expected = both_ways(lambda x: F.relu(F.max_pool2d(x, **geometry)) if relu else F.max_pool2d(x, **geometry),
                         x.double(), dy)  # fmt: skip
    assert y.dtype == dx.dtype == x.dtype
    assert y.is_contiguous(memory_format=LAST)
    assert dx.is_contiguous(memory_format=LAST)
    torch.testing.assert_close(y, expected[0].to(x.dtype), rtol=0, atol=0, equal_nan=True)
    # One rounding of a sum of a few float32 numbers.
    rtol, atol = (2**-8, 1e-6) if x.dtype == torch.bfloat16 else (1e-6, 1e-6)
    torch.testing.assert_close(dx.double(), expected[1], rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape, geometry", GEOMETRIES)
def test_is_torchs(each_isa, generator, shape, geometry, dtype, relu):
    x = torch.randn(shape, generator=generator).to(dtype).to(memory_format=LAST)
    assert_is_torchs(x, generator, relu=relu, **geometry)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("values", [(-1.0, 0.0, 1.0), (-0.0, 0.0), (-1.0, -2.0), (float("-inf"), -3e38)])
def test_the_first_of_equal_ones_gets_the_gradient(each_isa, generator, values, relu):
    choice = torch.randint(len(values), (2, 19, 7, 6), generator=generator)
    x = torch.tensor(values)[choice].to(memory_format=LAST)
    assert_is_torchs(x, generator, relu=relu, kernel_size=3, stride=2, padding=1)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_inf_huge_and_denormal_values_go_where_torch_puts_them(each_isa, generator, dtype, relu):
    special = torch.tensor([float("nan"), float("inf"), float("-inf"), 3e38, -3e38, 1e-39, -1e-39, 1.0])
    x = special[torch.randint(len(special), (3, 21, 8, 9), generator=generator)].to(dtype).to(memory_format=LAST)
    # As ReLU passes the gradient of NaN on, so does this.
    assert_is_torchs(x, generator, relu=relu, kernel_size=3, stride=2, padding=1)


def test_infinite_gradients_stay_where_they_belong(each_isa):
    x = torch.arange(16.0).view(1, 1, 4, 4).to(memory_format=LAST).requires_grad_()
    y = max_pool2d(x, 3, 1)
    (dx,) = torch.autograd.grad(y, x, torch.tensor([[float("inf"), 1.0], [float("nan"), 2.0]]).view(1, 1, 2, 2))
    expected = torch.zeros(1, 1, 4, 4)
    expected[0, 0, 2, 2], expected[0, 0, 2, 3] = float("inf"), 1.0
    expected[0, 0, 3, 2], expected[0, 0, 3, 3] = float("nan"), 2.0
    torch.testing.assert_close(dx, expected, equal_nan=True)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_no_number_depends_on_the_threads(each_isa, generator, threads):
    x = torch.randn(3, 64, 23, 21, generator=generator).bfloat16().to(memory_format=LAST)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, threads, threads):
            torch.set_num_threads(count)
            results.append(both_ways(lambda x: max_pool2d(x, 3, 2, 1), x, lambda y: torch.ones_like(y) / 3))
    finally:
        torch.set_num_threads(before)
    for y, dx in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(dx, results[0][1])


def test_keeps_one_byte_a_result():
    kept = []
    x = torch.randn(2, 8, 6, 6).to(memory_format=LAST).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = max_pool2d(x, 2, relu=True)
    assert [(t.dtype, t.numel()) for t in kept] == [(torch.uint8, y.numel())]


def test_no_images_are_no_images(each_isa):
    x = torch.empty(0, 8, 6, 6).to(memory_format=LAST).requires_grad_()
    y = max_pool2d(x, 3, 2)
    assert y.shape == (0, 8, 2, 2)
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize(
    "x, arguments, message",
    [
        (torch.zeros(1, 2, 4, 4), {"kernel_size": 2}, "channels-last"),
        (torch.zeros(2, 4, 4), {"kernel_size": 2}, "N x C x H x W"),
        (torch.zeros(1, 2, 4, 4, dtype=torch.float64).to(memory_format=LAST), {"kernel_size": 2}, "float64"),
        (torch.zeros(1, 2, 4, 4).to(memory_format=LAST), {"kernel_size": 5}, "no room"),
        (torch.zeros(1, 2, 4, 4).to(memory_format=LAST), {"kernel_size": 3, "padding": 2}, "half the kernel"),
        (torch.zeros(1, 2, 4, 4).to(memory_format=LAST), {"kernel_size": 2, "padding": -1}, "between 0 and half"),
        (torch.zeros(1, 2, 4, 4).to(memory_format=LAST), {"kernel_size": 2, "stride": 0}, "positive"),
        (torch.zeros(1, 2, 30, 30).to(memory_format=LAST), {"kernel_size": 16}, "at most 255 pixels"),
    ],
)
def test_refuses_what_the_kernel_cannot_read(each_isa, x, arguments, message):
    with pytest.raises(ValueError, match=message):
        max_pool2d(x, **arguments)


def test_backward_refuses_a_winner_of_another_shape(each_isa):
    dy = torch.zeros(1, 2, 2, 2).to(memory_format=LAST)
    winner = torch.zeros(1, 2, 1, 2, dtype=torch.uint8).to(memory_format=LAST)
    with pytest.raises(ValueError, match="winner has shape"):
        torch.ops.knltrain.max_pool2d_backward(dy, winner, 4, 4, [2, 2], [2, 2], [0, 0])


@pytest.mark.parametrize("each_isa", ["torch", "avx2"], indirect=True)
@pytest.mark.parametrize("relu", [False, True])
def test_is_a_well_behaved_operator(each_isa, relu):
    x = torch.randn(2, 5, 7, 6).to(memory_format=LAST).requires_grad_()
    torch.library.opcheck(torch.ops.knltrain.max_pool2d, (x, [3, 3], [2, 2], [1, 1], True, relu))
