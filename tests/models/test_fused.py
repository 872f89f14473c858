"""The engine fused: what it changes in a model, what it must not change, and that it trains as float32 does."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small_networks import add_small_networks, why_no_engine
from torch import nn

from knltrain import models
from knltrain.config import OptimConfig, RunConfig
from knltrain.models import fused, model_of
from knltrain.models.convolutions import eligible
from knltrain.models.fused import fuse
from knltrain.ops.convgrad import Geometry, Native, native_results
from knltrain.ops.native import load_error
from knltrain.optim import SGD, build_optimizer
from knltrain.training.engine import build_engine

pytestmark = pytest.mark.skipif(load_error() is not None, reason=f"no native kernels: {load_error()}")

MODELS = [("alexnet", 67), ("alexnet_bn", 67), ("alexnet_bn_small", 32), ("resnet20", 32), ("resnet50", 64)]
THEIRS = [("torchvision:resnet18", 64), ("torchvision:resnet50", 64), ("torchvision:vgg11_bn", 32),
          ("torchvision:mobilenet_v2", 64)]  # fmt: skip


def channels_last(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


def engine_of(name, image_size, precision, *, engine="fused", dropout=None, lr=0.005, seed=0):
    optim = OptimConfig(name="sgd", variant="heavy-ball", lr=lr, weight_decay=1e-4)
    torch.manual_seed(seed)
    model = model_of(RunConfig(model=name, image_size=image_size, dropout=dropout), 10)
    return build_engine(engine, precision, model, build_optimizer(model, optim))


def losses(name, image_size, precision, engine, *, steps, batch, lr, seed=0):
    dropout = 0.0 if name == "alexnet_bn" else None
    made = engine_of(name, image_size, precision, engine=engine, dropout=dropout, lr=lr, seed=seed)
    generator = torch.Generator().manual_seed(1 + seed)
    labels = torch.randint(10, (64,), generator=generator)
    images = torch.randn(64, 3, image_size, image_size, generator=generator) + 0.3 * labels.view(-1, 1, 1, 1)
    values = []
    for step in range(steps):
        chosen = torch.arange(step * batch, (step + 1) * batch) % 64
        made.optimizer.zero_grad(set_to_none=True)
        with made.autocast():
            logits = made.model(images[chosen].to(made.dtype, memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), labels[chosen])
        loss.backward()
        made.optimizer.step()
        values.append(loss.item())
    return torch.tensor(values)


def first_gradients(name, image_size, precision, engine):
    made = engine_of(name, image_size, precision, engine=engine, dropout=0.0)
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(10, (16,), generator=generator)
    images = torch.randn(16, 3, image_size, image_size, generator=generator) + 0.3 * labels.view(-1, 1, 1, 1)
    with made.autocast():
        logits = made.model(images.to(made.dtype, memory_format=torch.channels_last))
    F.cross_entropy(logits.float(), labels).backward()
    return {layer: gradient.float() for layer, gradient in made.gradients().items()}


def test_bf16_gradients_are_as_near_to_float32_as_autocasts():
    """Layer by layer, in one step: runs drift apart by chance, for ReLU and pooling turn on roundings."""
    if reason := why_no_engine("eager", "bf16"):
        pytest.skip(reason)
    reference = first_gradients("alexnet_bn", 67, "fp32", "eager")

    def errors(engine):
        found = first_gradients("alexnet_bn", 67, "bf16", engine)
        return {layer: float((found[layer] - exact).norm() / exact.norm()) for layer, exact in reference.items()}

    autocast, ours = errors("eager"), errors("fused")
    assert {layer: error for layer, error in ours.items() if error > 1.25 * autocast[layer]} == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, image_size, lr, steps, seeds",
    [("small_resnet", 32, 0.005, 20, 1), ("resnet20", 32, 0.02, 24, 1), ("alexnet_bn", 67, 0.02, 20, 3)],
)
def test_steps_stay_in_the_band_of_bf16_autocast(name, image_size, lr, steps, seeds, monkeypatch):
    """How far bf16 may lead from float32 is not for us to say: stock autocast's distance is the measure.

    The distances of one run of AlexNet-BN are anywhere from half to twice each other: it takes the mean of several.
    """
    if reason := why_no_engine("eager", "bf16"):
        pytest.skip(reason)
    add_small_networks(monkeypatch.setitem)
    autocast = ours = 0.0
    for seed in range(seeds):
        run = {"steps": steps, "batch": 16, "lr": lr, "seed": seed}
        reference = losses(name, image_size, "fp32", "eager", **run)
        assert reference[-8:].mean() < 0.9 * reference[:8].mean()
        autocast += float((losses(name, image_size, "bf16", "eager", **run) - reference).abs().mean()) / seeds
        ours += float((losses(name, image_size, "bf16", "fused", **run) - reference).abs().mean()) / seeds
    assert ours < 1.5 * autocast, f"{ours:.4f} from float32, autocast {autocast:.4f}"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name, image_size", MODELS + THEIRS)
def test_state_dicts_stay_what_they_were(name, image_size, precision, request):
    if name.startswith("torchvision:"):
        request.getfixturevalue("torchvision")
    torch.manual_seed(0)
    before = model_of(RunConfig(model=name, image_size=image_size), 10).state_dict()
    after = engine_of(name, image_size, precision).state_dict()
    assert list(after) == list(before)
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype, key
        assert torch.equal(after[key], tensor), key


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name, image_size", MODELS + THEIRS)
def test_computes_what_the_plain_model_computes(name, image_size, training, request):
    if name.startswith("torchvision:"):
        request.getfixturevalue("torchvision")
    dropout = None if "resnet" in name else 0.0  # the kernel drops others than torch does
    plain, ours = (engine_of(name, image_size, "fp32", engine=engine, dropout=dropout).model.train(training)
                   for engine in ("eager", "fused"))  # fmt: skip
    images = channels_last(4, 3, image_size, image_size)
    exact = copy.deepcopy(plain).double()
    if list(plain.buffers()):
        exact(images.double())
    results = []
    for model in (plain, ours):
        torch.manual_seed(0)
        logits = model(images)
        logits.square().sum().backward()
        results.append((logits.detach(), [parameter.grad for parameter in model.parameters()]))
    (expected, expected_grads), (logits, grads) = results
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
    whole = torch.stack([grad.norm() for grad in expected_grads]).norm()
    for grad, other in zip(grads, expected_grads, strict=True):
        # A ReLU that flips at a rounding error moves a gradient; a wrong one is off by its own size. The gradient of a
        # bias before a batch norm is nothing but rounding.
        assert (grad - other).norm() <= 0.1 * other.norm() + 1e-5 * whole
    for buffer, other, true in zip(ours.buffers(), plain.buffers(), exact.buffers(), strict=True):
        # Fifty layers multiply rounding errors; how much float32 may be off is what the plain model's is.
        off, usual = ((one.double() - true.double()).norm() for one in (buffer, other))
        assert off <= 5 * usual + 1e-6 * true.double().norm()


def native_everywhere(model):
    """Has native kernels compute all that they can, and says of how many forward passes statistics can be taken."""
    convolutions = [module for module in model.modules() if isinstance(module, fused.FusedConv2d)]
    for one in convolutions:
        geometry = Geometry(one.stride, one.padding, one.dilation, one.groups)
        one.by = native_results(one.in_channels, tuple(one.weight.shape), geometry)
    return sum(one.by.forward and one.bias is None for one in convolutions)


def sequential(*, num_classes, image_size, dropout=0.0):
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32),
        nn.Conv2d(32, 16, 1), nn.BatchNorm2d(16), nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes),
    )  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "name, image_size", [("resnet20", 32), ("resnet50", 64), ("torchvision:mobilenet_v2", 64), ("sequential", 32)]
)
def test_batch_norms_take_statistics_from_the_kernels(name, image_size, training, monkeypatch, request):
    """Of the network's blocks; the stem's batch norm, after a convolution of PyTorch's, computes its own."""
    if name.startswith("torchvision:"):
        request.getfixturevalue("torchvision")
    monkeypatch.setitem(models.MODELS, "sequential", sequential)
    torch.manual_seed(0)
    config = RunConfig(model=name, image_size=image_size, dropout=None if "resnet" in name else 0.0)
    plain = model_of(config, 10).double().train(training)
    ours = copy.deepcopy(plain).float().to(memory_format=torch.channels_last)
    fuse(ours)
    count, taken = native_everywhere(ours), []
    original = fused.conv2d_and_statistics
    monkeypatch.setattr(fused, "conv2d_and_statistics", lambda *given: taken.append(1) or original(*given))
    images, labels = channels_last(8, 3, image_size, image_size), torch.randint(10, (8,))
    F.cross_entropy(ours(images), labels).backward()
    F.cross_entropy(plain(images.double()), labels).backward()
    assert len(taken) == (count if training else 0)
    exact = [parameter.grad for parameter in plain.parameters()]
    whole = torch.stack([gradient.norm() for gradient in exact]).norm()
    for parameter, gradient in zip(ours.parameters(), exact, strict=True):
        # As above: a ReLU that flips at a rounding error moves a gradient, a wrong one is off by its own size.
        assert (parameter.grad.double() - gradient).norm() <= 0.1 * gradient.norm() + 1e-5 * whole
    for buffer, true in zip(ours.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(buffer.double(), true.double(), rtol=1e-3, atol=1e-4)


def test_in_bf16_winograds_algorithm_is_as_near_to_float32_as_direct_sums_are():
    """The gradient of a whole network, in which batch norms take their statistics from the kernels."""
    config = RunConfig(model="resnet20", image_size=32)
    images, labels = channels_last(16, 3, 32, 32), torch.randint(10, (16,))
    by_winograd = {path: list(Native._fields) for path, one in eligible(config, 10).items() if one.has_winograd()}
    assert len(by_winograd) == 16
    gradients = []
    for precision, convolutions in (("fp32", {}), ("bf16", {}), ("bf16", by_winograd)):
        torch.manual_seed(0)
        model = model_of(config, 10).to(memory_format=torch.channels_last)
        engine = build_engine("fused", precision, model, build_optimizer(model, config.optim), convolutions)
        with engine.autocast():
            logits = engine.model(images.to(engine.dtype))
        F.cross_entropy(logits.float(), labels).backward()
        gradients.append(torch.cat([gradient.flatten().float() for gradient in engine.gradients().values()]))
    exact, direct, ours = gradients
    assert (ours - direct).norm() > 0
    assert (ours - exact).norm() < 1.5 * (direct - exact).norm() < 0.15 * exact.norm()


def test_layers_that_the_kernels_do_not_have_stay_as_they_are():
    layers = [
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(3, 8, 3, padding="same"),
        nn.BatchNorm2d(8, affine=False),
        nn.BatchNorm2d(8, momentum=None),
        nn.BatchNorm2d(8, track_running_stats=False),
        nn.MaxPool2d(2, dilation=2),
        nn.MaxPool2d(2, return_indices=True),
        nn.Sequential(nn.ReLU(), nn.BatchNorm2d(8, affine=False), nn.ReLU()),
    ]
    model = nn.ModuleList(layers)
    before = [type(module) for module in model.modules()]
    fuse(model)
    assert [type(module) for module in model.modules()] == before


class Attention(nn.Module):
    """As a block of a vision transformer begins."""

    def __init__(self, p):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.dropout = nn.Dropout(p)

    def forward(self, x):
        return self.dropout(self.attention(x, x, x, need_weights=False)[0])


def test_dropout_takes_what_attention_gives():
    torch.manual_seed(0)
    x, model = torch.randn(4, 5, 8), Attention(0.0)
    expected = model(x)
    assert not expected.is_contiguous()
    ours = copy.deepcopy(model)
    fuse(ours)
    torch.testing.assert_close(ours(x), expected)
    ours.dropout.p = 0.5
    some = ours(x)
    some.sum().backward()
    kept = some != 0
    assert 0.3 < kept.float().mean() < 0.7
    torch.testing.assert_close(some[kept], 2 * expected[kept])
    assert ours.attention.in_proj_weight.grad.norm() > 0


def test_a_relu_joins_its_neighbour_once(monkeypatch):
    """And is a ReLU still, for those who call it alone."""
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.ReLU(), nn.MaxPool2d(2))
    plain, x = copy.deepcopy(model), channels_last(2, 4, 9, 8)
    fuse(model)
    joined = []
    for name in ("batch_norm_act", "max_pool2d"):
        monkeypatch.setattr(fused, name, watched(getattr(fused, name), joined))
    torch.testing.assert_close(model(x), plain(x))
    assert joined == [("batch_norm_act", True), ("max_pool2d", False), ("max_pool2d", True)]
    assert [type(model[at]) for at in (1, 3)] == [nn.ReLU, nn.ReLU]
    torch.testing.assert_close(model[0](x), plain[0](x))


