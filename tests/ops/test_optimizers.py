"""The updates of LARS and SGD: every variant of the kernel, and plain torch, against float64."""

import math

import pytest
import torch
from ops.checks import nans, threads
from torch import nn

from knltrain.ops.optimizers import lars_step, sgd_step
from knltrain.optim import LARS

# One number, less and more than a vector, more than one chunk of 16384, a channels-last kernel.
SHAPES = [(1,), (3, 5), (16,), (33,), (16384,), (16385,), (70, 300), (8, 16, 3, 3)]
# Whether layers are adapted, rates clipped, and the buffer looked along.
VARIANTS = {
    "paper": (True, False, False),
    "larc": (True, True, False),
    "plain": (False, False, False),
    "nesterov": (True, False, True),
    "plain nesterov": (False, False, True),
}


def weights_of(generator, shapes=SHAPES, scale=1.0):
    made = [scale * torch.randn(shape, generator=generator) for shape in shapes]
    return [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in made]


def like(tensors, dtype=None, fill=None):
    return [torch.empty_like(t, dtype=dtype).fill_(fill) if fill is not None else torch.empty_like(t, dtype=dtype)
            for t in tensors]  # fmt: skip


def settings(count, *, lr=0.3, adapt=True, clip=False, nesterov=False, eps=1e-8):
    return {
        "lr": [lr] * count,
        "momentum": [0.9] * count,
        "weight_decay": [5e-4] * count,
        "trust_coefficient": [0.01] * count,
        "eps": [eps] * count,
        "adapt": [adapt] * count,
        "clip": [clip] * count,
        "nesterov": [nesterov] * count,
    }


def lars_in_float64(w, g, v, *, lr, momentum, weight_decay, trust_coefficient, eps, adapt, clip, nesterov):
    w, g, v = w.double(), g.double(), v.double()
    w_norm, g_norm = float(w.norm()), float(g.norm())
    rate = lr
    if adapt and w_norm != 0 and g_norm != 0:
        ratio = trust_coefficient * w_norm / (g_norm + (0 if clip else weight_decay * w_norm) + eps)
        rate = min(lr, ratio) if clip else lr * ratio
    own = rate * (g + weight_decay * w)
    v = momentum * v + own
    return w - (own + momentum * v if nesterov else v), v


