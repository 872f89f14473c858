import pytest
import torch
from torch import nn

from knltrain.config import OptimConfig
from knltrain.models import build_model
from knltrain.optim import SGD, build_optimizer, parameter_groups


def test_resnet_downsample_norms_are_norms():
    """Their names hold no "bn", which is how others miss them."""
    model = build_model("resnet50", num_classes=10, image_size=32)
    groups = {group["kind"]: group for group in parameter_groups(model, weight_decay=1e-4, decay_on="not-norm")}
    norms = [p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    assert {id(p) for p in groups["norm"]["params"]} == {id(p) for p in norms}
    assert groups["norm"]["weight_decay"] == 0.0
    assert groups["weight"]["weight_decay"] == groups["bias"]["weight_decay"] == 1e-4
    assert len(groups["bias"]["params"]) == 1
    assert sum(len(group["params"]) for group in groups.values()) == len(list(model.parameters()))


def test_shared_and_frozen_parameters_are_listed_once_and_not_at_all():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    second.bias.requires_grad_(False)
    (weights, biases) = parameter_groups(nn.Sequential(first, second), weight_decay=0.1, decay_on="weights")
    assert len(weights["params"]) == 1
    assert [id(p) for p in biases["params"]] == [id(first.bias)]


@pytest.mark.parametrize("variant", ["mlperf", "nesterov"])
def test_mlperf_and_nesterov_neither_adapt_nor_decay_norms_and_biases(variant):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(4))
    optimizer = build_optimizer(model, OptimConfig(variant=variant, weight_decay=0.1))
    assert all(group["nesterov"] == (variant == "nesterov") for group in optimizer.param_groups)
    by_kind = {group["kind"]: (group["adapt"], group["weight_decay"]) for group in optimizer.param_groups}
    assert by_kind == {"weight": (True, 0.1), "norm": (False, 0.0), "bias": (False, 0.0)}
    assert len(optimizer.param_groups[1]["params"]) == 6


def test_paper_adapts_and_decays_everything():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    optimizer = build_optimizer(model, OptimConfig(variant="paper", weight_decay=0.1))
    assert all(group["adapt"] and group["weight_decay"] == 0.1 for group in optimizer.param_groups)
    assert not any(group["clip"] for group in optimizer.param_groups)
    assert build_optimizer(model, OptimConfig(variant="larc")).param_groups[0]["clip"]
    assert isinstance(build_optimizer(model, OptimConfig(name="sgd", variant="nesterov")), SGD)


# Networks of others --------------------------------------------------------------------------------------------------


class Foreign(nn.Module):
    """One of each thing that is no layer's weight, whatever it is called, and two that are."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
        self.separate = nn.MultiheadAttention(8, 2, kdim=4, vdim=4)
        self.lstm = nn.LSTM(8, 4, proj_size=2)
        self.rms, self.slope, self.narrow = nn.RMSNorm(8), nn.PReLU(8), nn.Linear(8, 1)
        self.depthwise, self.bilinear = nn.Conv2d(8, 8, 1, groups=8), nn.Bilinear(2, 2, 2)
        self.scaled = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 8, 3))
        self.class_token, self.pos_embedding = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.zeros(1, 5, 8))
        self.rel_pos_h, self.relative_position_bias_table = (
            nn.Parameter(torch.zeros(7, 8)),
            nn.Parameter(torch.zeros(9, 2)),
        )
        self.layer_scale, self.temperature = nn.Parameter(torch.ones(8, 1, 1)), nn.Parameter(torch.ones(()))
        self.matrix = nn.Parameter(torch.zeros(8, 8))
        self.biased = nn.Parameter(torch.zeros(8, 8))


def kinds(model):
    groups = parameter_groups(model, weight_decay=0.1, decay_on="weights")
    return {name: group["kind"] for group in groups for name in group["names"]}


def test_what_is_no_weight_goes_by_type_and_dimension():
    of = kinds(Foreign())
    weights = {name for name, kind in of.items() if kind == "weight"}
    assert weights == {
        "attention.in_proj_weight", "attention.out_proj.weight", "separate.q_proj_weight", "separate.k_proj_weight",
        "separate.v_proj_weight", "separate.out_proj.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0",
        "lstm.weight_hr_l0", "narrow.weight", "depthwise.weight", "bilinear.weight",
        "scaled.parametrizations.weight.original1", "matrix", "biased",
    }  # fmt: skip
    assert {name for name, kind in of.items() if kind == "norm"} == {"rms.weight"}
    biases = {"attention.in_proj_bias", "attention.bias_k", "lstm.bias_ih_l0", "slope.weight", "class_token",
              "pos_embedding", "rel_pos_h", "relative_position_bias_table", "layer_scale", "temperature",
              "scaled.parametrizations.weight.original0"}  # fmt: skip
    assert biases <= {name for name, kind in of.items() if kind == "bias"}


# All that torchvision and timm have where parameters are not in layers, and some of the plain ones.
TORCHVISION = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "maxvit_t", "mnasnet0_5",
    "mobilenet_v2", "mobilenet_v3_small", "resnet18", "resnet50", "resnext50_32x4d", "shufflenet_v2_x0_5",
    "squeezenet1_0", "swin_t", "swin_v2_t", "vgg11_bn", "vit_b_16", "wide_resnet50_2",
)  # fmt: skip
TIMM = (
    "beit_base_patch16_224", "cait_xxs24_224", "coatnet_0_rw_224", "convnextv2_tiny", "deit_tiny_distilled_patch16_224",
    "edgenext_xx_small", "efficientformer_l1", "eva02_tiny_patch14_224", "levit_128", "mvitv2_tiny", "nest_tiny",
    "nfnet_f0", "pvt_v2_b0", "resnetv2_50", "swinv2_tiny_window8_256", "tnt_s_patch16_224", "volo_d1_224",
    "xcit_nano_12_p16_224",
)  # fmt: skip


def of_a_layer(name, parameter):
    """By the field's convention for names, which these libraries keep: an answer that owes nothing to the code."""
    last = name.rpartition(".")[2]
    return last in ("weight", "in_proj_weight") and sum(size > 1 for size in parameter.shape) > 1


