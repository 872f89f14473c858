"""Parameter counts, shapes, initial weights, and torchvision's ResNet-50 to the last weight."""

import math

import pytest
import torch
from torch import nn

from knltrain import models
from knltrain.config import RunConfig
from knltrain.errors import ConfigError
from knltrain.models import build_model, model_of, refuse_single_values, refuse_unbuildable
from knltrain.models.alexnet import LocalResponseNorm

# The counts of Caffe's bvlc_alexnet and of torchvision's resnet50; alexnet_bn has 2 x (96 + 256 + 384 + 384) more.
COUNTS = {"alexnet": (227, 60_965_224), "alexnet_bn": (227, 60_967_464), "resnet50": (224, 25_557_032)}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_and_output(name):
    size, count = COUNTS[name]
    model = build_model(name, num_classes=1000, image_size=size).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert model(torch.randn(2, 3, size, size)).shape == (2, 1000)


@pytest.mark.parametrize("size", [32, 48, 64])
@pytest.mark.parametrize("name", ["alexnet_bn_small", "resnet20"])
def test_small_networks_take_small_images(name, size):
    model = build_model(name, num_classes=7, image_size=size)
    assert model(torch.randn(2, 3, size, size)).shape == (2, 7)


def feature_shapes(model, size):
    shapes = {}
    for name, layer in model.features.named_children():
        layer.register_forward_hook(lambda m, i, o, name=name: shapes.__setitem__(name, tuple(o.shape[1:])))
    model(torch.randn(1, 3, size, size))
    return shapes


def test_alexnet_layers_have_the_sources_shapes():
    model = build_model("alexnet", num_classes=1000, image_size=227).eval()
    shapes = feature_shapes(model, 227)
    assert [shapes[f"conv{i}"] for i in range(1, 6)] == [
        (96, 55, 55), (256, 27, 27), (384, 13, 13), (384, 13, 13), (256, 13, 13)]  # fmt: skip
    assert [shapes[f"pool{i}"] for i in (1, 2, 5)] == [(96, 27, 27), (256, 13, 13), (256, 6, 6)]
    assert [model.features.get_submodule(f"conv{i}").groups for i in range(1, 6)] == [1, 2, 1, 2, 2]
    order = [name for name, _ in model.features.named_children()]
    assert order.index("relu1") < order.index("norm1") < order.index("pool1")


def test_alexnet_bn_normalises_the_inputs_of_conv2_to_conv5():
    model = build_model("alexnet_bn", num_classes=1000, image_size=227)
    order = [name for name, _ in model.features.named_children()]
    for index in range(1, 5):
        assert order[order.index(f"norm{index}") + 1] == f"conv{index + 1}"
        norm = model.features.get_submodule(f"norm{index}")
        assert (norm.eps, norm.momentum, norm.affine) == (1e-4, pytest.approx(0.1), True)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == 4
    assert not any(isinstance(m, LocalResponseNorm) for m in model.modules())


def test_alexnet_initial_weights():
    torch.manual_seed(0)
    lrn = build_model("alexnet", num_classes=1000, image_size=227)
    bn = build_model("alexnet_bn", num_classes=1000, image_size=227)
    stds = {"conv1": 0.01, "conv3": 0.01, "conv5": 0.01, "fc6": 0.005, "fc7": 0.005, "fc8": 0.01}
    for model, biases in (
        (lrn, {"conv1": 0, "conv2": 0.1, "conv3": 0, "conv4": 0.1, "conv5": 0.1, "fc6": 0.1, "fc7": 0.1, "fc8": 0}),
        (bn, {"conv1": 0.01, "conv2": 0.01, "conv5": 0.01, "fc6": 0.1, "fc7": 0.1, "fc8": 0.01}),
    ):
        layers = dict([*model.features.named_children(), *model.classifier.named_children()])
        for name, std in stds.items():
            assert layers[name].weight.std().item() == pytest.approx(std, rel=0.02), name
        for name, bias in biases.items():
            assert torch.all(layers[name].bias == bias), name


def test_resnet50_is_torchvisions(torchvision):
    theirs = torchvision.models.resnet50(weights=None)
    ours = build_model("resnet50", num_classes=1000, image_size=224)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for module in theirs.modules():  # statistics that are not those of a fresh network
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.5)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 224, 224)
    for mode in (True, False):
        torch.testing.assert_close(ours.train(mode)(x), theirs.train(mode)(x), rtol=1e-5, atol=1e-5)


def test_resnet50_initial_weights():
    torch.manual_seed(0)
    model = build_model("resnet50", num_classes=1000, image_size=224, zero_init_residual=True)
    assert model.fc.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert torch.all(model.fc.bias == 0)
    conv = model.layer3[0].conv2
    assert conv.stride == (2, 2)
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (256 * 9)), rel=0.02)
    blocks = [block for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for block in stage]
    assert len(blocks) == 16
    for block in blocks:
        assert torch.all(block.bn3.weight == 0)
        assert torch.all(block.bn1.weight == 1)
    plain = build_model("resnet50", num_classes=10, image_size=224)
    assert torch.all(plain.layer1[0].bn3.weight == 1)


