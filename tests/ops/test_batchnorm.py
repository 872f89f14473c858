"""batch_norm_act against batch norm, addition and ReLU of plain torch in float64."""

import ctypes
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from ops.checks import BF16, FLOAT32, assert_within, check_operator, nans, seed_anew, threads
from torch import Tensor, nn

from knltrain.ops import native
from knltrain.ops.batchnorm import batch_norm_act

DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]
KERNELS = ["avx2", "avx512f", "avx512", "avx512_bf16"]
KINDS = [(residual, relu) for residual in (False, True) for relu in (False, True)]
# Channels around the vector widths of 8 and 16 and beyond the panels of 4096; rows around the blocks of 128.
SHAPES = [
    (2, 1, 3, 5), (5, 3, 9, 8), (1, 16, 4, 4), (3, 17, 5, 7), (2, 31, 1, 3), (4, 64, 7, 6), (1, 257, 2, 9),
    (2, 2048, 1, 1), (3, 5000, 2, 1), (1, 8, 8, 16), (1, 8, 3, 43), (5, 24, 33, 31),
]  # fmt: skip


@pytest.fixture(autouse=True)
def new_inputs_on_one_thread():
    seed_anew()
    with threads(1):
        yield


def channels_last(*shape, dtype=torch.float32, scale=1.0, mean=0.0):
    return (torch.randn(shape) * scale + mean).to(dtype).contiguous(memory_format=torch.channels_last)


