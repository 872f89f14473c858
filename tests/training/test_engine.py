import copy
import dataclasses
import functools
import shutil

import pytest
import torch
import torch.nn.functional as F
from small_networks import add_small_networks, why_no_engine

from knltrain.config import OptimConfig, RunConfig
from knltrain.errors import ConfigError
from knltrain.models import model_of
from knltrain.node.topology import Node, read_node
from knltrain.optim import build_optimizer
from knltrain.training.engine import build_engine, choose_engine, choose_precision, set_fp32_precision

OLD_CPU = Node("Old CPU", frozenset({"avx2"}), (0,), ((0,),), 1)


def choose(asked, precision="fp32"):
    return choose_engine(asked, model="alexnet_bn_small", precision=precision, node=read_node(), threads=2)


def train_steps(name, precision, count, optim, network="alexnet_bn_small"):
    """The losses of a few steps on one batch, and the engine."""
    torch.manual_seed(0)
    model = model_of(RunConfig(model=network, image_size=32), 10)
    engine = build_engine(name, precision, model, build_optimizer(model, optim))
    labels = torch.arange(64) % 10
    images = torch.randn(64, 3, 32, 32) + (0.3 * labels.view(-1, 1, 1, 1) if network == "tiny" else 0)
    images = images.to(engine.dtype, memory_format=torch.channels_last)
    losses = []
    for _ in range(count):
        engine.optimizer.zero_grad(set_to_none=True)
        with engine.autocast():
            logits = engine.model(images)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        engine.optimizer.step()
        losses.append(loss.item())
    return losses, engine


LARS = OptimConfig(lr=5.0, weight_decay=5e-4)
SGD = OptimConfig(name="sgd", variant="nesterov", lr=0.05)
# Compiling takes half a minute even of a tiny network, so that engine is tested in two of the four combinations.
CASES = [
    *(
        (name, precision, optim)
        for name in ("fused", "eager", "ipex")
        for precision in ("fp32", "bf16")
        for optim in (LARS, SGD)
    ),
    pytest.param("compile", "bf16", LARS, marks=pytest.mark.compile),
    pytest.param("compile", "fp32", SGD, marks=[pytest.mark.compile, pytest.mark.hand]),
]


@pytest.mark.parametrize("name, precision, optim", CASES, ids=lambda case: getattr(case, "name", case))
def test_engines_follow_float32_eager(name, precision, optim, monkeypatch):
    if reason := why_no_engine(name, precision):
        pytest.skip(reason)
    add_small_networks(monkeypatch.setitem)
    network = "tiny" if name == "compile" else "alexnet_bn_small"
    reference, _ = train_steps("eager", "fp32", 8, optim, network)
    losses, engine = train_steps(name, precision, 8, optim, network)
    assert reference[-1] < reference[0] - 0.1
    assert losses == pytest.approx(reference, rel=0.03 if precision == "bf16" else 2e-3)
    fresh = model_of(RunConfig(model=network, image_size=32), 10)
    state = engine.state_dict()
    assert list(state) == list(fresh.state_dict())
    for key, tensor in fresh.state_dict().items():
        assert (state[key].shape, state[key].dtype) == (tensor.shape, tensor.dtype), key


@functools.cache
def summed_gradients(name, micro_batch):
    """Of 128 images in bf16, by batch norm with fixed statistics, so that micro-batches of any size have one sum."""
    torch.manual_seed(0)
    model = model_of(RunConfig(model="alexnet_bn_small", image_size=32), 10)
    engine = build_engine(name, "bf16", model, build_optimizer(model, SGD))
    for module in engine.model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    images = torch.randn(128, 3, 32, 32, generator=torch.Generator().manual_seed(1)) + 0.2
    labels = torch.arange(128) % 10
    engine.optimizer.zero_grad(set_to_none=True)
    for first in range(0, 128, micro_batch):
        chosen = slice(first, first + micro_batch)
        with engine.autocast():
            logits = engine.model(images[chosen].to(engine.dtype, memory_format=torch.channels_last))
        (F.cross_entropy(logits.float(), labels[chosen]) * micro_batch / 128).backward()
        if first + micro_batch < 128:
            engine.optimizer.accumulate_fp32()
    gradients = engine.gradients()
    return torch.cat([gradients[key].float().flatten() for key in sorted(gradients)])


