"""FLOPs, memory traffic and gradients of each layer of a network, from its architecture. Imports no torch.

The tables are those of ``knltrain.models``, layer by layer as their modules are called; a test holds them against the
modules. Arithmetic is counted with 2 per multiply-add. A convolution's or dense layer's backward pass is as much again
for the gradient of its input (none for the first layer's) and for that of its weights. What a layer moves is counted in
values, with each tensor read or written once by each pass over it: the kernels of batch norm, with the ReLU and the
addition that follow it, make two passes each way.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from knltrain.errors import ConfigError


@dataclass(frozen=True)
class Layer:
    """A layer, per image unless stated otherwise.

    Attributes:
        name: the module's path.
        kind: conv, linear, norm, activation, pool, dropout or loss.
        forward_flops: 2 per multiply-add.
        backward_flops: of the gradients of input and weights.
        forward_values: values of activations that are read or written.
        backward_values: the same, backward.
        parameters: number of elements of each parameter, in the order in which their gradients become ready.
    """

    name: str
    kind: str
    forward_flops: float
    backward_flops: float
    forward_values: float
    backward_values: float
    parameters: tuple[int, ...] = ()

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters."""
        return sum(self.parameters)


@dataclass(frozen=True)
class Gradient:
    """The gradient of a parameter, or of several that become ready together.

    Attributes:
        elements: how many numbers.
        itemsize: bytes of each, in the model's memory; of these, buckets are made.
    """

    elements: int
    itemsize: int


@dataclass(frozen=True)
class LayerTime:
    """Time of a layer for one micro-batch on one rank.

    Attributes:
        name: the module's path.
        forward_s: seconds.
        backward_s: seconds.
        gradients: ready to be sent after the layer's backward pass.
    """

    name: str
    forward_s: float
    backward_s: float
    gradients: tuple[Gradient, ...] = ()


