"""Networks that are not the recipes', changed in many ways before and after they are fused, against torch's layers."""

import collections
import contextlib
import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

from knltrain.config import OptimConfig, RunConfig
from knltrain.models import build_model, fused, model_of
from knltrain.models.fused import fuse
from knltrain.ops.convgrad import native_results
from knltrain.ops.lrn import local_response_norm
from knltrain.ops.native import load_error
from knltrain.optim import build_optimizer
from knltrain.training.engine import build_engine

pytestmark = pytest.mark.skipif(load_error() is not None, reason=f"no native kernels: {load_error()}")


def network():
    """All that a Sequential joins, with the shapes that the kernels take."""
    return nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Sequential(nn.Conv2d(32, 16, 1), nn.BatchNorm2d(16), nn.ReLU6()),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(3, 1, 1), nn.BatchNorm2d(16),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 24), nn.ReLU(inplace=True), nn.Dropout(0.0),
        nn.Linear(24, 5),
    )  # fmt: skip


def block():
    """Of torchvision's ResNet-18, on the left of its downsampling."""
    models = pytest.importorskip("torchvision", exc_type=ImportError).models.resnet
    down = nn.Sequential(nn.Conv2d(16, 32, 1, stride=2, bias=False), nn.BatchNorm2d(32))
    return nn.Sequential(models.BasicBlock(16, 32, 2, down), models.BasicBlock(32, 32))


def bottleneck():
    models = pytest.importorskip("torchvision", exc_type=ImportError).models.resnet
    wider = nn.Sequential(nn.Conv2d(16, 64, 1, bias=False), nn.BatchNorm2d(64))
    return nn.Sequential(models.Bottleneck(16, 16, 1, wider), models.Bottleneck(64, 16))


def dense():
    models = pytest.importorskip("torchvision", exc_type=ImportError).models.densenet
    return models._DenseBlock(2, 16, bn_size=4, growth_rate=16, drop_rate=0.0)


def ours():
    return build_model("resnet20", num_classes=5, image_size=32).layer2


def images(n=4, channels=16, size=8, **kinds):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, channels, size, size, generator=generator).to(memory_format=torch.channels_last, **kinds)


def layers_of(model, kind):
    return [module for module in model.modules() if isinstance(module, kind)]


def made(factory, before=None, after=None, *, layout=torch.channels_last):
    """A network with torch's layers, and the same one fused: both changed alike, before it is fused or after."""
    plain, changed = (begun(factory, before, layout) for _ in range(2))
    fuse(changed)
    for one in layers_of(changed, fused.FusedConv2d):
        one.by = native_results(one.in_channels, tuple(one.weight.shape), one._geometry)
    for model in (plain, changed):
        torch.manual_seed(1)
        if after:
            after(model)
    return plain, changed


def begun(factory, before, layout):
    torch.manual_seed(0)
    model = factory()
    for norm in layers_of(model, nn.BatchNorm2d):
        nn.init.uniform_(norm.weight)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    if before:
        before(model)
    return model.to(memory_format=layout)


