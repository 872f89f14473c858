"""conv_weight_grad and conv2d against convolutions in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from ops.checks import BF16, FLOAT32, assert_within, check_operator, seed_anew, threads
from torch.nn.grad import conv2d_input, conv2d_weight

from knltrain.ops import convgrad
from knltrain.ops.bf16 import conv2d_backward
from knltrain.ops.convgrad import conv2d, conv_weight_grad, kernel_is_faster

KERNELS = [(1, 1), (3, 3), (5, 5), (3, 1)]
STRIDES = [(1, 1), (2, 2), (2, 1)]
PADDINGS = [(0, 0), (1, 1), (2, 2)]
# Images, channels in, channels out, groups, height, width. Panels are 16, 32 or 48 channels wide, tiles 8; images go in
# pairs. Areas are prime where one side is 1, and outputs one pixel where the kernel is as large as the image.
SIZES = [
    (1, 16, 8, 1, 5, 7), (2, 32, 24, 1, 9, 5), (5, 48, 64, 1, 6, 11), (3, 96, 136, 1, 5, 5),
    (2, 64, 16, 2, 8, 7), (5, 32, 48, 2, 5, 13), (4, 96, 16, 1, 17, 19), (1, 64, 128, 1, 31, 29),
]  # fmt: skip


@pytest.fixture(autouse=True)
def new_inputs_on_one_thread(monkeypatch):
    # Where a processor has AMX, oneDNN is ahead; the kernel has to be right there too.
    monkeypatch.setattr(convgrad, "_has_amx", lambda: False)
    seed_anew()
    with threads(1):
        yield


def channels_last(*shape, dtype=torch.bfloat16):
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def make_case(size, kernel=(3, 3), stride=(1, 1), padding=(1, 1), dtype=torch.bfloat16):
    """The arguments of conv_weight_grad."""
    images, inputs, outputs, groups, height, width = size
    x = channels_last(images, inputs, height, width, dtype=dtype)
    weight_shape = [outputs, inputs // groups, *kernel]
    dy = torch.empty_like(F.conv2d(x, x.new_zeros(weight_shape), None, stride, padding, 1, groups))
    dy = channels_last(*dy.shape, dtype=dtype)
    return x, dy, weight_shape, list(stride), list(padding), groups


def check_case(case, got, dilation=(1, 1)):
    """Against float64, within rounding.

    A sum of n products in float32, in any order, is off by at most n units of roundoff of the sum of magnitudes.
    """
    x, dy, weight_shape, stride, padding, groups = case
    geometry = (stride, padding, dilation, groups)
    expected = conv2d_weight(x.double(), weight_shape, dy.double(), *geometry)
    magnitudes = conv2d_weight(x.double().abs(), weight_shape, dy.double().abs(), *geometry)
    terms = dy.numel() // dy.shape[1]
    half_ulp = BF16 if x.dtype == torch.bfloat16 else FLOAT32
    tolerance = (terms + 2) * FLOAT32 * magnitudes + half_ulp * expected.abs()
    assert got.dtype == x.dtype
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert_within(got, expected, tolerance, "dw")


# The three plainer variants leave the work to torch: one of them stands for all.
@pytest.mark.parametrize("each_isa", ["torch", "avx512", "avx512_bf16"], indirect=True)
@pytest.mark.parametrize("kernel, stride, padding", [*itertools.product(KERNELS, STRIDES, PADDINGS)])
def test_is_the_gradient_in_float64(each_isa, kernel, stride, padding, request):
    for size in SIZES:
        case = make_case(size, kernel, stride, padding)
        check_case(case, conv_weight_grad(*case))


# Channels in that are no multiple of 16: rows of the kernel, of 1 to 5 vectors, are what is packed; in float32, where
# channels out are a multiple of 16, nothing, and the last two have several blocks of an image.
UNEVEN = [
    (2, 3, 16, 1, 31, 29), (3, 1, 8, 1, 9, 7), (5, 17, 24, 1, 6, 11), (1, 24, 64, 1, 13, 12), (2, 3, 64, 1, 8, 40),
    (2, 3, 96, 1, 33, 41), (1, 5, 32, 1, 41, 39),
]  # fmt: skip


@pytest.mark.parametrize(
    "kernel, stride, padding",
    [*itertools.product(KERNELS, STRIDES, PADDINGS), ((7, 7), (2, 2), (3, 3)), ((11, 11), (4, 4), (2, 2))],
)
def test_is_the_gradient_in_float64_of_float32(each_isa, kernel, stride, padding):
    for size in SIZES + UNEVEN:
        if min(size[4:]) + 2 * min(padding) >= max(kernel):
            case = make_case(size, kernel, stride, padding, torch.float32)
            check_case(case, conv_weight_grad(*case))


@pytest.mark.parametrize("each_isa", ["torch", "avx512_bf16"], indirect=True)
@pytest.mark.parametrize("kernel, stride, padding", [((3, 3), (2, 1), (1, 1)), ((7, 7), (2, 2), (3, 3))])
def test_any_channels_in(each_isa, kernel, stride, padding):
    for size in UNEVEN:
        if min(size[4:]) + 2 * min(padding) >= max(kernel):
            case = make_case(size, kernel, stride, padding)
            check_case(case, conv_weight_grad(*case))


@pytest.mark.parametrize("outputs", [8, 16])
def test_nothing_beyond_the_tensors_is_read(each_isa, outputs):
    """The last row of the kernel at the last pixel ends within a vector of the tensor's end."""
    case = make_case((1, 3, outputs, 1, 9, 9), (3, 3), (2, 2), (0, 0), torch.float32)
    x = case[0]
    room = torch.full((x.numel() + 64,), float("nan"))
    inside = room[: x.numel()].view(1, 9, 9, 3).permute(0, 3, 1, 2)
    inside.copy_(x)
    assert torch.equal(conv_weight_grad(inside, *case[1:]), conv_weight_grad(*case))