@dataclasses.dataclass
class Case:
    """What batch_norm_act takes; ``dy`` is the gradient that comes back."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor
    dy: Tensor
    relu: bool
    training: bool
    momentum: float = 0.1
    eps: float = 1e-5
    cap: float | None = None

    def run(self):
        """y, the running statistics, and the gradients of x, weight, bias and residual."""
        sources = [
            t.detach().requires_grad_() for t in (self.x, self.weight, self.bias, self.residual) if t is not None
        ]
        x, weight, bias, *residual = sources
        mean, var = self.mean.clone(), self.var.clone()
        y = batch_norm_act(
            x, weight, bias, mean, var, residual=residual[0] if residual else None,
            relu=self.relu, cap=self.cap, training=self.training, momentum=self.momentum, eps=self.eps,
        )  # fmt: skip
        return [y.detach(), mean, var, *torch.autograd.grad(y, sources, self.dy)]


def make_case(shape, dtype, residual=False, relu=True, training=True, scale=1.0, mean=0.0):
    channels = shape[1]
    return Case(
        x=channels_last(*shape, dtype=dtype, scale=scale, mean=mean),
        residual=channels_last(*shape, dtype=dtype) if residual else None,
        weight=torch.randn(channels),
        bias=torch.randn(channels),
        mean=mean + torch.randn(channels) * scale,
        var=(torch.rand(channels) + 0.1) * scale**2,
        dy=channels_last(*shape, dtype=dtype),
        relu=relu,
        training=training,
    )


def kinds(each_isa, dtype):
    """All but the one of test_without_kernels_a_residual_needs_no_relu."""
    return [kind for kind in KINDS if (each_isa, dtype, *kind) != ("torch", torch.float32, True, False)]


def per_channel(vector):
    return vector[:, None, None, None].transpose(0, 1)


def check_case(case, what="", smallest=None):
    """Forward, running statistics and backward against float64, within what rounding can do.

    The kernels sum a block of up to 128 rows in float32, the first row's value subtracted. Each partial sum is
    rounded once, so a sum is off by at most 64 units of roundoff of the sum of magnitudes. The variance is the
    difference of two such sums: what is off in them grows with how far the first row is from the mean, in deviations.
    The mean is rounded to float32 before it is subtracted: with a mean of many deviations that is the largest error.
    ``smallest`` is the size of numbers taken for zero, by default only those that the type does not have.
    """
    case = dataclasses.replace(case, dy=case.dy.clone(memory_format=torch.preserve_format))
    inputs = [case.x, case.weight, case.bias] + ([case.residual] if case.residual is not None else [])
    x, weight, bias, *residual = sources = [t.double().requires_grad_() for t in inputs]
    running = [case.mean.double(), case.var.double()]
    z = F.batch_norm(x, *running, weight, bias, case.training, case.momentum, case.eps)
    if residual:
        z = z + residual[0]

    with torch.no_grad():
        if case.training:
            var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
            off_center = (x[0, :, 0, 0] - mean).square() / (var + case.eps)
            off = 64 * FLOAT32 * (1 + off_center)  # of the variance, relative
        else:
            mean, var = running
            off = torch.zeros_like(mean)
        inverse = (var + case.eps).rsqrt()
        normalized = (x - per_channel(mean)) * per_channel(inverse)
        mean_off = FLOAT32 * (mean.abs() + 64 * var.sqrt()) * inverse  # in deviations
        relative = per_channel(off) + 8 * FLOAT32
        z_off = relative * (normalized * per_channel(weight)).abs() + 4 * FLOAT32 * (z.abs() + per_channel(bias).abs())
        z_off += per_channel(mean_off * weight.abs()) + 4 * FLOAT32 * (residual[0].abs() if residual else 0)
        # Where rounding decides about the sign of z, both answers of ReLU's derivative are right: not tested. Nor at
        # the cap, which a result in bf16 is rounded to.
        if case.relu:
            case.dy[z.abs() <= z_off] = 0
        if case.cap:
            case.dy[(z - case.cap).abs() <= z_off + BF16 * case.cap] = 0

    y = z.clamp(0, case.cap) if case.relu else z
    expected = torch.autograd.grad(y, sources, case.dy.double())
    got_y, got_mean, got_var, *got = case.run()

    with torch.no_grad():
        half_ulp, tiny = (BF16, 2.0**-133) if case.x.dtype == torch.bfloat16 else (FLOAT32, 2.0**-149)
        tiny = smallest or tiny
        assert got_y.dtype == case.x.dtype
        assert got_y.is_contiguous(memory_format=torch.channels_last)
        assert_within(got_y, y, z_off + half_ulp * y.abs() + tiny, f"{what} y")
        if case.training:
            count = x.numel() // x.shape[1]
            mean_tolerance = case.momentum * mean_off / inverse + 4 * FLOAT32 * (running[0].abs() + mean.abs())
            assert_within(got_mean, running[0], mean_tolerance, f"{what} running mean")
            var_off = case.momentum * off * (var + case.eps) * count / (count - 1)
            assert_within(got_var, running[1], var_off + 8 * FLOAT32 * running[1], f"{what} running variance")
        else:
            assert torch.equal(got_mean, case.mean)
            assert torch.equal(got_var, case.var)

        dz = case.dy.double()
        if case.relu:
            dz = torch.where((z > 0) & (z < (case.cap or math.inf)), dz, 0)
        dims, rows = (0, 2, 3), x.numel() // x.shape[1]
        dbias_off = 66 * FLOAT32 * dz.abs().sum(dims)
        products = (dz * normalized).abs().sum(dims)
        dweight_off = (off + 72 * FLOAT32) * products + mean_off * dz.abs().sum(dims)
        dx_off = relative * dz.abs() + per_channel(mean_off * products / rows)
        if case.training:
            dx_off += per_channel((dbias_off + 8 * FLOAT32 * dz.sum(dims).abs()) / rows)
            dx_off += (per_channel(dweight_off) + 3 * relative * per_channel(products)) * normalized.abs() / rows
        dx_off *= per_channel(weight.abs() * inverse)
        assert_within(got[0], expected[0], dx_off + half_ulp * expected[0].abs() + tiny, f"{what} dx")
        assert_within(got[1], expected[1], dweight_off + tiny, f"{what} dweight")
        assert_within(got[2], expected[2], dbias_off + tiny, f"{what} dbias")
        if residual:
            assert torch.equal(got[3].double(), expected[3]), f"{what} dresidual"


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_torchs_in_float64(each_isa, shape, dtype, training):
    for residual, relu in kinds(each_isa, dtype):
        check_case(make_case(shape, dtype, residual, relu, training), f"residual={residual} relu={relu}")


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("shape", [(3, 17, 5, 7), (5, 24, 33, 31)], ids=str)
def test_relu_with_an_upper_bound(each_isa, shape, residual, dtype, training):
    case = make_case(shape, dtype, residual, training=training)
    case.cap = 0.75
    y = case.run()[0]
    assert 0.05 < (y == case.cap).float().mean() < 0.7
    check_case(case)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 6.0])
def test_an_upper_bound_takes_what_is_not_finite_as_relu6_does(each_isa, value, residual):
    """The last value is the bound. NaN passes the gradient as it does in ReLU; torch's ReLU6 has both answers."""
    case = make_case((2, 17, 5, 7), torch.float32, residual, training=False)
    case.cap, case.eps = 6.0, 0.0
    for tensor, exact in ((case.weight, 1), (case.var, 1), (case.bias, 0), (case.mean, 0), (case.dy, 1)):
        tensor.fill_(exact)
    case.x[1, 16, 2, 3] = value
    if residual:
        case.residual.zero_()
    x = case.x.clone().requires_grad_()
    expected = F.relu6(x)
    y, _, _, dx, *_ = case.run()
    torch.testing.assert_close(y, expected.detach(), equal_nan=True)
    (expected_dx,) = torch.autograd.grad(expected, x, case.dy)
    assert torch.equal(dx, torch.where(x.isnan(), case.dy, expected_dx))