@pytest.mark.parametrize("name", ["fused", "ipex"])
def test_many_micro_batches_lose_nothing(name):
    """Stock autocast, whose gradients are float32, is the measure; summed in bf16 they are twice as far off."""
    if reason := why_no_engine(name, "bf16") or why_no_engine("eager", "bf16"):
        pytest.skip(reason)
    off = {}
    for engine in ("eager", name):
        whole, parts = summed_gradients(engine, 64), summed_gradients(engine, 2)
        off[engine] = float((parts - whole).norm() / whole.norm())
    assert off[name] < 1.5 * off["eager"]


def test_what_was_asked_for_is_what_runs():
    """bf16 and channels-last are read off the layers, not off the configuration."""
    if reason := why_no_engine("eager", "bf16"):
        pytest.skip(reason)
    _, engine = train_steps("eager", "bf16", 1, LARS)
    seen = []
    conv = engine.model.features.conv3
    conv.register_forward_hook(
        lambda m, i, o: seen.append((o.dtype, o.is_contiguous(memory_format=torch.channels_last)))
    )
    with engine.autocast():
        engine.model(torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last))
    assert seen == [(torch.bfloat16, True)]
    assert conv.weight.dtype == torch.float32


def test_a_restriction_is_not_blamed_on_the_processor(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    with pytest.raises(ConfigError, match=r"may use neither .* with ONEDNN_MAX_CPU_ISA=AVX2 .*--precision fp32"):
        choose_precision("bf16", OLD_CPU, force=False)


class Normalised(torch.nn.LayerNorm):
    """One that is called otherwise, as torchvision's LayerNorm2d."""

    def forward(self, x):
        return F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias).permute(0, 3, 1, 2)


@pytest.mark.filterwarnings("ignore:aten..layer_norm. an autograd kernel was not registered")  # IPEX has one of its own
@pytest.mark.parametrize("name", ["fused", "eager", "ipex"])
@pytest.mark.parametrize("norm", [Normalised(16), torch.nn.LayerNorm((8, 8))], ids=["channels", "pixels"])
def test_layer_norms_gradients_are_summed_in_float32(name, norm):
    """PyTorch's own bf16 sums are three quarters of the bias's gradient off at 4,096 rows."""
    if reason := why_no_engine(name, "bf16"):
        pytest.skip(reason)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 1), copy.deepcopy(norm))
    if isinstance(norm, Normalised):
        model[0] = torch.nn.Conv2d(3, 16, 1)
    engine = build_engine(name, "bf16", model, build_optimizer(model, SGD))
    x = torch.randn(64, 3, 8, 8)
    with engine.autocast():
        y = engine.model(x.to(engine.dtype, memory_format=torch.channels_last))
    dy = (torch.rand(y.shape) + 0.5).bfloat16()
    y.backward(dy)
    assert y.dtype == torch.bfloat16
    with torch.no_grad(), engine.autocast():
        assert engine.model[1](y.detach().float()).dtype == torch.float32, "a transformer's sums stay what they are"
    wide = copy.deepcopy(norm).double()
    state = {key: tensor.detach().double() for key, tensor in engine.state_dict().items()}
    wide(F.conv2d(x.double(), state["0.weight"], state["0.bias"])).backward(dy.double())
    for key, tolerance in (("bias", 1e-3), ("weight", 2e-2)):  # the weight's depends on rounded inputs too
        got, expected = engine.gradients()[f"1.{key}"].double(), getattr(wide, key).grad
        assert float((got - expected).norm() / expected.norm()) < tolerance