class _Walk:
    """Follows a batch of one image through a network."""

    def __init__(self, image_size: int) -> None:
        self.channels, self.size = 3, image_size
        self.layers: list[Layer] = []

    @property
    def values(self) -> int:
        """Elements of the current activation."""
        return self.channels * self.size * self.size

    def conv(
        self, name: str, out: int, kernel: int, *, stride: int = 1, pad: int = 0, groups: int = 1, bias: bool
    ) -> None:
        before = self.values
        weights = out * (self.channels // groups) * kernel * kernel
        self.size = (self.size + 2 * pad - kernel) // stride + 1
        flops = 2.0 * weights * self.size * self.size
        self.channels = out
        moved = before + self.values
        first = not self.layers
        parameters = (weights, out) if bias else (weights,)
        self.layers.append(Layer(name, "conv", flops, flops if first else 2 * flops, moved,
                                 moved if first else 2 * moved, parameters))  # fmt: skip

    def norm(self, name: str, *, shortcut: bool = False) -> None:
        # Forward: the input twice, the output, the shortcut. Backward: input and gradient twice, the gradient's result.
        values = self.values
        self.layers.append(Layer(name, "norm", 0, 0, values * (3 + shortcut), values * (5 + shortcut),
                                 (self.channels, self.channels)))  # fmt: skip

    def elementwise(self, name: str, kind: str, *, forward: int = 2, backward: int = 3) -> None:
        self.layers.append(Layer(name, kind, 0, 0, forward * self.values, backward * self.values))

    def pool(self, name: str, kernel: int, stride: int, *, pad: int = 0, ceil: bool = False) -> None:
        before = self.values
        span = self.size + 2 * pad - kernel
        self.size = (-(-span // stride) if ceil else span // stride) + 1
        self._pooled(name, before)

    def average(self, name: str, size: int) -> None:
        before, self.size = self.values, size
        self._pooled(name, before)

    def _pooled(self, name: str, before: int) -> None:
        moved = before + self.values
        self.layers.append(Layer(name, "pool", 0, 0, moved, moved))

    def linear(self, name: str, out: int) -> None:
        weights, before = out * self.values, self.values
        self.channels, self.size = out, 1
        moved = before + out
        self.layers.append(Layer(name, "linear", 2.0 * weights, 4.0 * weights, moved, 2 * moved, (out, weights)))

    def loss(self) -> None:
        self.elementwise("(loss)", "loss")


def _alexnet(walk: _Walk, num_classes: int, *, batch_norm: bool) -> None:
    def norm(index: int) -> None:
        if batch_norm:
            walk.norm(f"features.norm{index}")
        else:  # local response normalisation: one pass each way, the input kept
            walk.elementwise(f"features.norm{index}", "norm")

    def conv(index: int, out: int, kernel: int, *, stride: int = 1, pad: int = 0, groups: int = 1) -> None:
        walk.conv(f"features.conv{index}", out, kernel, stride=stride, pad=pad, groups=groups, bias=True)
        walk.elementwise(f"features.relu{index}", "activation")

    for index, (out, kernel, stride, pad, groups) in enumerate(
        [(96, 11, 4, 0, 1), (256, 5, 1, 2, 2), (384, 3, 1, 1, 1), (384, 3, 1, 1, 2), (256, 3, 1, 1, 2)], 1
    ):
        conv(index, out, kernel, stride=stride, pad=pad, groups=groups)
        if index <= 2 and not batch_norm:
            norm(index)
        if index in (1, 2, 5):
            walk.pool(f"features.pool{index}", 3, 2, ceil=True)
        if index <= 4 and batch_norm:
            norm(index)
    for index in (6, 7):
        walk.linear(f"classifier.fc{index}", 4096)
        walk.elementwise(f"classifier.relu{index}", "activation")
        walk.elementwise(f"classifier.drop{index}", "dropout")
    walk.linear("classifier.fc8", num_classes)


def _small_alexnet(walk: _Walk, num_classes: int) -> None:
    for index, out in enumerate((32, 64, 128, 256, 256), 1):
        walk.conv(f"features.conv{index}", out, 3, pad=1, bias=True)
        walk.elementwise(f"features.relu{index}", "activation")
        if index <= 3:
            walk.pool(f"features.pool{index}", 2, 2)
        walk.norm(f"features.norm{index}")
    walk.average("features.pool5", 2)
    walk.elementwise("classifier.drop6", "dropout")
    walk.linear("classifier.fc6", num_classes)


def _resnet50(walk: _Walk, num_classes: int) -> None:
    walk.conv("conv1", 64, 7, stride=2, pad=3, bias=False)
    walk.norm("bn1")
    walk.pool("maxpool", 3, 2, pad=1)
    for stage, count in enumerate((3, 4, 6, 3)):
        width = 64 * 2**stage
        for block in range(count):
            name, stride = f"layer{stage + 1}.{block}", 2 if stage and not block else 1
            channels, size = walk.channels, walk.size
            if not block:  # the shortcut is computed first, as the module does
                walk.conv(f"{name}.downsample.0", 4 * width, 1, stride=stride, bias=False)
                walk.norm(f"{name}.downsample.1")
            walk.channels, walk.size = channels, size
            walk.conv(f"{name}.conv1", width, 1, bias=False)
            walk.norm(f"{name}.bn1")
            walk.conv(f"{name}.conv2", width, 3, stride=stride, pad=1, bias=False)
            walk.norm(f"{name}.bn2")
            walk.conv(f"{name}.conv3", 4 * width, 1, bias=False)
            walk.norm(f"{name}.bn3", shortcut=True)
    walk.average("avgpool", 1)
    walk.linear("fc", num_classes)


def _resnet20(walk: _Walk, num_classes: int) -> None:
    walk.conv("conv1", 16, 3, pad=1, bias=False)
    walk.norm("bn1")
    for stage, width in enumerate((16, 32, 64), 1):
        for block in range(3):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and not block else 1
            walk.conv(f"{name}.conv1", width, 3, stride=stride, pad=1, bias=False)
            walk.norm(f"{name}.bn1")
            walk.conv(f"{name}.conv2", width, 3, pad=1, bias=False)
            walk.norm(f"{name}.bn2", shortcut=True)
    walk.average("avgpool", 1)
    walk.linear("fc", num_classes)


_NETWORKS: dict[str, tuple[int, Callable[[_Walk, int], None]]] = {
    "alexnet": (67, lambda walk, classes: _alexnet(walk, classes, batch_norm=False)),
    "alexnet_bn": (67, lambda walk, classes: _alexnet(walk, classes, batch_norm=True)),
    "alexnet_bn_small": (8, _small_alexnet),
    "resnet20": (8, _resnet20),
    "resnet50": (32, _resnet50),
}
KNOWN = tuple(_NETWORKS)


def layers_of(model: str, *, image_size: int, num_classes: int = 1000) -> list[Layer]:
    """Returns a network's layers in the order of the forward pass, the loss last.

    Args:
        model: as a configuration names it.
        image_size: height and width of the images, pixels.
        num_classes: length of the output.

    Raises:
        ConfigError: a network whose layers are not known here, or images too small for it.
    """
    if model not in _NETWORKS:
        raise ConfigError(
            f"model {model!r}: predict knows the layers of {', '.join(_NETWORKS)}; of another one, give --layers FILE "
            "with the JSON of `knltrain bench --profile`"
        )
    smallest, build = _NETWORKS[model]
    if image_size < smallest:
        raise ConfigError(f"image-size {image_size}: {model} needs at least {smallest} pixels")
    walk = _Walk(image_size)
    build(walk, num_classes)
    walk.loss()
    return walk.layers


def gradients_of(layer: Layer, precision: str) -> tuple[Gradient, ...]:
    """A layer's gradients as the engine ``fused`` has them: in bf16 but for those of norms, or all in float32."""
    itemsize = 2 if precision == "bf16" and layer.kind != "norm" else 4
    return tuple(Gradient(elements, itemsize) for elements in layer.parameters)


def times_from_profile(profile: Mapping[str, Any], source: str = "the profile") -> tuple[list[LayerTime], int, float]:
    """Reads the JSON of ``knltrain bench --profile``.

    The profiler makes steps longer: times are scaled so that all parts together take the step's time without it.
    What the profile calls the rest is put before the first layer, as forward time.

    Args:
        profile: the object.
        source: what to call it in an error.

    Returns:
        The layers in the order of the forward pass, the batch they were timed at, and the optimizer's seconds.

    Raises:
        ConfigError: it is not such a profile.
    """
    try:
        batch, rows = int(profile["batch"]), profile["layers"]
        scale = float(profile["step_s"]["median"]) / float(profile["profiled_step_s"])
        itemsize = 2 if profile["precision"] == "bf16" else 4
        times = [LayerTime("(rest)", max(0.0, float(profile["other_s"])) * scale, 0.0)]
        for row in reversed(rows):
            size = 4 if row["kind"] == "norm" else itemsize
            elements = int(row["gradient_bytes"]) // size
            gradients = (Gradient(elements, size),) if elements else ()
            times.append(LayerTime(str(row["layer"]), float(row["forward_s"]) * scale,
                                   float(row["backward_s"]) * scale, gradients))  # fmt: skip
        optimizer_s = float(profile["optimizer_s"]) * scale
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        raise ConfigError(f"{source}: not what `knltrain bench --profile --json` prints") from None
    if batch < 1 or not all(time.forward_s >= 0 and time.backward_s >= 0 for time in times):
        raise ConfigError(f"{source}: a batch or a time in it is not positive")
    return times, batch, optimizer_s


def buckets(gradients: Sequence[Gradient], bucket_mb: float) -> list[list[int]]:
    """Divides gradients into the buckets of DistributedDataParallel, and returns their indices in order of leaving.

    Gradients of one type fill a bucket until it holds ``bucket_mb``; full buckets come in the order in which they are
    full, the last of each type after them. There is no small first bucket: PyTorch makes one only without a given
    bucket size.

    Args:
        gradients: in the order in which they become ready, which is that of the backward pass.
        bucket_mb: MiB.
    """
    limit = bucket_mb * 2**20
    full: list[list[int]] = []
    filling: dict[int, list[int]] = {}
    sizes: dict[int, int] = {}
    for index, gradient in enumerate(gradients):
        key = gradient.itemsize
        filling.setdefault(key, []).append(index)
        sizes[key] = sizes.get(key, 0) + gradient.elements * key
        if sizes[key] >= limit:
            full.append(filling.pop(key))
            sizes[key] = 0
    return list(itertools.chain(full, filling.values()))