@pytest.mark.parametrize("relu, cap", [(False, 6.0), (True, 0.0), (True, -1.0), (True, math.nan)])
def test_refuses_a_bound_that_is_none(relu, cap):
    case = make_case((2, 17, 5, 7), torch.float32, relu=relu)
    case.cap = cap
    with pytest.raises(ValueError, match="cap"):
        case.run()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 17, 5000])
def test_evaluates_a_single_pixel(each_isa, channels, dtype):
    for residual, relu in kinds(each_isa, dtype):
        check_case(make_case((1, channels, 1, 1), dtype, residual, relu, training=False))


@pytest.mark.parametrize("mean", [1e4, -1e4])
def test_mean_of_ten_thousand_deviations(each_isa, mean):
    check_case(make_case((4, 17, 23, 9), torch.float32, residual=True, mean=mean))


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads(each_isa, dtype, count):
    with threads(count):
        check_case(make_case((3, 40, 41, 29), dtype, residual=True))
        check_case(make_case((3, 40, 41, 29), dtype))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_run_after_run(each_isa, dtype, count):
    case = make_case((3, 40, 41, 29), dtype, residual=True)
    with threads(count):
        first = case.run()
        for _ in range(5):
            assert all(map(torch.equal, case.run(), first))


@pytest.mark.parametrize("each_isa", KERNELS, indirect=True)
@pytest.mark.parametrize(
    "shape, dtype, residual",
    [
        pytest.param((2, 64, 128, 129), torch.float32, True, id="fp32"),
        pytest.param((2, 64, 256, 129), torch.bfloat16, False, id="bf16"),
        pytest.param((2, 24, 209, 210), torch.float32, False, id="fp32 of 24 channels"),  # vectors of 8, and not of 16
    ],
)
def test_a_large_batch_is_evaluated_as_its_images_are(each_isa, shape, dtype, residual):
    """Results of more than 8 MiB a task are written around the caches, where all vectors are whole."""
    case = make_case(shape, dtype, residual, training=False)
    assert case.x[0].nbytes < 8 << 20 < case.x.nbytes
    y, _, _, dx, _, _, *dresidual = case.run()
    for part in (slice(0, 1), slice(1, 2)):
        alone = dataclasses.replace(
            case, x=case.x[part], dy=case.dy[part], residual=case.residual[part] if residual else None
        )
        expected_y, _, _, expected_dx, _, _, *expected_dresidual = alone.run()
        assert torch.equal(y[part], expected_y)
        assert torch.equal(dx[part], expected_dx)
        assert all(torch.equal(dresidual[0][part], expected) for expected in expected_dresidual)