def test_resnet20_is_the_sources():
    """He et al. 2015, table 6: 0.27 M parameters; 19 3x3 convolutions and a dense layer, shortcuts without any."""
    torch.manual_seed(0)
    model = build_model("resnet20", num_classes=10, image_size=32, zero_init_residual=True)
    # 9 k m for a convolution, 2 k for its norm: the stem, then 6, 1 + 5 and 1 + 5 of them.
    convs = 9 * (3 * 16 + 6 * 16 * 16 + 16 * 32 + 5 * 32 * 32 + 32 * 64 + 5 * 64 * 64)
    count = convs + 2 * (7 * 16 + 6 * 32 + 6 * 64) + 64 * 10 + 10
    assert count == 269_722
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert len(layers) == 20
    assert {layer.kernel_size for layer in layers[:-1]} == {(3, 3)}
    for block in [*model.layer1, *model.layer2, *model.layer3]:
        assert torch.all(block.bn2.weight == 0)
        assert torch.all(block.bn1.weight == 1)
    assert model.layer2[1].conv1.weight.std().item() == pytest.approx(math.sqrt(2 / (32 * 9)), rel=0.05)


def test_resnet20_begins_as_its_shortcuts():
    """With gamma 0 each block is the ReLU of its shortcut: every other pixel, and zeros for the new channels."""
    model = build_model("resnet20", num_classes=10, image_size=32, zero_init_residual=True).eval()
    x = torch.rand(2, 16, 32, 32)
    expected = torch.zeros(2, 64, 8, 8)
    expected[:, :16] = x[:, :, ::4, ::4]
    assert torch.equal(model.layer3(model.layer2(model.layer1(x))), expected)


def test_torchvision_by_name(torchvision):
    model = build_model("torchvision:mobilenet_v3_small", num_classes=5, image_size=64)
    assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 5)
    model = build_model("torchvision:googlenet", num_classes=5, image_size=64)
    assert model.train()(torch.randn(2, 3, 64, 64)).shape == (2, 5)
    for name in ("no_such_net", "fcn_resnet50"):
        with pytest.raises(ConfigError, match="no classifier"):
            build_model(f"torchvision:{name}", num_classes=5, image_size=64)


def test_dropout_is_an_option_of_alexnet():
    model = build_model("alexnet_bn", num_classes=10, image_size=67, dropout=0.0)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.0, 0.0]


@pytest.mark.parametrize(
    "name, size, options, words",
    [
        ("vgg", 224, {}, "there are alexnet"),
        ("alexnet", 64, {}, "at least 67"),
        ("resnet50", 16, {}, "at least 32"),
        ("resnet20", 32, {"dropout": 0.5}, "dropout has no effect on resnet20"),
        ("resnet50", 224, {"dropout": 0.5}, "dropout has no effect on resnet50"),
        ("alexnet", 224, {"zero_init_residual": True}, "zero_init_residual has no effect on alexnet"),
    ],
)
def test_refusals(name, size, options, words):
    with pytest.raises(ConfigError, match=words):
        build_model(name, num_classes=10, image_size=size, **options)


def test_models_come_channels_last():
    model = model_of(RunConfig(model="alexnet_bn_small", image_size=32), 10)
    weight = model.features.conv2.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()


class Pooled(nn.Sequential):
    """Halves 14 pixels four times, which is once too often; so does torchvision's AlexNet with images of 32."""

    def __init__(self, *, num_classes, image_size):
        super().__init__(nn.Conv2d(3, 4, 3), *(nn.MaxPool2d(2) for _ in range(4)))


class ValuesWanted(nn.Dropout):
    """Of which the shape of the output, in the midst, follows from values."""

    def __init__(self, *, num_classes, image_size):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(3))

    def forward(self, x):
        return super().forward(x[x >= 0]).mean() * self.weight


def test_images_that_a_network_does_not_take_are_refused_before_any_are_read(monkeypatch):
    monkeypatch.setitem(models.MODELS, "pooled", Pooled)
    monkeypatch.setitem(models.MODELS, "values", ValuesWanted)
    before = torch.get_rng_state()
    refuse_unbuildable(RunConfig(model="values", image_size=32))
    assert torch.equal(torch.get_rng_state(), before), "the first weights are what they would have been"
    with pytest.raises(ConfigError, match=r"^image-size 16: pooled does not take such .*\(.*\); give another size$"):
        refuse_unbuildable(RunConfig(model="pooled", image_size=16))


@pytest.mark.parametrize(
    "name, refused, taken",
    [("resnet50", 32, 64), ("resnet20", 4, 8), ("torchvision:mobilenet_v2", 32, 64), ("alexnet_bn_small", 8, 16)],
)
def test_one_image_is_refused_where_batch_norm_has_one_value_of_it(name, refused, taken, request):
    """As PyTorch would refuse it, in the first step of a run."""
    if name.startswith("torchvision:"):
        request.getfixturevalue("torchvision")
    config, before = RunConfig(model=name), torch.get_rng_state()
    for size in (refused, taken):
        model, image = build_model(name, num_classes=2, image_size=size).train(), torch.zeros(1, 3, size, size)
        if size == taken:
            model(image)
            refuse_single_values(config, [size], "do this")
            continue
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            model(image)
        torch.set_rng_state(before)
        with pytest.raises(ConfigError, match=rf"^a micro-batch of one image: batch norm [\w.]+ of {name} .* at "
                                              rf"image-size {size}, .*; do this$"):  # fmt: skip
            refuse_single_values(config, [taken, size], "do this")
        assert torch.equal(torch.get_rng_state(), before)
