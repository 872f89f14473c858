"""Convolutions of 1 x 1 against convolutions in float64."""

import pytest
import torch
import torch.nn.functional as F
from ops.checks import FLOAT32, assert_within, check_operator, seed_anew, threads
from torch.nn.grad import conv2d_input

from knltrain.ops import convgrad, pointwise
from knltrain.ops.convgrad import Geometry, Native

# Images, channels in and out, height, width, stride. Pixels are taken 14 (6 with AVX2) at a time, outputs one or two
# panels of 16, inputs 256: some of each are left over.
SIZES = [
    (1, 16, 16, 1, 1, (1, 1)), (2, 16, 48, 4, 4, (1, 1)), (3, 64, 96, 14, 13, (1, 1)), (1, 256, 80, 7, 9, (2, 2)),
    (2, 272, 32, 9, 5, (2, 1)), (5, 528, 16, 6, 31, (1, 3)), (1, 48, 208, 33, 3, (5, 5)), (2, 2048, 64, 7, 7, (1, 1)),
    (2, 64, 64, 41, 37, (2, 2)),
]  # fmt: skip


@pytest.fixture(autouse=True)
def new_inputs_on_one_thread():
    seed_anew()
    with threads(1):
        yield


def channels_last(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def make_case(images, inputs, outputs, height, width, stride):
    x, weight = channels_last(images, inputs, height, width), channels_last(outputs, inputs, 1, 1)
    dy = channels_last(*F.conv2d(x, weight, stride=stride).shape)
    return x, weight, torch.randn(outputs), dy, list(stride)


def results(x, weight, bias, dy, stride):
    return pointwise.conv2d(x, weight, bias, stride), pointwise.conv2d_input(dy, weight, x.shape[2:], stride)


def assert_close(got, x, weight, bias, dy, stride):
    """Within what a sum of so many products in float32, in any order, is off by at most."""
    y, dx = got
    wide = [tensor.double() for tensor in (x, weight, bias)]
    magnitudes = F.conv2d(*(tensor.abs() for tensor in wide), stride)
    assert_within(y, F.conv2d(*wide, stride), (weight.shape[1] + 2) * FLOAT32 * magnitudes, "y")
    arguments = (x.shape, weight.double(), dy.double(), stride)
    magnitudes = conv2d_input(x.shape, weight.double().abs(), dy.double().abs(), stride)
    assert_within(dx, conv2d_input(*arguments), (weight.shape[0] + 2) * FLOAT32 * magnitudes, "dx")
    assert all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in got)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_is_the_convolution_in_float64(each_isa, size):
    case = make_case(*size)
    assert_close(results(*case), *case)


# Where pixels are few, tasks share out the outputs too.
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [(9, 32, 48, 30, 31, (1, 1)), (1, 64, 512, 7, 7, (1, 1)), (3, 512, 64, 9, 9, (2, 2))])
def test_any_number_of_threads_and_the_same_bits_each_time(size, count):
    case = make_case(*size)
    with threads(count):
        first = results(*case)
        for _ in range(3):
            assert all(map(torch.equal, results(*case), first))
    assert_close(first, *case)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("size", [*SIZES[1:], (1, 64, 512, 7, 7, (1, 1))], ids=str)
def test_statistics_come_with_the_result(each_isa, size, count):
    x, weight, _, _, stride = make_case(*size)
    x += 3  # means are not zero
    with threads(count):
        y, mean, var = pointwise.conv2d_and_statistics(x, weight, torch.randn(weight.shape[0]), stride)
        assert torch.equal(y, pointwise.conv2d(x, weight, None, stride))
    exact_var, exact_mean = torch.var_mean(y.double(), dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-3, atol=1e-3)


def test_a_shift_near_the_means_keeps_the_digits_of_the_variance():
    """Means of a thousand times the deviation: of squares around zero, float32 would leave two digits."""
    x, weight, *_, stride = make_case(4, 64, 32, 20, 20, (1, 1))
    x, weight = x + 1000, weight.abs()
    y = pointwise.conv2d(x, weight, None, stride)
    exact_var, exact_mean = torch.var_mean(y.double(), dim=(0, 2, 3), correction=0)
    _, mean, var = pointwise.conv2d_and_statistics(x, weight, exact_mean.float(), stride)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-4, atol=0)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-6, atol=0)