def test_bf16_without_hardware_is_refused_unless_forced():
    with pytest.raises(ConfigError, match=r"Old CPU.*--precision fp32"):
        choose_precision("bf16", OLD_CPU, force=False)
    assert choose_precision("bf16", OLD_CPU, force=True) == "bf16"
    assert choose_precision("auto", OLD_CPU, force=False) == "fp32"
    assert choose_precision("fp32", read_node(), force=False) == "fp32"


def test_bf16_where_fp32_is_faster_is_taken_with_a_warning_alone():
    hidden = dataclasses.replace(OLD_CPU, flags=frozenset({"avx512_bf16", "avx512_fp16"}))
    assert choose_precision("auto", hidden, force=False) == "fp32"
    with pytest.warns(UserWarning, match=r"Old CPU hides its AMX.*--precision fp32"):
        assert choose_precision("bf16", hidden, force=False) == "bf16"
    assert choose_precision("bf16", hidden, force=True) == "bf16", "without a warning, which would be an error here"


WITH_AMX = dataclasses.replace(OLD_CPU, flags=frozenset({"avx2", "amx_bf16"}))
HAS_PRODUCTS = hasattr(torch.backends.mkldnn, "conv")


@pytest.mark.parametrize(
    "precision, engine, node, wrong",
    [
        ("bf16", "fused", WITH_AMX, "--precision fp32"),
        ("fp32", "ipex", WITH_AMX, "--engine fused or eager"),
        ("fp32", "fused", OLD_CPU, "Old CPU has no AMX"),
        pytest.param("fp32", "fused", WITH_AMX, "2.9 and later have",
                     marks=pytest.mark.skipif(HAS_PRODUCTS, reason="this PyTorch has the setting")),
    ],
)  # fmt: skip
def test_products_in_bf16_are_refused_where_there_are_none(precision, engine, node, wrong):
    set_fp32_precision("ieee", precision=precision, engine=engine, node=node)
    with pytest.raises(ConfigError, match=f"fp32-precision bf16: .*{wrong}"):
        set_fp32_precision("bf16", precision=precision, engine=engine, node=node)


@pytest.fixture
def products_as_they_were():
    kinds = (torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul)
    before = [kind.fp32_precision for kind in kinds]
    yield
    for kind, precision in zip(kinds, before, strict=True):
        kind.fp32_precision = precision


@pytest.mark.skipif(not HAS_PRODUCTS, reason="this PyTorch does not have the setting")
def test_products_in_bf16_are_rounded_where_there_is_amx(products_as_they_were):
    x, weight = (torch.randn(size).to(memory_format=torch.channels_last) for size in ((16, 64, 28, 28), (64, 64, 3, 3)))
    exact = F.conv2d(x.double(), weight.double())

    def off():
        return float((F.conv2d(x, weight).double() - exact).norm() / exact.norm())

    assert off() < 1e-6
    set_fp32_precision("bf16", precision="fp32", engine="eager", node=WITH_AMX)
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    if "amx_bf16" in read_node().flags:
        assert 1e-4 < off() < 1e-2


def test_missing_parts_are_named(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"g\+\+"):
        choose("compile")
    if not why_no_engine("ipex"):
        monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
        with pytest.raises(ConfigError, match=r"does not load with torch 2\.13\.0"):
            choose("ipex")
    else:
        with pytest.raises(ConfigError, match="not installed"):
            choose("ipex")
    monkeypatch.setattr("knltrain.training.engine.load_error", lambda: "they were not built; install g++")
    with pytest.raises(ConfigError, match=r"engine fused: .*not built; install g\+\+.*--engine eager"):
        choose("fused")


