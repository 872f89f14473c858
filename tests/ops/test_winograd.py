"""Winograd's convolutions against convolutions in float64."""

import pytest
import torch
import torch.nn.functional as F
from ops.checks import BF16, FLOAT32, assert_within, check_operator, seed_anew, threads
from torch.nn.grad import conv2d_input, conv2d_weight

from knltrain.config import RunConfig
from knltrain.models.convolutions import eligible
from knltrain.models.fused import FusedConv2d
from knltrain.ops import winograd
from knltrain.ops.convgrad import Native, conv2d

# Images, channels in and out, groups, height, width, kernel, padding. Tiles are 4 x 4, panels 16 channels, and products
# take 14 tiles (6 with AVX2) and one or two panels at a time: some of each are left over. The last tiles of a column
# and of a row have 1 to 4 outputs, in every combination of those and the size of the kernel.
SIZES = [
    (1, 16, 16, 1, 1, 1, 3, (1, 1)), (2, 16, 48, 1, 4, 4, 3, (1, 1)), (3, 64, 96, 1, 14, 13, 3, (1, 1)),
    (1, 32, 80, 1, 7, 9, 3, (0, 0)), (2, 64, 32, 2, 9, 5, 3, (2, 0)), (5, 48, 16, 1, 6, 31, 3, (0, 2)),
    (1, 144, 112, 1, 33, 3, 3, (1, 1)), (2, 32, 64, 2, 13, 13, 5, (2, 2)), (1, 16, 32, 1, 5, 5, 5, (0, 0)),
    (3, 96, 96, 3, 8, 11, 5, (4, 1)),
    *((2, 16, 32, 1, 4 + rows, 4 + columns, kernel, (kernel // 2, kernel // 2))
      for kernel in (3, 5) for rows in range(1, 5) for columns in range(1, 5)),
]  # fmt: skip
# Root of the mean square error over that of the values, of y, dx and dw, by kernel. The direct sum's is 1e-7 to 1e-6.
MOST = {3: (1e-6, 1.5e-6, 1.5e-6), 5: (3e-6, 4e-6, 3e-6)}


@pytest.fixture(autouse=True)
def new_inputs_on_one_thread():
    seed_anew()
    with threads(1):
        yield


def channels_last(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def make_case(images, inputs, outputs, groups, height, width, kernel, padding, dtype=torch.float32):
    """x as it is after a ReLU, weights of He's initialisation, bias, dy."""
    x = channels_last(images, inputs, height, width).relu()
    fan_in = inputs // groups * kernel * kernel
    weight = channels_last(outputs, inputs // groups, kernel, kernel) * (2 / fan_in) ** 0.5
    dy = channels_last(*F.conv2d(x, weight, None, 1, padding, 1, groups).shape)
    return *(tensor.to(dtype) for tensor in (x, weight, torch.randn(outputs), dy)), list(padding), groups


def results(x, weight, bias, dy, padding, groups):
    return (
        winograd.conv2d(x, weight, bias, padding, groups),
        winograd.conv2d_input(dy, weight, padding, groups),
        winograd.conv2d_weight(x, dy, list(weight.shape), padding, groups)[0],
    )


def exact_results(x, weight, bias, dy, padding, groups):
    x, weight, bias, dy = (tensor.double() for tensor in (x, weight, bias, dy))
    geometry = (1, padding, 1, groups)
    return (
        F.conv2d(x, weight, bias, *geometry),
        conv2d_input(x.shape, weight, dy, *geometry),
        conv2d_weight(x, weight.shape, dy, *geometry),
    )


def assert_close(got, exact):
    for tensor, expected, name, most in zip(got, exact, ("y", "dx", "dw"), MOST[exact[2].shape[2]], strict=True):
        assert tensor.shape == expected.shape
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        if tensor.dtype == torch.bfloat16:
            assert_within(tensor, expected, BF16 * expected.abs() + 10 * most * expected.abs().max(), name)
            continue
        off = (tensor.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert off < most, f"{name}: {off:.2e}"
        worst = (tensor.double() - expected).abs().max() / expected.abs().max()
        assert worst < 10 * most, f"{name}: {worst:.2e} of the largest value"


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_is_the_convolution_in_float64(each_isa, size):
    case = make_case(*size)
    assert_close(results(*case), exact_results(*case))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("size", [*SIZES[:10], (1, 64, 128, 1, 7, 7, 3, (1, 1))], ids=str)
def test_of_bf16_it_is_rounded_once(each_isa, size, count):
    case = make_case(*size, dtype=torch.bfloat16)
    with threads(count):
        got = results(*case)
        assert {tensor.dtype for tensor in got} == {torch.bfloat16}
        assert_close(got, exact_results(*case))
        x, weight, _, dy, padding, groups = case
        _, dbias = winograd.conv2d_weight(x, dy, list(weight.shape), padding, groups, bias=True)
    exact = dy.double().sum((0, 2, 3))
    off = 64 * FLOAT32 * dy.double().abs().sum((0, 2, 3))
    assert dbias.dtype == torch.bfloat16
    assert_within(dbias, exact, BF16 * exact.abs() + off, "dbias")


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    "size", [*SIZES[:10], (1, 64, 128, 1, 7, 7, 3, (1, 1)), (9, 32, 48, 1, 30, 31, 3, (1, 1))], ids=str
)
def test_the_gradient_of_a_bias_comes_with_that_of_the_weights(each_isa, size, count):
    x, weight, _, dy, padding, groups = make_case(*size)
    dy += 1  # a sum of one sign shows what is left out, or counted twice
    with threads(count):
        dweight, dbias = winograd.conv2d_weight(x, dy, list(weight.shape), padding, groups, bias=True)
        alone, none = winograd.conv2d_weight(x, dy, list(weight.shape), padding, groups)
    assert torch.equal(dweight, alone)
    assert none is None
    exact = dy.double().sum((0, 2, 3))
    assert_within(dbias, exact, 64 * FLOAT32 * dy.double().abs().sum((0, 2, 3)), "dbias")


@pytest.mark.parametrize("name", ["alexnet_bn", "alexnet_bn_small", "resnet20", "resnet50", "torchvision:vgg16"])
def test_every_shape_of_the_networks(name, request):
    if name.startswith("torchvision:"):
        request.getfixturevalue("torchvision")
    size = {"alexnet_bn": 227, "alexnet_bn_small": 32, "resnet20": 32}.get(name, 224)
    found = {one for one in eligible(RunConfig(model=name, image_size=size), 10).values() if one.has_winograd()}
    assert len(found) >= 3
    for one in found:
        _, padding, _, groups = one.geometry
        case = make_case(1, one.channels, one.weight[0], groups, one.height, one.width, one.weight[2], padding)
        assert_close(results(*case), exact_results(*case))


# Where tiles are few, tasks have some of them and some of the outputs; where transformed weights take more than 3 MiB,
# they are read by larger blocks of tiles.
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(
    "size",
    [
        (9, 32, 48, 1, 30, 31, 3, (1, 1)), (1, 64, 128, 1, 7, 7, 3, (1, 1)), (2, 160, 160, 1, 14, 14, 3, (1, 1)),
        (4, 32, 96, 2, 27, 9, 5, (2, 2)),
    ],
    ids=str,
)  # fmt: skip
def test_any_number_of_threads_and_the_same_bits_each_time(size, count):
    case = make_case(*size)
    with threads(count):
        first = results(*case)
        for _ in range(3):
            assert all(map(torch.equal, results(*case), first))
    assert_close(first, exact_results(*case))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("size", [*SIZES[1:], (1, 64, 128, 1, 7, 7, 3, (1, 1))], ids=str)
def test_statistics_come_with_the_result(each_isa, size, count):
    x, weight, _, _, padding, groups = make_case(*size)
    with threads(count):
        y, mean, var = winograd.conv2d_and_statistics(x, weight, torch.randn(weight.shape[0]), padding, groups)
        assert torch.equal(y, winograd.conv2d(x, weight, None, padding, groups))
    exact_var, exact_mean = torch.var_mean(y.double(), dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-4, atol=1e-5)


def test_without_bias_it_is_without(each_isa):
    x, weight, _, _, padding, groups = make_case(*SIZES[2])
    zeros = torch.zeros(weight.shape[0])
    assert torch.equal(
        winograd.conv2d(x, weight, None, padding, groups), winograd.conv2d(x, weight, zeros, padding, groups)
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none_and_keeps_to_its_tiles(each_isa, bad):
    x, weight, bias, dy, padding, groups = make_case(1, 16, 16, 1, 24, 24, 3, (1, 1))
    good = winograd.conv2d(x, weight, bias, padding, groups)
    x[0, 3, 9, 9] = bad
    y = winograd.conv2d(x, weight, bias, padding, groups)
    assert not y[:, :, 8:11, 8:11].isfinite().any()
    assert torch.equal(y[:, :, 12:], good[:, :, 12:])
    dy[0, 3, 9, 9] = bad
    assert not winograd.conv2d_input(dy, weight, padding, groups)[:, :, 8:11, 8:11].isfinite().any()
    dweight, dbias = winograd.conv2d_weight(x, dy, list(weight.shape), padding, groups, bias=True)
    assert not dweight[3].isfinite().any()
    assert dbias.isfinite().tolist() == [channel != 3 for channel in range(16)]


def test_large_and_small_numbers(each_isa):
    """Transforms add up to 36 numbers, each a few times itself: there is room for those below 1e36."""
    for scale in (1e-30, 1e30):
        x, weight, bias, dy, padding, groups = make_case(*SIZES[2])
        case = (x * scale, weight, bias * scale, dy * scale, padding, groups)
        y, dx, _ = results(*case)
        exact_y, exact_dx, _ = exact_results(*case)
        for got, exact in ((y, exact_y), (dx, exact_dx)):
            assert ((got.double() - exact) / scale).square().mean() < (4e-6) ** 2 * (exact / scale).square().mean()


def test_no_images(each_isa):
    x, weight, bias, dy, padding, groups = make_case(*SIZES[2])
    y, dx, dw = results(x[:0], weight, bias, dy[:0], padding, groups)
    assert (y.shape[0], dx.shape[0]) == (0, 0)
    assert not dw.any()


@pytest.mark.parametrize("each_isa", ["torch", "avx2"], indirect=True)
def test_operators_are_as_declared(each_isa):
    x, weight, bias, dy, padding, groups = make_case(*SIZES[4])
    check_operator(torch.ops.knltrain.winograd_conv2d.default, x, weight, bias, padding, groups)
    shift = torch.zeros(weight.shape[0])
    check_operator(torch.ops.knltrain.winograd_conv2d_and_statistics.default, x, weight, shift, padding, groups)
    check_operator(torch.ops.knltrain.winograd_conv2d_input.default, dy, weight, padding, groups)
    check_operator(torch.ops.knltrain.winograd_conv2d_weight.default, x, dy, list(weight.shape), padding, groups, True)


@pytest.mark.parametrize(
    "change, wrong",
    [
        ({"x": lambda x: x.double()}, "x is torch.float64"),
        ({"x": lambda x: x.bfloat16()}, "weight is torch.float32; it must be torch.bfloat16"),
        ({"x": lambda x: x.contiguous()}, "x has shape .* channels-last"),
        ({"x": lambda x: x[:, :32]}, "does not go with 32 channels"),
        ({"weight": lambda w: w[:40]}, "multiples of 16"),
        ({"weight": lambda w: w[:, :, :2, :2]}, "3 x 3 or 5 x 5"),
        ({"bias": lambda b: b[:5]}, "bias has shape"),
        ({"padding": lambda p: [3, 1]}, r"padding \(3, 1\)"),
        ({"padding": lambda p: [-1, 1]}, r"padding \(-1, 1\)"),
        ({"groups": lambda g: 3}, "3 groups"),
        ({"groups": lambda g: 0}, "0 groups"),
        ({"x": lambda x: channels_last(3, 64, 1, 9), "padding": lambda p: [0, 0]}, "smaller than the kernel"),
    ],
)
def test_refuses_what_the_kernel_cannot_read(change, wrong):
    x, weight, bias, _, padding, groups = make_case(*SIZES[2])
    given = {"x": x, "weight": weight, "bias": bias, "padding": padding, "groups": groups}
    for name, function in change.items():
        given[name] = function(given[name])
    with pytest.raises(ValueError, match=wrong):
        winograd.conv2d(**given)


def test_refuses_a_gradient_of_another_shape():
    x, weight, _, _, padding, groups = make_case(*SIZES[2])
    with pytest.raises(ValueError, match="output has"):
        winograd.conv2d_weight(x, channels_last(3, 96, 13, 13), list(weight.shape), padding, groups)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("by", [Native(*([False] * i + [True] + [False] * (2 - i))) for i in range(3)], ids=str)
def test_conv2d_computes_as_it_is_told(by, with_bias, monkeypatch):
    x, weight, bias, dy, padding, groups = case = make_case(*SIZES[4])
    called = []
    for name in ("conv2d", "conv2d_input", "conv2d_weight"):
        function = getattr(winograd, name)
        monkeypatch.setattr(
            winograd, name, lambda *given, f=function, n=name, **more: called.append(n) or f(*given, **more)
        )
    sources = [tensor.requires_grad_() for tensor in (x, weight, *([bias] if with_bias else []))]
    y = conv2d(*sources, padding=tuple(padding), groups=groups, by=by)
    dx, dw, *dbias = torch.autograd.grad(y, sources, dy)
    assert called == [["conv2d", "conv2d_input", "conv2d_weight"][by.index(True)]]
    exact = exact_results(x, weight, bias if with_bias else torch.zeros_like(bias), *case[3:])
    assert_close((y, dx, dw), exact)
    for gradient in dbias:
        torch.testing.assert_close(gradient, dy.sum((0, 2, 3)))


def test_second_gradients_are_pytorchs():
    x, weight, _, _, padding, groups = make_case(*SIZES[4])
    x, weight = x.double().float().requires_grad_(), weight.requires_grad_()
    seconds = []
    for by in (Native(), Native(True, True, True)):
        y = conv2d(x, weight, padding=tuple(padding), groups=groups, by=by)
        gradients = torch.autograd.grad(y.square().sum(), (x, weight), create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), (x, weight)))
    for direct, ours in zip(*seconds, strict=True):
        torch.testing.assert_close(ours, direct, rtol=1e-4, atol=1e-4 * float(direct.abs().max()))


def test_any_layout_is_taken():
    x, weight, bias, dy, padding, groups = make_case(*SIZES[4])
    results = []
    for layout in (torch.channels_last, torch.contiguous_format):
        given = [t.detach().contiguous(memory_format=layout).requires_grad_() for t in (x, weight)]
        y = conv2d(*given, bias, padding=tuple(padding), groups=groups, by=Native(True, True, True))
        results.append((y, *torch.autograd.grad(y, given, dy)))
    assert all(map(torch.equal, *results))


def test_an_image_without_a_batch_is_one_of_a_batch():
    layer = FusedConv2d(16, 16, 3, padding=1)
    layer.by = Native(True, True, True)
    x = torch.randn(16, 9, 9)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias, padding=1))