def watched(function, calls):
    """The function, which notes at each call its name and whether it has a ReLU."""

    def call(*given, **named):
        calls.append((function.__name__, named["relu"]))
        return function(*given, **named)

    return call


@pytest.mark.parametrize("shared", ["relu", "batch norm"])
def test_a_layer_that_stands_in_two_places_is_joined_in_neither(shared):
    torch.manual_seed(0)
    norm, relu = nn.BatchNorm2d(4), nn.ReLU()
    first = nn.Sequential(norm, relu, nn.Conv2d(4, 4, 1))
    second = nn.Sequential(relu) if shared == "relu" else nn.Sequential(norm)
    plain = nn.Sequential(first, second).eval()
    ours, x = copy.deepcopy(plain), channels_last(2, 4, 3, 5)
    fuse(ours)
    torch.testing.assert_close(ours(x), plain(x))


def test_relu6_keeps_its_bound():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU6())
    plain = copy.deepcopy(model)
    fuse(model)
    x = (10 * channels_last(2, 4, 5, 7)).requires_grad_()
    for norm in (model[0], plain[0]):
        norm.weight.data.fill_(8.0)
    dy = channels_last(2, 4, 5, 7)
    (expected,) = torch.autograd.grad(plain(x), x, dy)
    y = model(x)
    (got,) = torch.autograd.grad(y, x, dy)
    assert y.max() == 6
    torch.testing.assert_close(y, plain(x))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"drop_rate": 0.3}, {"memory_efficient": True}], ids=str)
