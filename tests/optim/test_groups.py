import pytest
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