def results(model, x):
    """Output, gradients and buffers; or the error, of which the type is compared."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    model.zero_grad()
    y = model(x)
    if y.requires_grad:
        y.square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return y.detach(), [x.grad, *gradients], [buffer.clone() for buffer in model.buffers()]


def assert_alike(got, expected, tolerance=2e-4):
    (y, gradients, buffers), (plain_y, plain_gradients, plain_buffers) = got, expected
    assert (y.dtype, y.shape) == (plain_y.dtype, plain_y.shape)
    assert y.numel() == 0 or y.is_contiguous() or not plain_y.is_contiguous(), "who calls view() on it goes on doing so"
    whole = sum(float(one.double().square().sum()) for one in plain_gradients if one is not None) ** 0.5
    for one, other in zip([y, *buffers], [plain_y, *plain_buffers], strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)
    for one, other in zip(gradients, plain_gradients, strict=True):
        assert (one is None) == (other is None)
        if other is not None:
            assert (one.double() - other.double()).norm() <= tolerance * (other.double().norm() + whole)


NETWORKS = [network, block, bottleneck, dense, ours]


# Changes to a network ------------------------------------------------------------------------------------------------


def all_of(kind, **values):
    def change(model):
        for module in layers_of(model, kind):
            for name, value in values.items():
                setattr(module, name, value)

    return change


def replaced(kind, make):
    """Every module of a kind by another one, in the places that it has."""

    def change(model):
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, kind):
                    new = make(child)
                    new.train(child.training)
                    setattr(parent, name, new)

    return change


def norms(child):
    norm = nn.GroupNorm(2, child.num_features)
    norm.weight, norm.bias = child.weight, child.bias
    return norm


class OwnConv2d(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) - 1


class OwnReLU(nn.ReLU):
    def forward(self, x):
        return super().forward(x - 0.25)


def own(kind):
    def change(model):
        base = kind.__mro__[1]
        for module in list(model.modules()):
            if type(module) is base:
                module.__class__ = kind

    return change


def shared_relu(model):
    """One for all, in and out of Sequentials."""
    relu = nn.ReLU()
    replaced(nn.ReLU, lambda child: relu)(model)


def shared_everything(model):
    """Each stands in a second Sequential too, and in a list that PyTorch does not see."""
    for parent in list(model.modules()):
        parent.steps = list(parent.children())
    for relu in layers_of(model, nn.ReLU)[:1]:
        relu.also = nn.Sequential(*layers_of(model, (nn.Conv2d, nn.BatchNorm2d)))


def shared_dropout(model):
    dropout = nn.Dropout(0.0)
    replaced(nn.Dropout, lambda child: dropout)(model)
    if isinstance(model, nn.Sequential) and isinstance(model[-1], nn.Linear):
        model.insert(len(model) - 1, dropout)


def weight_norm(model):
    for module in layers_of(model, (nn.Conv2d, nn.Linear)):
        nn.utils.parametrizations.weight_norm(module)


def old_weight_norm(model):
    for module in layers_of(model, (nn.Conv2d, nn.Linear)):
        with pytest.warns(FutureWarning, match="weight_norm"):
            nn.utils.weight_norm(module)


def spectral_norm(model):
    for module in layers_of(model, nn.Conv2d):
        nn.utils.parametrizations.spectral_norm(module)


def frozen(model):
    for place, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(place % 3 == 0)


def frozen_norms(model):
    for norm in layers_of(model, nn.BatchNorm2d)[::2]:
        norm.eval().requires_grad_(False)


def wide_relu6(model):
    replaced(nn.ReLU, lambda child: nn.ReLU6(inplace=child.inplace))(model)


def no_statistics(model):
    for norm in layers_of(model, nn.BatchNorm2d):
        norm.track_running_stats, norm.num_batches_tracked = False, None
        norm.running_mean = norm.running_var = None


def no_affine(model):
    for norm in layers_of(model, nn.BatchNorm2d):
        norm.affine, norm.weight, norm.bias = False, None, None


def dilated(model):
    for convolution in layers_of(model, nn.Conv2d):
        if convolution.kernel_size == (3, 3):
            convolution.dilation, convolution.padding = (2, 2), (2, 2)


def reflected(model):
    for convolution in layers_of(model, nn.Conv2d):
        if convolution.kernel_size == (3, 3):
            convolution.padding_mode, convolution._reversed_padding_repeated_twice = "reflect", [1, 1, 1, 1]


CHANGES = {
    "as they are": None,
    "evaluation": nn.Module.eval,
    "relu replaced": replaced(nn.ReLU, lambda child: nn.SiLU()),
    "relu to identity": replaced(nn.ReLU, lambda child: nn.Identity()),
    "relu not in place": all_of(nn.ReLU, inplace=False),
    "relu6": wide_relu6,
    "group norm": replaced(nn.BatchNorm2d, norms),
    "no norm": replaced(nn.BatchNorm2d, lambda child: nn.Identity()),
    "own convolution": own(OwnConv2d),
    "own norm": own(OwnNorm),
    "own relu": own(OwnReLU),
    "shared relu": shared_relu,
    "shared dropout": shared_dropout,
    "shared modules": shared_everything,
    "weight norm": weight_norm,
    "old weight norm": old_weight_norm,
    "spectral norm": spectral_norm,
    "frozen": frozen,
    "frozen norms": frozen_norms,
    "cumulative average": all_of(nn.BatchNorm2d, momentum=None),
    "no momentum": all_of(nn.BatchNorm2d, momentum=0.0),
    "no statistics": no_statistics,
    "no affine": no_affine,
    "dilated": dilated,
    "reflected": reflected,
    "same padding": lambda model: (
        all_of(nn.Conv2d, padding="same")(model)
        if all(one.stride == (1, 1) for one in layers_of(model, nn.Conv2d))
        else None
    ),
    "ceil mode": all_of(nn.MaxPool2d, ceil_mode=True),
    "float64": nn.Module.double,
    "forwards put in place": lambda model: [
        setattr(norm, "forward", lambda x, norm=norm: nn.BatchNorm2d.forward(norm, x) + 1)
        for norm in layers_of(model, nn.BatchNorm2d)
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, when",
    [(name, when) for name in CHANGES for when in ("before", "after") if when == "before" or name[:3] != "own"],
)
@pytest.mark.parametrize("factory", NETWORKS, ids=lambda factory: factory.__name__)
def test_a_changed_network_computes_what_it_did(factory, change, when):
    plain, changed = made(factory, **{when: CHANGES[change]})
    x = images(dtype=torch.float64 if change == "float64" else torch.float32)
    for _ in range(2):
        assert_alike(results(changed, x), results(plain, x))


def test_every_network_has_something_that_is_joined(monkeypatch):
    """Else the tests above would show nothing."""
    joined = []
    original = fused.batch_norm_act
    monkeypatch.setattr(
        fused, "batch_norm_act", lambda *given, **named: joined.append(named) or original(*given, **named)
    )
    for factory in NETWORKS:
        joined.clear()
        _, changed = made(factory)
        changed(images())
        assert sum(named["relu"] for named in joined) >= 2
        assert any(named["statistics"] for named in joined)
        assert any(named["residual"] is not None for named in joined) == (factory in (block, bottleneck, ours))


# Whole networks of torchvision ---------------------------------------------------------------------------------------


def changed_resnet(name):
    def change(model):
        if name == "pool":
            model.avgpool = nn.AdaptiveMaxPool2d(1)
        elif name == "relu":
            model.relu = nn.GELU()
        elif name == "stem":
            model.maxpool, model.bn1 = nn.Identity(), nn.Identity()
        elif name == "implementation":
            model._forward_impl = lambda x: model.fc(model.conv1(x).mean((2, 3)).repeat(1, 8))
        elif name == "large pool":
            model.maxpool = nn.MaxPool2d(16, 4, 8)
        elif name == "no classifier":
            model.fc = nn.Identity()

    return change


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["pool", "relu", "stem", "implementation", "large pool", "no classifier"])
def test_a_resnet_with_other_parts(torchvision, name, when):
    def small():
        return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=3)

    plain, changed = made(small, **{when: changed_resnet(name)})
    if name == "implementation":
        plain._forward_impl = lambda x: plain.fc(plain.conv1(x).mean((2, 3)).repeat(1, 8))
        changed._forward_impl = lambda x: changed.fc(changed.conv1(x).mean((2, 3)).repeat(1, 8))
    x = images(channels=3, size=64)
    assert_alike(results(changed, x), results(plain, x), tolerance=2e-2)


def test_a_resnet_of_group_norms(torchvision):
    plain, changed = made(
        lambda: torchvision.models.resnet18(num_classes=3, norm_layer=lambda channels: nn.GroupNorm(4, channels))
    )
    x = images(channels=3, size=32)
    assert_alike(results(changed, x), results(plain, x), tolerance=1e-3)


def test_a_class_whose_forward_pass_was_replaced(torchvision, monkeypatch):
    block = torchvision.models.resnet.BasicBlock
    monkeypatch.setattr(block, "forward", lambda self, x: self.bn1(self.conv1(x)))
    plain, changed = made(lambda: block(16, 16))
    assert_alike(results(changed, images()), results(plain, images()))


# Hooks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("kind", ["forward", "forward pre", "backward", "backward pre", "global"])
@pytest.mark.parametrize("factory", NETWORKS, ids=lambda factory: factory.__name__)
def test_hooks_see_what_they_saw(factory, kind):
    """On every module, which then has its own part of the work; and what they return takes effect."""
    plain, changed = made(factory, before=all_of(nn.ReLU, inplace=False))
    seen = []
    for model in (plain, changed):
        values = collections.defaultdict(list)
        with contextlib.ExitStack() as hooks:
            for handle in hooked(model, kind, values):
                hooks.callback(handle.remove)
            if "backward" in kind and factory in (block, bottleneck, ours):  # it adds in place to what has such a hook
                with pytest.raises(RuntimeError, match="modified inplace"):
                    model(images().requires_grad_())
                continue
            seen.append((values, results(model, images())))
    if not seen:
        return
    (expected, plain_results), (got, our_results) = seen
    assert_alike(our_results, plain_results)
    assert got.keys() == expected.keys()
    for name in expected:
        for one, other in zip(got[name], expected[name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


def hooked(model, kind, values):
    names = {module: name for name, module in model.named_modules()}

    def note(module, given):
        values[names[module]] += [one.detach().clone() for one in given if isinstance(one, torch.Tensor)]

    if kind == "global":
        yield nn.modules.module.register_module_forward_hook(
            lambda module, given, output: note(module, (output,)) if module in names else None
        )
        return
    for module in names:
        if kind == "forward":
            yield module.register_forward_hook(
                lambda module, given, output: note(module, (*given, output)) or output * 1.5
            )
        elif kind == "forward pre":
            yield module.register_forward_pre_hook(note)
        elif kind == "backward":
            yield module.register_full_backward_hook(lambda module, dx, dy: note(module, (*dx, *dy)))
        else:
            yield module.register_full_backward_pre_hook(note)


def test_measuring_leaves_the_layers_joined():
    _, changed = made(block)
    norm, calls = changed[0].bn2, []
    norm.register_forward_hook(fused.measures(lambda module, given, output: calls.append(output.detach().clone())))
    joined = changed[0](images())
    assert torch.equal(calls[0], joined), "with the residual and the ReLU"


# Inputs --------------------------------------------------------------------------------------------------------------


INPUTS = {
    "contiguous": lambda: images().contiguous(),
    "strided": lambda: images(size=16)[:, :, ::2, ::2],
    "expanded": lambda: images(n=1).expand(4, -1, -1, -1),
    "transposed": lambda: images().transpose(2, 3),
    "sliced channels": lambda: images(channels=32)[:, ::2],
    "one image": lambda: images(n=1),
    "small": lambda: images(size=2),
    "with large numbers": lambda: images() * 1e4,
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels-last", "contiguous"])
@pytest.mark.parametrize("given", INPUTS)
@pytest.mark.parametrize("factory", NETWORKS, ids=lambda factory: factory.__name__)
def test_any_input_gives_what_it_gave(factory, given, layout):
    plain, changed = made(factory, layout=layout)
    x = INPUTS[given]()
    outcome = []
    for model in (changed, plain):
        try:
            outcome.append(results(model, x))
        except ValueError as error:  # one value per channel
            outcome.append(error)
    if isinstance(outcome[1], Exception):
        assert str(outcome[0]) == str(outcome[1])
    else:
        assert_alike(*outcome, tolerance=1e-3)


LAYERS = {
    "convolution": lambda: nn.Conv2d(16, 16, 3, padding=1, bias=False),
    "convolution and norm": lambda: nn.Sequential(
        nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    ),
    "1x1": lambda: nn.Conv2d(16, 32, 1),
    "strided": lambda: nn.Conv2d(16, 16, 3, stride=2, padding=1),
    "grouped": lambda: nn.Conv2d(16, 16, 3, groups=4),
    "pool": lambda: nn.MaxPool2d(2),
    "large pool": lambda: nn.MaxPool2d(16, 1, 8),
    "relu and pool": lambda: nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)),
    "dropout": lambda: nn.Dropout(0.0),
    "norm": lambda: nn.BatchNorm2d(16),
}


@pytest.mark.parametrize(
    "given", ["unbatched", "empty", "float64", "bfloat16", "float16", "meta", "too few dimensions"]
)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_takes_and_refuses_what_torchs_does(layer, given):
    plain, changed = made(LAYERS[layer])
    x = {
        "unbatched": images()[0].contiguous(), "empty": images()[:0], "too few dimensions": torch.randn(16),
        "meta": images().to("meta"),
    }.get(given)  # fmt: skip
    x = images(dtype=getattr(torch, given)) if x is None else x
    if given == "meta":
        plain, changed = plain.to("meta"), changed.to("meta")
    outcome = []
    for model in (changed, plain):
        try:
            outcome.append(results(model, x))
        except (ValueError, RuntimeError) as error:
            outcome.append(type(error))
    if isinstance(outcome[1], type):
        assert outcome[0] is outcome[1]
    elif given == "meta":
        assert outcome[0][0].shape == outcome[1][0].shape
    else:
        assert_alike(*outcome, tolerance=2e-2 if given in ("bfloat16", "float16") else 2e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factory", NETWORKS, ids=lambda factory: factory.__name__)
def test_autocast_around_a_float32_network(factory, dtype):
    plain, changed = made(factory)
    seen = []
    for model in (changed, plain):
        with torch.autocast("cpu", dtype):
            y = model(images())
        y.float().square().sum().backward()
        seen.append((y, [parameter.grad for parameter in model.parameters()]))
    (y, gradients), (plain_y, plain_gradients) = seen
    assert y.dtype == plain_y.dtype
    assert (y - plain_y).float().norm() <= 0.05 * plain_y.float().norm()
    whole = sum(one.norm() ** 2 for one in plain_gradients) ** 0.5
    for one, other in zip(gradients, plain_gradients, strict=True):
        assert (one - other).norm() <= 0.15 * (other.norm() + 0.1 * whole)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("factory", NETWORKS, ids=lambda factory: factory.__name__)
def test_without_gradients(factory, context):
    plain, changed = made(factory)
    with context():
        got, expected = changed(images()), plain(images())
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)
    assert_alike(results(changed, images()), results(plain, images()))


# Writing to inputs and outputs ---------------------------------------------------------------------------------------


ENDS = {
    "conv-norm": lambda: (nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)),
    "conv-norm-relu": lambda: (nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
    "relu-pool": lambda: (nn.ReLU(), nn.MaxPool2d(2)),
    "relu-dropout": lambda: (nn.ReLU(), nn.Dropout(0.5)),
    "relu-dropout-relu6": lambda: (nn.ReLU(), nn.Dropout(0.5), nn.ReLU6(inplace=True), nn.Conv2d(16, 4, 1)),
}


@pytest.mark.parametrize("end", ENDS)
def test_an_output_may_be_written_to(end):
    """By what comes after a network, as an addition in place; the gradients are those of what was computed."""
    _, changed = made(lambda: nn.Sequential(*ENDS[end]()))
    found = []
    for write in (False, True):
        torch.manual_seed(2)
        x = images().requires_grad_()
        y = changed(x)
        y = y.mul_(2.0).add_(1.0) if write else y * 2.0 + 1.0
        y.square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("first", ["relu", "identity", "dropout"])
def test_what_a_network_writes_to_its_input_it_goes_on_writing(first):
    """A branch that begins with a ReLU in place changes what its block adds afterwards."""
    before = {"relu": [], "identity": [nn.Identity()], "dropout": [nn.Dropout(0.5).eval()]}[first]
    plain, changed = made(lambda: nn.Sequential(*before, nn.ReLU(inplace=True), nn.MaxPool2d(3, 1, 1)).eval())
    for model in (plain, changed):
        x = images()
        y = model(x)
        assert (x >= 0).all()
        torch.testing.assert_close(y, F.max_pool2d(images().relu(), 3, 1, 1))
    plain, changed = made(lambda: nn.Dropout(0.5, inplace=True))
    x = images()
    y = changed(x)
    assert y.data_ptr() == x.data_ptr()


def test_a_layer_of_a_sequential_called_alone_is_torchs():
    """As by those who take features out of the midst."""
    plain, changed = made(network)
    x = y = images()
    for one, other in zip(plain, changed, strict=True):
        x, y = one(x), other(y)
        torch.testing.assert_close(y, x, rtol=2e-4, atol=2e-4)
    plain, changed = made(network)
    torch.testing.assert_close(changed[:2](images()), plain[:2](images()), rtol=2e-4, atol=2e-4)


# Derivatives ---------------------------------------------------------------------------------------------------------


class LocalResponseNorm(nn.Module):
    def forward(self, x):
        return local_response_norm(x, alpha=1e-2)


def second_gradients(model, x):
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    dx.square().sum().backward()
    return [x.grad, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("change", [None, nn.Module.eval], ids=["training", "evaluation"])
@pytest.mark.parametrize("factory", NETWORKS, ids=lambda factory: factory.__name__)
def test_second_derivatives(factory, change):
    """As a penalty on gradients takes."""
    plain, changed = made(factory, before=change)
    expected = second_gradients(plain.double(), images().double())
    whole = sum(float(one.square().sum()) for one in expected if one is not None) ** 0.5
    for one, other in zip(second_gradients(changed, images()), expected, strict=True):
        if other is None:
            assert one is None or float(one.abs().max()) == 0
        else:
            assert (one.double() - other).norm() <= 5e-3 * (other.norm() + whole)


def test_second_derivatives_of_the_response_norm():
    plain = nn.Sequential(nn.LocalResponseNorm(5, alpha=1e-2, beta=0.75, k=1.0))
    expected = second_gradients(plain.double(), images().double() * 10)
    (got,) = second_gradients(LocalResponseNorm(), images() * 10)
    torch.testing.assert_close(got.double(), *expected, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)  # torch's own derivatives use it
@pytest.mark.parametrize("factory", NETWORKS, ids=lambda factory: factory.__name__)
def test_torch_func(factory):
    plain, changed = made(factory, before=nn.Module.eval)
    seen = []
    for model in (plain, changed):
        state = {name: value.detach() for name, value in model.state_dict().items()}
        x = images()

        def loss(state, x, model=model):
            return torch.func.functional_call(model, state, (x,)).square().sum()

        y = torch.func.functional_call(model, state, (x,))
        weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
        gradients = torch.func.grad(loss)(weights, x)
        each = torch.func.vmap(lambda one: model(one[None])[0])(x)  # noqa: B023
        _, tangent = torch.func.jvp(model, (x,), (torch.ones_like(x),))
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
        seen.append([y, each, tangent, dual, *gradients.values()])
    for one, other in zip(*seen, strict=True):
        assert (one - other).norm() <= 1e-3 * other.norm() + 1e-3


# Copies --------------------------------------------------------------------------------------------------------------


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model)), "save": saved}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("factory", NETWORKS, ids=lambda factory: factory.__name__)
def test_a_copy_computes_the_same_bits(factory, how):
    _, changed = made(factory)
    other = COPIES[how](changed)
    assert [type(module) for module in other.modules()] == [type(module) for module in changed.modules()]
    for one, same in zip(results(other, images()), results(changed, images()), strict=True):
        assert all(map(torch.equal, one, same))


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_copy_of_an_engine_takes_the_steps_that_the_original_takes(how, precision):
    torch.manual_seed(0)
    config = RunConfig(model="resnet20", image_size=32)
    model = model_of(config, 5)
    model.layer1.append(nn.Sequential(nn.Flatten(2), nn.LayerNorm(32 * 32), nn.Unflatten(2, (32, 32))))
    optim = OptimConfig(variant="nesterov")
    first = build_engine("fused", precision, model, build_optimizer(model, optim))
    steps(first, 2)
    second = COPIES[how](first)
    steps(first, 2)
    steps(second, 2)
    state, other = first.state_dict(), second.state_dict()
    assert all(torch.equal(state[name], other[name]) for name in state)


def steps(engine, count):
    for step in range(count):
        engine.optimizer.zero_grad()
        x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        with engine.autocast():
            y = engine.model(x.to(engine.dtype, memory_format=torch.channels_last))
        F.cross_entropy(y.float(), torch.arange(4)).backward()
        engine.optimizer.step()
