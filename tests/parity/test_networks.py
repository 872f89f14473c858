"""torchvision's networks with equal weights: forward and backward, as built here and as engines rebuild them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from knltrain.config import OptimConfig, RunConfig
from knltrain.models import model_of
from knltrain.ops.native import load_error
from knltrain.optim import build_optimizer
from knltrain.training.engine import build_engine

CLASSES, BATCH = 10, 4
# What is called alexnet here is Caffe's, with other layers: torchvision's is reached by its full name.
NETWORKS = {"resnet50": ("resnet50", 64), "torchvision:alexnet": ("alexnet", 96)}


def pair(torchvision, name, dtype):
    """Ours and torchvision's with equal weights and statistics that are not those of a fresh network; no dropout."""
    theirs_name, size = NETWORKS[name]
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(theirs_name, num_classes=CLASSES)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.5)
    ours = model_of(RunConfig(model=name, image_size=size), CLASSES)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    for module in (*ours.modules(), *theirs.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    images = torch.randn(BATCH, 3, size, size, dtype=dtype)
    return ours.to(dtype), theirs.to(dtype), images


def logits_and_gradients(model, images, *, training):
    model.train(training)
    images = images.clone().requires_grad_()
    logits = model(images)
    F.cross_entropy(logits, torch.arange(len(images)) % CLASSES).backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"logits": logits.detach(), "images": images.grad, **grads}


def assert_near(got, wanted, relative):
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        distance = float((got[name] - tensor).norm() / tensor.norm())
        assert distance <= relative, name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_forward_and_backward_in_float64(torchvision, name, training):
    ours, theirs, images = pair(torchvision, name, torch.float64)
    assert_near(
        logits_and_gradients(ours, images, training=training),
        logits_and_gradients(theirs, images, training=training),
        1e-10,
    )
    buffers = dict(theirs.named_buffers())
    assert all(torch.allclose(buffer, buffers[key], rtol=1e-12) for key, buffer in ours.named_buffers())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_kernels_forward_and_backward(torchvision, name):
    """Float32 against float64: the engine's error is of the size of torchvision's own in float32.

    That of the whole gradient: of a single layer's a ReLU decides, which rounding has fall on the other side of zero.
    """
    if reason := load_error():
        pytest.skip(f"no native kernels: {reason}")
    ours, theirs, images = pair(torchvision, name, torch.float32)
    exact = logits_and_gradients(copy.deepcopy(theirs).double(), images.double(), training=True)
    plain = logits_and_gradients(theirs, images, training=True)
    engine = build_engine("fused", "fp32", ours, build_optimizer(ours, OptimConfig()))
    fused = logits_and_gradients(engine.model, images.contiguous(memory_format=torch.channels_last), training=True)
    for keys in (["logits"], [key for key in exact if key != "logits"]):
        wanted = flat(exact, keys)
        own, error = (float((flat(got, keys) - wanted).norm() / wanted.norm()) for got in (plain, fused))
        assert error <= 5 * own + 1e-5, keys[0]


def flat(tensors, keys):
    return torch.cat([tensors[key].double().flatten() for key in keys])