@pytest.mark.parametrize("library, name", [*(("tv", one) for one in TORCHVISION), *(("timm", one) for one in TIMM)])
def test_networks_of_torchvision_and_timm(library, name, request):
    """None has a matrix of a layer elsewhere, or anything else among the weights."""
    if library == "timm":
        make = pytest.importorskip("timm", exc_type=ImportError).create_model
    else:
        make = request.getfixturevalue("torchvision").models.get_model
    with torch.device("meta"):
        model = make(name)
    of = kinds(model)
    assert of.keys() == dict(model.named_parameters()).keys()
    wrong = {
        parameter: kind
        for parameter, kind in of.items()
        if (kind == "weight") != of_a_layer(parameter, model.get_parameter(parameter))
    }
    assert wrong == {}
    norms = {path for path, module in model.named_modules() if "Norm" in type(module).__name__}
    assert {parameter.rpartition(".")[0] for parameter, kind in of.items() if kind == "norm"} <= norms


def test_the_groups_say_what_is_in_them():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2)))
    text = str(parameter_groups(model, weight_decay=0.5, decay_on="weights", adapt_on="weights"))
    assert text.splitlines() == [
        "weight: 3 tensors, 24 numbers; weight decay 0.5, adapted",
        "  *.weight: 4x3x1x1",
        "  *.*.weight (2): 2x4, 2x2",
        "norm: 2 tensors, 8 numbers; weight decay 0, not adapted",
        "  *.weight: 4",
        "  *.bias: 4",
        "bias: 3 tensors, 8 numbers; weight decay 0, not adapted",
        "  *.bias: 4",
        "  *.*.bias (2): 2",
    ]
    assert "adapted" not in str(parameter_groups(model, weight_decay=0.5, decay_on="weights"))


@pytest.mark.parametrize("name, counts", [("alexnet", (8, 0, 8)), ("alexnet_bn", (8, 8, 8)),
                                          ("alexnet_bn_small", (6, 10, 6)), ("resnet20", (20, 38, 1)),
                                          ("resnet50", (54, 106, 1))])  # fmt: skip
def test_the_recipes_networks_keep_their_groups(name, counts):
    """A checkpoint's optimizer goes on with the decay and the rates that it began with."""
    model = build_model(name, num_classes=10, image_size=67 if name.startswith("alexnet") else 32)
    for path, kind in kinds(model).items():
        module = model.get_submodule(path.rpartition(".")[0])
        expected = "norm" if isinstance(module, nn.BatchNorm2d) else path.rpartition(".")[2]
        assert kind == expected, path
    assert tuple(list(kinds(model).values()).count(kind) for kind in ("weight", "norm", "bias")) == counts


def test_what_is_no_choice_is_refused():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="decay_on 'weight': one of all, not-norm, weights"):
        parameter_groups(model, weight_decay=1e-4, decay_on="weight")
    with pytest.raises(ValueError, match="adapt_on 'norm': one of"):
        parameter_groups(model, weight_decay=1e-4, decay_on="all", adapt_on="norm")
    with pytest.raises(TypeError, match="takes the model, not generator"):
        parameter_groups(model.parameters(), weight_decay=1e-4, decay_on="all")