@pytest.mark.parametrize("each_isa", KERNELS, indirect=True)
@pytest.mark.parametrize("members", [1, 2])
def test_a_runtime_that_gives_fewer_threads_than_there_are_tasks(each_isa, members):
    case = make_case((3, 40, 41, 29), torch.float32, residual=True)
    module, of_torch = native.kernels(), native._openmp_of_torch()
    current, asked = [0], []

    def parallel(function, data, count, _):
        asked.append(count)
        for current[0] in range(members):
            function(data)

    member = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    number = ctypes.CFUNCTYPE(ctypes.c_int)
    runtime = [
        ctypes.CFUNCTYPE(None, member, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)(parallel),
        number(lambda: current[0]),
        number(lambda: members),
    ]
    with threads(5):
        expected = case.run()
        try:
            module.use_openmp(*(ctypes.cast(function, ctypes.c_void_p).value for function in runtime))
            got = case.run()
        finally:
            module.use_openmp(*(of_torch or [0, 0, 0]))
    assert set(asked) == {5}
    assert all(map(torch.equal, got, expected))


# Squares of 1e17, 128 of them summed, are still float32 numbers.
@pytest.mark.parametrize("scale", [1e17, 1e-15])
def test_deviations_far_from_one(each_isa, scale):
    case = make_case((2, 17, 5, 7), torch.float32, scale=scale)
    case.eps = 1e-37
    check_case(case)


def test_rounding_makes_no_variance_negative(each_isa):
    """One zero, and a million numbers of which sums are exact in float32 and sums of squares rounded down."""
    x = torch.full((1, 1, 1024, 1024), 1 + 127 * 2.0**-16).to(memory_format=torch.channels_last)
    x[0, 0, 0, 0] = 0
    mean, var = torch.zeros(1), torch.zeros(1)
    y = batch_norm_act(x, torch.ones(1), torch.zeros(1), mean, var, training=True, momentum=1.0, eps=1e-7)
    assert 0 <= var <= 2e-6
    assert y.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_values_are_evaluated(each_isa, dtype):
    case = make_case((2, 17, 5, 7), dtype, relu=True, training=False, scale=1e18)
    case.x.mul_(1e12)
    check_case(case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_variance_beyond_float32_stays_in_its_channel_and_is_seen(each_isa, dtype):
    case = make_case((2, 17, 5, 7), dtype)
    y, mean, var, *_ = case.run()
    case.x[:, 3].mul_(1e30)
    huge_y, huge_mean, huge_var, *_ = case.run()
    assert not huge_var[3].isfinite()
    others = torch.arange(17) != 3
    for got, expected in ((huge_y[:, others], y[:, others]), (huge_mean[others], mean[others])):
        assert torch.equal(got, expected)
    assert torch.equal(huge_var[others], var[others])


@pytest.mark.parametrize("dtype, size", [(torch.float32, 1e-41), (torch.bfloat16, 1e-39)])
@pytest.mark.parametrize("relu", [True, False])
def test_denormal_values(each_isa, dtype, size, relu):
    """In and out; the smallest are 1.4e-45 in float32 and 9.2e-41 in bf16. AVX512_BF16 rounds those of bf16 to zero."""
    flushed = each_isa == "avx512_bf16" and dtype == torch.bfloat16
    case = make_case((2, 17, 5, 7), dtype, relu=relu, training=False)
    case.x = channels_last(2, 17, 5, 7).mul(size).to(dtype)
    case.dy = channels_last(2, 17, 5, 7).mul(size).to(dtype)
    case.mean.zero_()
    case.bias.zero_()
    case.weight.clamp_(-1, 1)  # so that no product is a normal number
    case.var.fill_(1.0)
    assert (case.run()[0] != 0).any() != flushed
    check_case(case, smallest=2.0**-126 if flushed else None)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_in_its_channel(each_isa, dtype, residual, bad, training):
    case = make_case((3, 37, 5, 7), dtype, residual, training=training)
    clean = case.run()
    channel = torch.arange(37) == 20
    case.x[1, 20, 2, 3] = bad
    got = case.run()
    for number, expected in zip(got, clean, strict=True):
        other = (slice(None), ~channel) if number.dim() == 4 else ~channel
        assert torch.equal(number[other], expected[other])
    y, mean, var, dx, dweight, *_ = got
    if training:
        assert y[:, channel].isnan().all()
        assert dx[:, channel].isnan().all()
        assert not any(vector[channel].isfinite() for vector in (mean, var, dweight))
    else:
        limit = torch.tensor(bad) * case.weight[20]
        torch.testing.assert_close(y[1, 20, 2, 3].float(), limit.relu(), equal_nan=True)
        rest = torch.ones(y.shape, dtype=torch.bool)
        rest[1, 20, 2, 3] = False
        assert torch.equal(y[rest], clean[0][rest])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_relu_passes_the_gradient_of_what_is_not_negative(each_isa, dtype, bad):
    """And of NaN, as torch's does."""
    case = make_case((3, 37, 5, 7), dtype, training=False)
    case.weight.abs_()
    case.x[1, 20, 2, 3] = bad
    dx = case.run()[3][1, 20, 2, 3]
    case.residual = torch.zeros_like(case.x)
    assert torch.equal(case.run()[3][1, 20, 2, 3], dx)
    z = torch.tensor(bad, requires_grad=True)
    (passes,) = torch.autograd.grad(z.relu(), z)
    assert (dx != 0) == passes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["weight", "bias", "mean"])
