"""The training step of each contestant of perf/vs_peers.py, written as its own documentation has it.

All train on the same batch of noise and, where their networks have the same parameters, from the same weights. A job is
a dictionary with ``recipe`` (a key of ``RECIPES``), ``optimizer`` (sgd or lars), ``tuned`` (torch's fused SGD instead
of its plain one), ``model``, ``batch``, ``image_size``, ``precision`` and ``engine`` (of knltrain).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knltrain.bench.step import TrainingStep
from knltrain.config import OptimConfig, RunConfig
from knltrain.errors import ConfigError
from knltrain.models import build_model
from knltrain.node.topology import read_node

Step = Callable[[], Tensor]

CLASSES = 1000
MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4
# Small enough that every network's loss falls from the first steps on, warm-up or not.
LR = {"sgd": 0.01, "lars": 1.0}


def _batch(job: dict[str, Any]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(job["batch"], 3, job["image_size"], job["image_size"], generator=generator)
    labels = torch.randint(CLASSES, (job["batch"],), generator=generator)
    return images.contiguous(memory_format=torch.channels_last), labels


def _initial_weights(job: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return build_model(job["model"], num_classes=CLASSES, image_size=job["image_size"])


def _peers_model(job: dict[str, Any]) -> nn.Module:
    """The network of torchvision, with the weights all start from; where it has none, knltrain's plain modules."""
    model = _initial_weights(job)
    if job["model"] == "resnet50":
        from torchvision.models import resnet50

        weights = model.state_dict()
        model = resnet50(num_classes=CLASSES)
        model.load_state_dict(weights)
    return _channels_last(model)


def _channels_last(model: nn.Module) -> nn.Module:
    channels_last: nn.Module = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return channels_last


def _sgd(model: nn.Module, job: dict[str, Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        model.parameters(),
        lr=LR["sgd"],
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
        fused=True if job["tuned"] else None,
    )


def _reference_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    job: dict[str, Any],
    memory_format: torch.memory_format = torch.channels_last,
) -> Step:
    """train_one_epoch of torchvision's references/classification, for a CPU."""
    images, labels = _batch(job)
    images = images.contiguous(memory_format=memory_format)
    criterion = nn.CrossEntropyLoss()
    model.train()

    def step() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=job["precision"] == "bf16"):
            loss: Tensor = criterion(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return step


def stock(job: dict[str, Any]) -> Step:
    """PyTorch in eager mode, channels-last, autocast."""
    model = _peers_model(job)
    return _reference_step(model, _sgd(model, job), job)


def nchw(job: dict[str, Any]) -> Step:
    """The same without channels-last, as most people run it."""
    model = _peers_model(job).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return _reference_step(model, _sgd(model, job), job, torch.contiguous_format)


def bf16_products(job: dict[str, Any]) -> Step:
    """Stock in float32, of which convolutions and dense layers multiply in bf16."""
    if job["precision"] != "fp32":
        raise ConfigError("has products of float32 to round; add --precisions fp32")
    if "amx_bf16" not in read_node().flags:
        raise ConfigError("this processor has no AMX, without which PyTorch's oneDNN does not round products")
    for products in (getattr(torch.backends.mkldnn, name, None) for name in ("conv", "matmul")):
        if products is None:
            raise ConfigError(f"torch {torch.__version__} has no torch.backends.mkldnn.conv: 2.9 has; give --python")
        products.fp32_precision = "bf16"
    return stock(job)


def compiled(job: dict[str, Any]) -> Step:
    """The same under torch.compile."""
    model = _peers_model(job)
    optimizer = _sgd(model, job)
    model.compile()
    return _reference_step(model, optimizer, job)


def ipex(job: dict[str, Any]) -> Step:
    """The same after ipex.optimize, which brings an SGD step of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import intel_extension_for_pytorch

    logging.getLogger("IPEX").setLevel(logging.ERROR)
    model = _peers_model(job).train()
    dtype = torch.bfloat16 if job["precision"] == "bf16" else torch.float32
    optimizer = _sgd(model, {**job, "tuned": False})
    model, optimizer = intel_extension_for_pytorch.optimize(model, optimizer=optimizer, dtype=dtype)
    return _reference_step(model, optimizer, job)


def timm(job: dict[str, Any]) -> Step:
    """The train.py of timm: its network where it has one, its optimizer factory, its step."""
    import timm
    from timm.optim._optim_factory import create_optimizer_v2

    name = job["model"].removeprefix("torchvision:")
    if timm.is_model(name):
        model = _channels_last(timm.create_model(name, num_classes=CLASSES))
        weights = _initial_weights(job).state_dict()
        if model.state_dict().keys() == weights.keys():
            model.load_state_dict(weights)
    else:
        model = _peers_model(job)
    fused: dict[str, Any] = {"fused": True} if job["tuned"] and job["optimizer"] == "sgd" else {}
    optimizer = create_optimizer_v2(
        model, opt=job["optimizer"], lr=LR[job["optimizer"]], weight_decay=WEIGHT_DECAY, momentum=MOMENTUM, **fused
    )
    images, labels = _batch(job)
    criterion = nn.CrossEntropyLoss()
    model.train()

    def step() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=job["precision"] == "bf16"):
            loss: Tensor = criterion(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def knltrain(job: dict[str, Any]) -> Step:
    """What `knltrain bench` measures."""
    lars = job["optimizer"] == "lars"
    ours = TrainingStep(
        RunConfig(
            model=job["model"],
            image_size=job["image_size"],
            global_batch=job["batch"],
            precision=job["precision"],
            engine=job["engine"],
            optim=OptimConfig(
                name=job["optimizer"],
                variant="paper" if lars else "heavy-ball",
                lr=LR[job["optimizer"]],
                momentum=MOMENTUM,
                weight_decay=WEIGHT_DECAY,
            ),
        )
    )
    engine, job["engine"] = ours.engine, ours.engine.name
    images, labels = _batch(job)
    images = images.to(engine.dtype)

    def step() -> Tensor:
        engine.optimizer.zero_grad(set_to_none=True)
        with engine.autocast():
            logits = engine.model(images)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        engine.optimizer.step()
        return loss

    return step


RECIPES: dict[str, Callable[[dict[str, Any]], Step]] = {
    "stock": stock,
    "nchw": nchw,
    "bf16-products": bf16_products,
    "compile": compiled,
    "ipex": ipex,
    "timm": timm,
    "knltrain": knltrain,
}