def unknown(count):
    return torch.full((count,), torch.nan, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_lars_follows_float64(each_isa, generator, variant, dtype):
    adapt, clip, nesterov = VARIANTS[variant]
    weights, grads = weights_of(generator), [g.to(dtype) for g in weights_of(generator, scale=0.1)]
    weights[1].zero_()  # a norm of zero: the learning rate itself
    grads[3].zero_()
    buffers = weights_of(generator, scale=0.01)
    before = [v.clone() for v in buffers]
    copies = like(weights, torch.bfloat16)
    numbers = settings(len(weights), adapt=adapt, clip=clip, nesterov=nesterov)
    expected = [
        lars_in_float64(w, g, v, **{name: value[0] for name, value in numbers.items()})
        for w, g, v in zip(weights, grads, buffers, strict=True)
    ]
    lars_step(weights, grads, buffers, copies, unknown(len(weights)), **numbers)
    for w, v, copy, old, (w64, v64) in zip(weights, buffers, copies, before, expected, strict=True):
        # Four roundings of numbers no larger than these; old and new may nearly cancel.
        step = float(v64.abs().max() + old.abs().max())
        torch.testing.assert_close(v.double(), v64, rtol=1e-5, atol=4e-7 * step)
        torch.testing.assert_close(w.double(), w64, rtol=1e-6, atol=4e-7 * (step + float(w64.abs().max())))
        assert torch.equal(copy, w.to(torch.bfloat16))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_sgd_follows_torchs(each_isa, generator, nesterov, dtype):
    weights = weights_of(generator)
    params = [nn.Parameter(w.double()) for w in weights]
    theirs = torch.optim.SGD(params, lr=0.3, momentum=0.9, weight_decay=5e-4, nesterov=nesterov)
    buffers, copies = like(weights, fill=0.0), like(weights, torch.bfloat16)
    count = len(weights)
    for _ in range(3):
        grads = [g.to(dtype) for g in weights_of(generator, scale=0.1)]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.double()
        theirs.step()
        sgd_step(weights, grads, buffers, copies, lr=[0.3] * count, momentum=[0.9] * count,
                 weight_decay=[5e-4] * count, nesterov=[nesterov] * count)  # fmt: skip
    for w, copy, param in zip(weights, copies, params, strict=True):
        torch.testing.assert_close(w.double(), param.detach(), rtol=1e-5, atol=1e-6)
        assert torch.equal(copy, w.to(torch.bfloat16))


def test_the_carried_norm_is_the_one_that_would_be_found(each_isa, generator):
    """Bit for bit: a step that starts from carried norms and one that computes them are the same."""
    weights, grads = weights_of(generator), weights_of(generator, scale=0.1)
    buffers, copies, squares = like(weights, fill=0.0), like(weights, torch.bfloat16), unknown(len(weights))
    numbers = settings(len(weights))
    lars_step(weights, grads, buffers, copies, squares, **numbers)
    if each_isa != "torch":
        for w, square in zip(weights, squares.tolist(), strict=True):
            assert square == pytest.approx(float(w.double().square().sum()), rel=1e-12)
    twin, twin_buffers = [w.clone() for w in weights], [v.clone() for v in buffers]
    lars_step(weights, grads, buffers, copies, squares, **numbers)
    lars_step(twin, grads, twin_buffers, copies, unknown(len(weights)), **numbers)
    assert all(torch.equal(w, other) for w, other in zip(weights, twin, strict=True))


def test_a_weight_written_from_outside_has_its_norm_computed_anew(each_isa):
    layer = nn.Linear(64, 64, bias=False)
    optimizer = LARS(layer.parameters(), lr=1.0, trust_coefficient=0.01)
    optimizer.carries_norms = True

    def step_length():
        before = layer.weight.detach().clone()
        optimizer.state.clear()
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()
        return float((layer.weight.detach() - before).norm() / before.norm())

    assert step_length() == pytest.approx(0.01, rel=1e-4)
    with torch.no_grad():
        layer.weight.mul_(1000)
    assert step_length() == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e-41], ids=["huge", "tiny", "denormal"])