def test_a_layer_of_densenet_computes_what_it_did(torchvision, changes):
    torch.manual_seed(0)
    plain = torchvision.models.densenet._DenseLayer(32, 16, 4, **{"drop_rate": 0, "memory_efficient": False} | changes)
    ours = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    fuse(ours)
    native_everywhere(ours)
    inputs, dy = [channels_last(4, 16, 9, 8) for _ in range(2)], channels_last(4, 16, 9, 8)
    results = []
    for layer in (plain, ours):
        torch.manual_seed(1)
        y = layer([one.requires_grad_() for one in inputs])
        results.append((y, *torch.autograd.grad(y, [*inputs, *layer.parameters()], dy), *layer.buffers()))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_the_network_works_with_bf16_copies_of_the_optimizers_weights():
    engine = engine_of("resnet50", 64, "bf16")
    for _ in range(2):
        engine.optimizer.zero_grad(set_to_none=True)
        engine.model(channels_last(2, 3, 64, 64).bfloat16()).float().square().sum().backward()
        engine.optimizer.step()
    masters = {id(parameter) for group in engine.optimizer.param_groups for parameter in group["params"]}
    state = engine.state_dict()
    for name, parameter in engine.model.named_parameters():
        if name in engine.masters:
            assert parameter.dtype == parameter.grad.dtype == torch.bfloat16
            assert torch.equal(parameter, engine.masters[name].to(torch.bfloat16)), name
            assert state[name].dtype == torch.float32
        else:
            assert parameter.dtype == torch.float32
            assert id(parameter) in masters, name
    assert len(engine.masters) == 55  # 53 convolutions, and the classifier's weight and bias


def test_gradients_of_micro_batches_are_summed_in_float32():
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(0.0)
    optimizer = SGD(layer.parameters(), lr=1.0)
    copy = nn.Parameter(layer.weight.detach().bfloat16())
    optimizer.use_working_copies({layer.weight: copy})
    for gradient in (256.0, 1.0, 1.0):  # in bf16, 256 + 1 is 256
        optimizer.accumulate_fp32()
        copy.grad = torch.full_like(copy, gradient)
    optimizer.step()
    assert layer.weight.item() == -258.0
    assert copy.item() == -258.0
    optimizer.zero_grad()
    assert copy.grad is None
    assert not optimizer.accumulated