@pytest.mark.parametrize("asked", ["eager", "compile", "ipex", "auto"])
def test_bf16_that_pytorch_would_sum_in_bf16_is_refused(monkeypatch, asked):
    monkeypatch.setattr("knltrain.training.engine.onednn_computes_bf16", lambda: False)
    monkeypatch.setattr("knltrain.training.engine.load_error", lambda: "no compiler")
    if asked == "auto" or not why_no_engine(asked):
        assert choose(asked) in ("eager", asked)
        with pytest.raises(ConfigError, match=r"in bf16: .*AVX-512.*ONEDNN_MAX_CPU_ISA.*Use --precision fp32"):
            choose(asked, "bf16")
    monkeypatch.setattr("knltrain.training.engine.load_error", lambda: None)
    monkeypatch.setattr("knltrain.training.engine.stored_engine", lambda *settings: None)
    assert choose("auto", "bf16") == choose("fused", "bf16") == "fused"
    if not why_no_engine(asked) and asked != "auto":
        with pytest.raises(ConfigError, match=r"--engine fused, .*or --precision fp32"):
            choose(asked, "bf16")


@pytest.mark.parametrize(
    "layer", [torch.nn.Conv2d(3, 4, 3, padding="same"), torch.nn.Conv1d(3, 4, 3), torch.nn.ConvTranspose2d(3, 4, 2)]
)
def test_a_convolution_left_to_pytorch_is_refused_where_pytorch_sums_in_bf16(monkeypatch, layer):
    def build(precision):
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), copy.deepcopy(layer))
        return build_engine("fused", precision, model, build_optimizer(model, SGD))

    monkeypatch.setattr("knltrain.training.engine.onednn_computes_bf16", lambda: True)
    build("bf16")
    monkeypatch.setattr("knltrain.training.engine.onednn_computes_bf16", lambda: False)
    build("fp32")
    with pytest.raises(ConfigError, match=rf"1 \({type(layer).__name__}\).*--precision fp32"):
        build("bf16")


@pytest.mark.parametrize("engine", ["fused", "eager"])
def test_gradients_of_many_images_of_one_sign_are_summed_in_float32(engine):
    """512 images at once, activations and losses' gradients all positive, so that a sum in bf16 loses a third."""
    if reason := why_no_engine(engine, "bf16"):
        pytest.skip(reason)
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(16, 16, 3, padding=1), torch.nn.Conv2d(16, 32, 3, stride=2, padding=2, dilation=2),
              torch.nn.Conv2d(32, 32, 3, groups=2), torch.nn.Flatten(), torch.nn.Linear(128, 8)]  # fmt: skip
    model = torch.nn.Sequential(*layers).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
    exact = copy.deepcopy(model).double()
    built = build_engine(engine, "bf16", model, build_optimizer(model, SGD))
    images = torch.rand(512, 16, 8, 8).bfloat16().to(memory_format=torch.channels_last).requires_grad_()
    with built.autocast():
        logits = built.model(images)
    logits.float().mean().backward()
    wide = images.detach().double().requires_grad_()
    exact(wide).mean().backward()
    gradients = built.gradients()
    for name, parameter in exact.named_parameters():
        torch.testing.assert_close(gradients[name].double(), parameter.grad, rtol=0.02, atol=0, msg=name)
    torch.testing.assert_close(images.grad.double(), wide.grad, rtol=0.03, atol=0)


def test_auto_is_what_tune_measured_or_the_kernels_or_eager(monkeypatch):
    monkeypatch.setattr("knltrain.training.engine.stored_engine", lambda *settings: None)
    monkeypatch.setattr("knltrain.training.engine.load_error", lambda: None)
    assert choose("auto") == "fused"
    monkeypatch.setattr("knltrain.training.engine.load_error", lambda: "no compiler")
    assert choose("auto") == "eager"
    monkeypatch.setattr("knltrain.training.engine.stored_engine", lambda *settings: "eager")
    monkeypatch.setattr("knltrain.training.engine.load_error", lambda: None)
    assert choose("auto") == "eager"
    monkeypatch.setattr("knltrain.training.engine.stored_engine", lambda *settings: "of a later version")
    assert choose("auto") == "fused"
    # What was the fastest once may be gone now.
    monkeypatch.setattr("knltrain.training.engine.stored_engine", lambda *settings: "compile")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.warns(UserWarning, match="tune.* is compile, but"):
        assert choose("auto") == "fused"