def test_norms_neither_overflow_nor_vanish(each_isa, generator, scale):
    weights, grads = weights_of(generator), weights_of(generator, scale=scale)
    buffers, copies = like(weights, fill=0.0), like(weights, torch.bfloat16)
    numbers = settings(len(weights), eps=0.0)
    one = {name: value[0] for name, value in numbers.items()} | {"weight_decay": 0.0}
    numbers["weight_decay"] = [0.0] * len(weights)
    expected = [lars_in_float64(w, g, v, **one) for w, g, v in zip(weights, grads, buffers, strict=True)]
    lars_step(weights, grads, buffers, copies, unknown(len(weights)), **numbers)
    if scale < 1e-38:  # the rate itself is beyond float32 there, and stops at its largest number
        assert all(w.isfinite().all() for w in weights)
        return
    for w, (w64, _) in zip(weights, expected, strict=True):
        torch.testing.assert_close(w.double(), w64, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_stays_in_its_layer_and_is_seen_there(each_isa, generator, value):
    weights, grads = weights_of(generator), weights_of(generator)
    grads[5].view(-1)[16384] = value
    before = [w.clone() for w in weights]
    buffers, copies = like(weights, fill=0.0), like(weights, torch.bfloat16)
    lars_step(weights, grads, buffers, copies, unknown(len(weights)), **settings(len(weights)))
    assert not weights[5].view(-1)[16384].isfinite()
    for index, (w, old) in enumerate(zip(weights, before, strict=True)):
        if index != 5:
            assert w.isfinite().all()
            assert not torch.equal(w, old)


def test_any_number_of_threads_gives_the_same_bits(each_isa, generator):
    weights, grads = weights_of(generator), weights_of(generator)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            mine, buffers = [w.clone() for w in weights], like(weights, fill=0.0)
            lars_step(mine, grads, buffers, like(weights, torch.bfloat16), unknown(len(weights)),
                      **settings(len(weights)))  # fmt: skip
            results.append(mine)
    finally:
        torch.set_num_threads(before)
    if each_isa != "torch":
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_long_list_is_updated_as_its_parameters_are(each_isa, generator):
    """Bit for bit, with every parameter's own numbers: LARS goes over gradients of more than 2 MiB in several parts."""
    sizes = [300_000, 20, 0, 16385, 300_000, 33, 100_000, 17, 530_000]
    count = len(sizes)
    weights, buffers = (weights_of(generator, [(size,) for size in sizes]) for _ in range(2))
    grads = [
        g.to(torch.bfloat16 if index % 3 == 1 else torch.float32)
        for index, g in enumerate(weights_of(generator, [(size,) for size in sizes]))
    ]
    copies, squares = like(weights, torch.bfloat16), unknown(count)
    numbers = settings(count) | {
        "lr": [0.1 * (index + 1) for index in range(count)],
        "momentum": [0.9 - 0.1 * index for index in range(count)],
        "weight_decay": [1e-4 * (index + 1) for index in range(count)],
        "adapt": [index % 4 != 1 for index in range(count)],
        "clip": [index % 2 == 1 for index in range(count)],
        "nesterov": [index >= 4 for index in range(count)],
    }
    of_sgd = {name: numbers[name] for name in ("lr", "momentum", "weight_decay", "nesterov")}
    mine = [[t.clone() for t in tensors] for tensors in (weights, buffers, copies)]
    my_squares = squares.clone()
    with threads(1):
        for _ in range(2):
            lars_step(weights, grads, buffers, copies, squares, **numbers)
        sgd_step(weights, grads, buffers, copies, **of_sgd)
        for index, (w, v, copy) in enumerate(zip(*mine, strict=True)):
            own, of_sgd_own = ({name: [value[index]] for name, value in all_.items()} for all_ in (numbers, of_sgd))
            for _ in range(2):
                lars_step([w], [grads[index]], [v], [copy], my_squares[index : index + 1], **own)
            sgd_step([w], [grads[index]], [v], [copy], **of_sgd_own)
            assert torch.equal(weights[index], w), index
            assert torch.equal(buffers[index], v), index
            assert torch.equal(copies[index], copy), index
    torch.testing.assert_close(squares, my_squares, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
def test_copies_are_rounded_to_the_nearest_and_ties_to_even(each_isa, offset):
    """Every fifth bf16 number, and what lies half-way to the next, beside that, and next to the number itself.

    With a learning rate of zero weights stay as they are. An aligned copy is written around the caches.
    """
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (torch.arange(-(2**15), 2**15, 5)[:, None] * 2**16 + lower).flatten().int()
    weight = torch.cat([bits.view(torch.float32), nans()])
    copy = weight.new_empty(len(weight) + offset, dtype=torch.bfloat16)[offset:]
    assert (copy.data_ptr() % 64 == 0) == (offset == 0)
    weight[weight.isinf()] = 1.0  # 0 times infinity is no number
    before, zeros = weight.clone(), torch.zeros_like(weight)
    sgd_step([weight], [zeros], [zeros.clone()], [copy], lr=[0.0], momentum=[0.0], weight_decay=[0.0], nesterov=[False])
    assert torch.equal(weight.isnan(), before.isnan())
    assert torch.equal(weight[~before.isnan()], before[~before.isnan()])
    if each_isa == "avx512_bf16":  # rounds denormal numbers to zero
        before[before.abs() < 2.0**-126] = 0
    expected = before.to(torch.bfloat16)
    assert torch.equal(copy.isnan(), expected.isnan())
    assert torch.equal(copy[~copy.isnan()], expected[~expected.isnan()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_tensors_may_begin_anywhere(each_isa, generator, dtype):
    """As parts of a flat buffer do; what lies around them stays."""
    results = []
    values = weights_of(generator, [(1000,)] * 3)
    for offset in (0, 3):
        made = [torch.full((1010,), 7.0).to(kind) for kind in (torch.float32, dtype, torch.float32, torch.bfloat16)]
        w, g, v, copy = parts = [t[offset : offset + 1000] for t in made]
        for part, given in zip(parts, values, strict=False):
            part.copy_(given)
        lars_step([w], [g], [v], [copy], unknown(1), **settings(1))
        assert all((t[:offset] == 7).all() and (t[offset + 1000 :] == 7).all() for t in made)
        results.append((w, v, copy))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("step", ["lars", "sgd"])
def test_layouts_that_differ_take_the_plain_way(each_isa, generator, step):
    weight = torch.randn(8, 16, 3, 3, generator=generator)
    grad = torch.randn(8, 16, 3, 3, generator=generator)
    results = []

    def update(w, g):
        lists = [w], [g], [torch.zeros_like(w)], [weight.new_empty(0).bfloat16()]
        if step == "lars":
            lars_step(*lists, unknown(1), **settings(1))
        else:
            sgd_step(*lists, lr=[0.3], momentum=[0.9], weight_decay=[5e-4], nesterov=[True])
        results.append(w.contiguous())

    update(weight.clone(), grad)
    update(weight.clone(), grad.contiguous(memory_format=torch.channels_last))
    # Every other number: what lies between is no part of it.
    wide, wide_grad = (t.repeat_interleave(2, dim=3) for t in (weight, grad))
    update(wide[..., ::2], wide_grad[..., ::2])
    assert torch.equal(wide[..., 1::2], weight)
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-6, atol=1e-7)


WRONG = {
    "params[0] in bf16": lambda call: call["params"].__setitem__(0, call["params"][0].bfloat16()),
    "grads[0] in float64": lambda call: call["grads"].__setitem__(0, call["grads"][0].double()),
    "grads[0] of another shape": lambda call: call["grads"].__setitem__(0, call["grads"][0][:2]),
    "momentum_buffers[0] in bf16": lambda call: call["momentum_buffers"].__setitem__(
        0, call["momentum_buffers"][0].bfloat16()
    ),
    "copies[0] in float32": lambda call: call["copies"].__setitem__(0, call["copies"][0].float()),
    "squares of another length": lambda call: call.__setitem__("squares", unknown(3)),
    "every other list": lambda call: call["momentum_buffers"].pop(),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_refuses(wrong):
    weights = [torch.randn(4, 4)]
    call = {"params": weights, "grads": like(weights, fill=1.0), "momentum_buffers": like(weights, fill=0.0),
            "copies": like(weights, torch.bfloat16), "squares": unknown(1)}  # fmt: skip
    lars_step(**call, **settings(1))
    WRONG[wrong](call)
    with pytest.raises(ValueError, match=wrong.split("[")[0].split()[0]):
        lars_step(**call, **settings(1))


@pytest.mark.parametrize("each_isa", ["torch", "avx2"], indirect=True)
def test_operators_are_what_torch_library_asks_for(each_isa):
    weights = [torch.randn(5, 3), torch.randn(20)]
    numbers = settings(2)
    torch.library.opcheck(
        torch.ops.knltrain.lars_step.default,
        (weights, like(weights, fill=1.0), like(weights, fill=0.0), like(weights, torch.bfloat16), unknown(2),
         *numbers.values()),
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.knltrain.sgd_step.default,
        (weights, like(weights, fill=1.0), like(weights, fill=0.0), like(weights, torch.bfloat16), [0.1] * 2,
         [0.9] * 2, [0.0] * 2, [False] * 2),
    )  # fmt: skip


def test_a_weight_that_was_saved_for_backward_may_not_be_stepped_before_it():
    weight = torch.ones(4, requires_grad=True)
    loss = (weight * weight).sum()
    with torch.no_grad():
        sgd_step([weight], [torch.ones(4)], [torch.zeros(4)], [torch.empty(0, dtype=torch.bfloat16)], lr=[0.1],
                 momentum=[0.9], weight_decay=[0.0], nesterov=[False])  # fmt: skip
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