def test_a_parameter_that_is_no_number_makes_none_of_its_channel(each_isa, which, dtype):
    case = make_case((2, 37, 5, 7), dtype, relu=False, training=False)
    bad = torch.arange(37) % 12 == 3  # in the first vector and in the last
    getattr(case, which)[bad] = nans().repeat(2)[: int(bad.sum())]
    y, _, _, dx, *_ = case.run()
    assert torch.equal(y.isnan(), bad[None, :, None, None].expand_as(y))
    if which == "weight":
        assert torch.equal(dx.isnan(), bad[None, :, None, None].expand_as(dx))


@pytest.mark.parametrize("residual, relu", KINDS)
def test_a_gradient_that_is_no_number_stays_in_its_channel(each_isa, residual, relu):
    case = make_case((3, 37, 5, 7), torch.bfloat16, residual, relu)
    case.bias[20] = 100  # no ReLU between
    clean = case.run()
    case.dy[1, 20, 2, 3] = float("nan")
    got = case.run()
    others = torch.arange(37) != 20
    for number, expected in zip(got[3:], clean[3:], strict=True):
        here = (slice(None), others) if number.dim() == 4 else others
        assert torch.equal(number[here], expected[here])
    assert got[3][:, 20].isnan().all()
    assert got[4][20].isnan()
    assert got[5][20].isnan()


@pytest.mark.parametrize("each_isa", ["torch"], indirect=True)
def test_without_kernels_a_residual_needs_no_relu(each_isa):
    check_case(make_case((2, 3, 5, 7), torch.float32, residual=True, relu=False))