def test_without_bias_it_is_without(each_isa):
    x, weight, *_, stride = make_case(*SIZES[2])
    zeros = torch.zeros(weight.shape[0])
    assert torch.equal(pointwise.conv2d(x, weight, None, stride), pointwise.conv2d(x, weight, zeros, stride))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none_and_keeps_to_its_pixel(each_isa, bad):
    x, weight, bias, dy, stride = make_case(2, 32, 48, 9, 8, (2, 2))
    good_y, good_dx = results(x, weight, bias, dy, stride)
    x[1, 3, 4, 6], dy[1, 3, 2, 3] = bad, bad
    y, dx = results(x, weight, bias, dy, stride)
    for got, good, row, column in ((y, good_y, 2, 3), (dx, good_dx, 4, 6)):
        assert not got[1, :, row, column].isfinite().any()
        got[1, :, row, column] = good[1, :, row, column]
        assert torch.equal(got, good)


def test_no_images(each_isa):
    x, weight, bias, dy, stride = make_case(*SIZES[2])
    y, dx = results(x[:0], weight, bias, dy[:0], stride)
    assert (y.shape[0], dx.shape[0]) == (0, 0)


@pytest.mark.parametrize("each_isa", ["torch", "avx2"], indirect=True)
def test_operators_are_as_declared(each_isa):
    x, weight, bias, dy, stride = make_case(*SIZES[3])
    check_operator(torch.ops.knltrain.pointwise_conv2d.default, x, weight, bias, stride)
    check_operator(
        torch.ops.knltrain.pointwise_conv2d_and_statistics.default, x, weight, torch.zeros(weight.shape[0]), stride
    )
    check_operator(torch.ops.knltrain.pointwise_conv2d_input.default, dy, weight, list(x.shape[2:]), stride)


@pytest.mark.parametrize(
    "change, wrong",
    [
        ({"x": lambda x: x.bfloat16()}, "x is torch.bfloat16"),
        ({"x": lambda x: x.contiguous()}, "x has shape .* channels-last"),
        ({"x": lambda x: x[:, :32]}, "does not go with x"),
        ({"weight": lambda w: w[:40]}, "multiples of 16"),
        ({"weight": lambda w: channels_last(96, 64, 3, 3)}, "1 x 1"),
        ({"bias": lambda b: b[:5]}, "bias has shape"),
        ({"stride": lambda s: [0, 1]}, r"stride \(0, 1\)"),
    ],
)
def test_refuses_what_the_kernel_cannot_read(change, wrong):
    x, weight, bias, _, stride = make_case(*SIZES[2])
    given = {"x": x, "weight": weight, "bias": bias, "stride": stride}
    for name, function in change.items():
        given[name] = function(given[name])
    with pytest.raises(ValueError, match=wrong):
        pointwise.conv2d(**given)


def test_refuses_a_gradient_of_another_shape():
    x, weight, _, dy, stride = make_case(*SIZES[3])
    with pytest.raises(ValueError, match="4 x 5 outputs"):
        pointwise.conv2d_input(dy[:, :, 1:].contiguous(memory_format=torch.channels_last), weight, x.shape[2:], stride)


@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
@pytest.mark.parametrize("by", [Native(*(i == j for j in range(3))) for i in range(3)], ids=str)
def test_conv2d_computes_as_it_is_told(by, stride, monkeypatch):
    x, weight, bias, dy, _ = make_case(2, 32, 48, 9, 8, stride)
    called = []
    for module, name in ((pointwise, "conv2d"), (pointwise, "conv2d_input"), (convgrad, "conv_weight_grad")):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, f=function, n=name: called.append(n) or f(*given))
    sources = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    y = convgrad.conv2d(*sources, stride=stride, by=by)
    dx, dweight, dbias = torch.autograd.grad(y, sources, dy)
    assert called == [["conv2d", "conv2d_input", "conv_weight_grad"][by.index(True)]]
    assert_close((y.detach(), dx), *(tensor.detach() for tensor in (x, weight, bias, dy)), stride)
    expected = convgrad.backward(dy, x.detach(), weight.detach(), [48], Geometry(stride), (True,) * 3, Native())
    torch.testing.assert_close((dweight, dbias), expected[1:], rtol=1e-5, atol=1e-4)