def test_sums_of_many_pixels_round_little(each_isa):
    """One long sum of 100,000 products in float32 would be off by 4e-6 of the root mean square."""
    case = make_case((8, 16, 16, 1, 112, 112), (1, 1), (1, 1), (0, 0), torch.float32)
    x, dy, *_ = case
    exact = conv2d_weight(x.double(), case[2], dy.double())
    off = (conv_weight_grad(*case).double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert off < 1e-6


@pytest.mark.parametrize("height, width", [(1, 1), (1, 401), (401, 1), (1, 386), (27, 27), (2, 199)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_area(each_isa, kernel, height, width, dtype):
    """Blocks hold at most 384 pixels of an image or a pair."""
    case = make_case((3, 32, 24, 1, height, width), kernel, padding=(kernel[0] // 2, kernel[1] // 2), dtype=dtype)
    check_case(case, conv_weight_grad(*case))


@pytest.mark.parametrize("kernel, stride", [((5, 7), (1, 1)), ((5, 7), (2, 2)), ((3, 3), (2, 2)), ((1, 1), (2, 2))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_output_of_one_pixel(each_isa, kernel, stride, dtype):
    """The kernel covers the image, or nothing is left of it."""
    padding = (0, 0)
    case = make_case((5, 48, 24, 1, *kernel), kernel, stride, padding, dtype)
    assert case[1].shape[2:] == (1, 1)
    check_case(case, conv_weight_grad(*case))


# 512 x 3 x 3 x 64 sums are too many for every task to have its own: then tasks share out the channels, if they divide.
LARGE, SMALL = (6, 64, 512, 1, 9, 8), (7, 48, 24, 1, 13, 11)


@pytest.mark.parametrize(
    "each_isa, dtype",
    [("torch", torch.bfloat16), ("avx512_bf16", torch.bfloat16), ("avx2", torch.float32), ("avx512", torch.float32)],
    indirect=["each_isa"],
)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(
    "size", [LARGE, SMALL, (5, 128, 256, 2, 6, 7), (5, 3, 64, 1, 30, 30), (3, 3, 96, 1, 35, 34)], ids=str
)
def test_any_number_of_threads_and_the_same_bits_each_time(each_isa, dtype, size, count):
    case = make_case(size, dtype=dtype)
    with threads(count):
        first = conv_weight_grad(*case)
        for _ in range(3):
            assert torch.equal(conv_weight_grad(*case), first)
    check_case(case, first)


@pytest.mark.parametrize("each_isa", ["avx2", "avx512f", "avx512"], indirect=True)
def test_in_bf16_variants_without_it_are_torchs(each_isa):
    x, dy, weight_shape, stride, padding, groups = case = make_case(SMALL)
    weight = torch.empty(weight_shape, dtype=x.dtype, memory_format=torch.channels_last)
    _, expected, _ = conv2d_backward(dy, x, weight, None, stride, padding, (1, 1), groups, (False, True, False))
    assert torch.equal(conv_weight_grad(*case), expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("image", [0, 2])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_with_its_channel(each_isa, dtype, kernel, image, bad):
    """In a pixel that every position of the kernel meets; image 2 of 3 has no other to go in a pair with."""
    padding = (kernel[0] // 2, kernel[1] // 2)
    x, dy, *geometry = make_case((3, 48, 24, 1, 7, 9), kernel, padding=padding, dtype=dtype)
    clean = conv_weight_grad(x, dy, *geometry)
    spoilt = x.clone()
    spoilt[image, 20, 3, 4] = bad
    dw = conv_weight_grad(spoilt, dy, *geometry)
    others = torch.arange(48) != 20
    assert not dw[:, 20].isfinite().any()
    assert torch.equal(dw[:, others], clean[:, others])
    spoilt = dy.clone()
    spoilt[image, 13, 3, 4] = bad
    dw = conv_weight_grad(x, spoilt, *geometry)
    others = torch.arange(24) != 13
    assert not dw[13].isfinite().any()
    assert torch.equal(dw[others], clean[others])


@pytest.mark.parametrize("each_isa", ["torch", "avx512_bf16"], indirect=True)
@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_large_and_small_values(each_isa, scale):
    x, dy, *geometry = make_case(SMALL)
    dw = conv_weight_grad((x * scale).contiguous(memory_format=torch.channels_last), dy, *geometry)
    check_case(((x * scale), dy, *geometry), dw)


@pytest.mark.parametrize("each_isa", ["torch", "avx2", "avx512_bf16"], indirect=True)
@pytest.mark.parametrize("kernel, size", [((3, 3), SMALL), ((1, 1), (2, 16, 8, 1, 1, 1))])
def test_operator_is_as_declared(each_isa, kernel, size):
    case = make_case(size, kernel, padding=(kernel[0] // 2, kernel[1] // 2))
    check_operator(torch.ops.knltrain.conv_weight_grad.default, *case)


def test_no_images_have_no_gradient(each_isa):
    x, dy, *geometry = make_case(SMALL)
    assert not conv_weight_grad(x[:0], dy[:0], *geometry).any()


def good_call():
    geometry = {"weight_shape": [16, 16, 3, 3], "stride": [1, 1], "padding": [1, 1], "groups": 2}
    return {"x": channels_last(2, 32, 5, 7), "dy": channels_last(2, 16, 5, 7)} | geometry


WRONG = {
    "x in float64": {"x": torch.Tensor.double, "dy": torch.Tensor.double},
    "dy in float32": {"dy": torch.Tensor.float},
    "x NCHW": {"x": torch.Tensor.contiguous},
    "dy NCHW": {"dy": torch.Tensor.contiguous},
    "x of three dimensions": {"x": lambda x: x[0]},
    "x of other channels": {"x": lambda x: channels_last(2, 48, 5, 7)},
    "dy of other images": {"dy": lambda dy: dy[:1]},
    "dy of another height": {"dy": lambda dy: channels_last(2, 16, 4, 7)},
    "dy of other channels": {"dy": lambda dy: channels_last(2, 32, 5, 7)},
    "weight of half a vector": {"x": lambda x: x[:, :16].contiguous(memory_format=torch.channels_last),
                                "weight_shape": lambda _: [16, 8, 3, 3]},
    "weight of half a tile": {"weight_shape": lambda _: [24, 16, 3, 3]},
    "groups that are none": {"groups": lambda _: 0},
    "stride of zero": {"stride": lambda _: [0, 1]},
    "padding below zero": {"padding": lambda _: [1, -1]},
}  # fmt: skip
META = {f"{name} without a device": {name: lambda t: t.to("meta")} for name in ("x", "dy")}
EMPTY = {
    "kernel without pixels": {"weight_shape": lambda _: [16, 16, 0, 0], "dy": lambda _: channels_last(2, 16, 8, 10)}
}


@pytest.mark.parametrize("wrong", [*WRONG, *META, *EMPTY])
def test_refuses(wrong, request):
    call = good_call()
    conv_weight_grad(**call)
    call |= {name: change(call[name]) for name, change in (WRONG | META | EMPTY)[wrong].items()}
    with pytest.raises(ValueError, match=wrong.split()[0]):
        conv_weight_grad(**call)


def gradients(x, weight, bias, dy, geometry):
    sources = [tensor.detach().requires_grad_() for tensor in (x, weight, bias) if tensor is not None]
    x, weight, *rest = sources
    stride, padding, dilation, groups = geometry
    y = conv2d(x, weight, *rest, stride=stride, padding=padding, dilation=dilation, groups=groups)
    return y.detach(), *torch.autograd.grad(y, sources, dy)


# The kernel's own, then what is left to torch: 8 channels to a group, 4 outputs, holes in the kernel, float32.
@pytest.mark.parametrize(
    "size, dilation, dtype, ours",
    [
        ((3, 48, 24, 1, 13, 11), (1, 1), torch.bfloat16, True),
        ((2, 64, 32, 2, 9, 7), (1, 1), torch.bfloat16, True),
        ((2, 16, 24, 2, 9, 7), (1, 1), torch.bfloat16, False),
        ((2, 16, 4, 1, 9, 7), (1, 1), torch.bfloat16, False),
        ((2, 32, 24, 1, 9, 7), (2, 2), torch.bfloat16, False),
        ((2, 32, 24, 1, 9, 7), (1, 1), torch.float32, False),
    ],
)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("stride", [(1, 1), (2, 1)])
def test_conv2d_forward_and_backward(each_isa, size, dilation, dtype, ours, with_bias, stride, monkeypatch):
    images, inputs, outputs, groups, height, width = size
    geometry = (stride, (1, 1), dilation, groups)
    x = channels_last(images, inputs, height, width, dtype=dtype)
    weight = channels_last(outputs, inputs // groups, 3, 3, dtype=dtype)
    bias = torch.randn(outputs).to(dtype) if with_bias else None
    expected_y = F.conv2d(x, weight, bias, *geometry)
    dy = channels_last(*expected_y.shape, dtype=dtype)
    calls = []
    monkeypatch.setattr(convgrad, "conv_weight_grad", lambda *given: calls.append(1) or conv_weight_grad(*given))

    y, dx, dweight, *dbias = gradients(x, weight, bias, dy, geometry)

    assert len(calls) == (ours and each_isa == "avx512_bf16")
    half_ulp = BF16 if dtype == torch.bfloat16 else FLOAT32
    wide_bias = bias.double() if with_bias else None
    exact_y = F.conv2d(x.double(), weight.double(), wide_bias, *geometry)
    magnitudes = F.conv2d(x.double().abs(), weight.double().abs(), wide_bias.abs() if with_bias else None, *geometry)
    assert_within(y, exact_y, half_ulp * exact_y.abs() + (9 * inputs + 2) * FLOAT32 * magnitudes, "y")
    check_case((x, dy, list(weight.shape), stride, (1, 1), groups), dweight, dilation)
    arguments = (x.shape, weight.double(), dy.double(), *geometry)
    expected = conv2d_input(*arguments)
    magnitudes = conv2d_input(x.shape, weight.double().abs(), dy.double().abs(), *geometry)
    assert_within(dx, expected, half_ulp * expected.abs() + 9 * outputs * FLOAT32 * magnitudes, "dx")
    for gradient in dbias:
        dims, terms = (0, 2, 3), dy.numel() // outputs
        expected = dy.double().sum(dims)
        off = terms * FLOAT32 * dy.double().abs().sum(dims)
        assert_within(gradient, expected, half_ulp * expected.abs() + off, "dbias")


def test_conv2d_gives_what_is_asked_for(each_isa):
    """An image has no gradient, frozen weights have none, and neither changes the other's."""
    x, dy, shape, *_ = make_case(SMALL)
    weight, bias = channels_last(*shape), torch.randn(shape[0]).bfloat16()
    everything = gradients(x, weight, bias, dy, ((1, 1), (1, 1), (1, 1), 1))[1:]
    for wanted in itertools.product([False, True], repeat=3):
        if not any(wanted):
            continue
        tensors = [t.detach().requires_grad_(want) for t, want in zip((x, weight, bias), wanted, strict=True)]
        conv2d(*tensors, padding=(1, 1)).backward(dy)
        for tensor, gradient, want in zip(tensors, everything, wanted, strict=True):
            assert torch.equal(tensor.grad, gradient) if want else tensor.grad is None


def test_conv2d_takes_a_gradient_in_any_layout(each_isa):
    x, dy, shape, *_ = make_case(SMALL)
    weight, geometry = channels_last(*shape), ((1, 1), (1, 1), (1, 1), 1)
    dy = torch.randn(24).bfloat16()[None, :, None, None].expand(dy.shape)
    expanded = gradients(x, weight, None, dy, geometry)
    for layout in (torch.channels_last, torch.contiguous_format):
        assert all(
            map(torch.equal, gradients(x, weight, None, dy.contiguous(memory_format=layout), geometry), expanded)
        )


@pytest.mark.parametrize("each_isa", ["torch", "avx512_bf16"], indirect=True)
def test_conv2d_of_an_nchw_image_is_torchs(each_isa):
    x, dy, shape, *_ = make_case(SMALL)
    weight = channels_last(*shape)
    dw = gradients(x.contiguous(), weight, None, dy, ((1, 1), (1, 1), (1, 1), 1))[2]
    check_case((x, dy, shape, (1, 1), (1, 1), 1), dw.contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("each_isa", ["avx512_bf16"], indirect=True)
def test_amx_is_left_to_onednn(each_isa, monkeypatch):
    x, dy, shape, *_ = make_case(SMALL)
    weight = channels_last(*shape)
    assert kernel_is_faster(x, dy, weight, (1, 1), 1)
    monkeypatch.setattr(convgrad, "_has_amx", lambda: True)
    assert not kernel_is_faster(x, dy, weight, (1, 1), 1)