def test_running_statistics_are_batch_norm_2ds(each_isa):
    for momentum in (0.1, 0.3):
        theirs = nn.BatchNorm2d(19, momentum=momentum, dtype=torch.float64)
        mean, var = torch.zeros(19), torch.ones(19)
        for _ in range(4):
            x = channels_last(3, 19, 6, 5, mean=2.0, scale=3.0)
            batch_norm_act(x, torch.ones(19), torch.zeros(19), mean, var, training=True, momentum=momentum)
            theirs(x.double())
        torch.testing.assert_close(mean.double(), theirs.running_mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(var.double(), theirs.running_var, rtol=1e-4, atol=0)


def test_trains_without_running_statistics(each_isa):
    case = make_case((2, 17, 5, 7), torch.bfloat16)
    y = batch_norm_act(case.x, case.weight, case.bias, None, None, training=True)
    assert torch.equal(y, case.run()[0])


@pytest.mark.parametrize("residual", [True, False])
def test_statistics_that_are_known_are_taken(each_isa, residual):
    """They are the batch's: gradients are those of training."""
    case = make_case((2, 17, 5, 7), torch.float32, residual)
    sources = [tensor.detach().requires_grad_() for tensor in (case.x, case.weight, case.bias)]
    var, mean = torch.var_mean(case.x, dim=(0, 2, 3), correction=0)
    running, results = [], []
    for statistics in (None, (mean, var)):
        running.append((torch.zeros(17), torch.ones(17)))
        y = batch_norm_act(
            *sources, *running[-1], residual=case.residual, relu=False, training=True, statistics=statistics
        )
        results.append((y, *torch.autograd.grad(y, sources, case.dy)))
    for computed, known in zip((*results[0], *running[0]), (*results[1], *running[1]), strict=True):
        torch.testing.assert_close(known, computed, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="without training"):
        batch_norm_act(*sources, *running[0], training=False, statistics=(mean, var))


@pytest.mark.parametrize("residual, relu", [(True, True), (False, True), (False, False)])
def test_gradient_in_any_layout(each_isa, residual, relu):
    case = make_case((2, 17, 5, 7), torch.bfloat16, residual, relu)
    case.dy = torch.randn(17).bfloat16()[None, :, None, None].expand(2, 17, 5, 7)
    expanded = case.run()
    for layout in (torch.channels_last, torch.contiguous_format):
        case.dy = case.dy.contiguous(memory_format=layout)
        assert all(map(torch.equal, case.run(), expanded))


def saved(function):
    """The tensors that autograd keeps for the backward pass of ``function()``, and its result."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        result = function()
    return kept, result


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("residual, relu", KINDS)
def test_backward_keeps_input_and_result_at_most(each_isa, residual, relu, training):
    case = make_case((2, 17, 5, 7), torch.bfloat16, residual, relu, training)
    case.x.requires_grad_()
    kept, y = saved(
        lambda: batch_norm_act(
            case.x, case.weight, case.bias, case.mean, case.var, residual=case.residual, relu=relu, training=training
        )
    )
    large = {tensor.data_ptr() for tensor in kept if tensor.numel() > 17}
    assert large == ({case.x.data_ptr(), y.data_ptr()} if residual and relu else {case.x.data_ptr()})
    assert sum(tensor.numel() for tensor in kept if tensor.numel() <= 17) <= 4 * 17


@pytest.mark.parametrize("each_isa", ["torch", "avx2"], indirect=True)
@pytest.mark.parametrize(
    "dtype, shape",
    [(torch.float32, (2, 17, 5, 7)), (torch.bfloat16, (3, 1, 4, 4)), (torch.bfloat16, (3, 8, 1, 1))],
    ids=str,
)
def test_operators_are_as_declared(each_isa, dtype, shape):
    case = make_case(shape, dtype, residual=True)
    case.x.requires_grad_()
    case.weight.requires_grad_()
    forward, backward = torch.ops.knltrain.batch_norm_act.default, torch.ops.knltrain.batch_norm_act_backward.default
    for residual in (None, case.residual):
        for mean, var, training in ((None, None, True), (case.mean, case.var, True), (case.mean, case.var, False)):
            check_operator(forward, case.x, residual, case.weight, case.bias, mean, var, training, True, 1e-5,
                           None if training else 6.0)  # fmt: skip
    x, weight = case.x.detach(), case.weight.detach()
    for y, has_residual in ((None, False), (x.relu(), True)):
        vectors = (weight, case.bias, case.mean, case.var)
        check_operator(backward, case.dy, x, y, *vectors, has_residual, True, True, 1e-5,
                       6.0 if has_residual else None)  # fmt: skip


@pytest.mark.parametrize("residual", [True, False])
def test_no_images_are_no_images(each_isa, residual):
    case = make_case((0, 5, 3, 4), torch.bfloat16, residual, training=False)
    y, _, _, dx, dweight, dbias, *_ = case.run()
    assert y.shape == dx.shape == (0, 5, 3, 4)
    assert torch.equal(dweight, torch.zeros(5))
    assert torch.equal(dbias, torch.zeros(5))


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (1, 1, 1, 1)], ids=str)
def test_one_value_a_channel_cannot_be_trained_on(shape):
    with pytest.raises(ValueError, match="one value per channel"):
        make_case(shape, torch.float32).run()


def nchw(tensor):
    return tensor.contiguous(memory_format=torch.contiguous_format)


def broken(**changes):
    """An otherwise good call."""
    case = make_case((2, 4, 3, 5), torch.float32, residual=True)
    call = {name: getattr(case, name) for name in ("x", "weight", "bias", "residual", "training")}
    call |= {"running_mean": case.mean, "running_var": case.var}
    return call | {name: change(call[name]) for name, change in changes.items()}


WRONG = {
    "x in float64": {"x": Tensor.double},
    "x in float16": {"x": Tensor.half},
    "x NCHW": {"x": nchw},
    "x sliced": {"x": lambda x: x[:, :, :, ::2]},
    "x sparse": {"x": Tensor.to_sparse},
    "x of three dimensions": {"x": lambda x: x[0]},
    "weight in bf16": {"weight": Tensor.bfloat16},
    "weight of another size": {"weight": lambda w: w[:3]},
    "bias with gaps": {"bias": lambda b: b.repeat_interleave(2)[::2]},
    "bias of two dimensions": {"bias": lambda b: b[None]},
    "residual in bf16": {"residual": Tensor.bfloat16},
    "residual NCHW": {"residual": nchw},
    "residual of another shape": {"residual": lambda r: r[:1]},
}
STATISTICS = {
    "mean in float64": {"running_mean": Tensor.double},
    "mean without a device": {"running_mean": lambda m: m.to("meta")},
    "var of another size": {"running_var": lambda v: v[:3]},
}
META = {f"{name} without a device": {name: lambda t: t.to("meta")} for name in ("x", "weight", "bias", "residual")}


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("wrong", [*WRONG, *STATISTICS, *META])
def test_refuses(wrong, training, request):
    batch_norm_act(**broken(training=lambda _: training))
    call = broken(**(WRONG | STATISTICS | META)[wrong], training=lambda _: training)
    with pytest.raises(ValueError, match=wrong.split()[0]):
        batch_norm_act(**call)


def test_evaluates_with_statistics_only():
    with pytest.raises(ValueError, match="running statistics"):
        batch_norm_act(**broken(running_var=lambda _: None, training=lambda _: False))


def test_does_not_follow_half_of_the_statistics():
    with pytest.raises(ValueError, match="running"):
        batch_norm_act(**broken(running_var=lambda _: None))


def test_refuses_a_vector():
    with pytest.raises(ValueError, match="N x C x H x W"):
        batch_norm_act(**broken(x=lambda x: x.flatten()))


def test_refuses_a_gradient_of_another_type_or_shape():
    case = make_case((2, 4, 3, 5), torch.float32)
    arguments = [case.x, None, case.weight, case.bias, case.mean, case.var, False, True, True, 1e-5]
    for dy in (case.dy.bfloat16(), case.dy[:1]):
        with pytest.raises(ValueError, match="dy"):
            torch.ops.knltrain.batch_norm_act_backward(dy, *arguments)


def test_an_empty_batch_leaves_the_running_statistics(each_isa):
    mean, var = torch.full((4,), 2.0), torch.full((4,), 3.0)
    y = batch_norm_act(channels_last(0, 4, 3, 3), torch.ones(4), torch.zeros(4), mean, var, training=True)
    assert y.shape == (0, 4, 3, 3)
    assert (mean.tolist(), var.tolist()) == ([2.0] * 4, [3.0] * 4)


class Block(nn.Module):
    """Two normalisations and a shortcut, fused or in plain torch."""

    def __init__(self, fused):
        super().__init__()
        self.fused = fused
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.first, self.second = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def norm(self, module, x, residual=None):
        if not self.fused:
            y = module(x)
            return (y if residual is None else y + residual).relu()
        statistics = (module.running_mean, module.running_var)
        return batch_norm_act(x, module.weight, module.bias, *statistics, residual=residual, training=True)

    def forward(self, x):
        return self.norm(self.second, self.conv(self.norm(self.first, x)), residual=x)


def test_in_distributed_data_parallel(each_isa, tmp_path):
    plain, fused = Block(False).double(), Block(True).to(memory_format=torch.channels_last)
    fused.load_state_dict(plain.state_dict())
    alone = Block(True).to(memory_format=torch.channels_last)
    alone.load_state_dict(plain.state_dict())
    x, dy = channels_last(4, 8, 9, 7), channels_last(4, 8, 9, 7)
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        nn.parallel.DistributedDataParallel(fused)(x).backward(dy)
    finally:
        torch.distributed.destroy_process_group()
    alone(x).backward(dy)
    plain(x.double()).backward(dy.double())
    expected, by_itself = dict(plain.named_parameters()), dict(alone.named_parameters())
    for name, parameter in fused.named_parameters():
        assert torch.equal(parameter.grad, by_itself[name].grad), name
        reference = expected[name].grad
        size = float(reference.abs().max())
        torch.testing.assert_close(parameter.grad.double(), reference, rtol=0, atol=1e-4 * size, msg=name)
