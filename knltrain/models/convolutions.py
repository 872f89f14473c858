"""Which algorithm computes each float32 convolution of a network: measured here, layer by layer, both ways in turns."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn

from knltrain.config import RunConfig
from knltrain.errors import ConfigError
from knltrain.models import WithoutValues, model_of
from knltrain.models.fused import FusedConv2d, fuses_convolution
from knltrain.node.measured import settings_of, store_convolutions, stored_convolutions
from knltrain.node.topology import Node
from knltrain.ops import bf16, convgrad, winograd

# By a convolution's path in the network, which of its results (the fields of convgrad.Winograd) are Winograd's.
Choices: TypeAlias = dict[str, list[str]]

RESULTS = convgrad.Winograd._fields
# A measured call has at least so much work, and as many tiles as make little of what is done once a call.
_GFLOP, _TILES = 4.0, 512
_TURNS = 2


class Convolution(NamedTuple):
    """What the time of a convolution depends on, besides the number of images.

    Attributes:
        channels: of the input.
        height: of the input, in pixels.
        width: of the input, in pixels.
        weight: K, C/groups, R, S.
        padding: zeros around the input, in pixels.
        groups: of channels, each convolved alone.
    """

    channels: int
    height: int
    width: int
    weight: tuple[int, ...]
    padding: tuple[int, int]
    groups: int

    def __str__(self) -> str:
        of = f"{self.channels}x{self.height}x{self.width} by {'x'.join(map(str, self.weight))}"
        return f"{of}, padding {self.padding[0]},{self.padding[1]}, groups {self.groups}"

    def gflop(self, images: int) -> float:
        """Of one result, summed directly, with 2 per multiply-add."""
        outputs, inputs, kernel, _ = self.weight
        height, width = (
            size + 2 * pad - kernel + 1 for size, pad in zip((self.height, self.width), self.padding, strict=True)
        )
        return 2e-9 * images * height * width * outputs * inputs * kernel * kernel


class Times(NamedTuple):
    """How long one result of a convolution takes.

    Attributes:
        direct: seconds of the direct sum.
        winograd: seconds of Winograd's algorithm.
        images: that both took.
    """

    direct: float
    winograd: float
    images: int


def eligible(config: RunConfig, num_classes: int) -> dict[str, Convolution]:
    """The convolutions of a network that Winograd's algorithm computes, by path; found by running one image.

    Args:
        config: names the network, and the size of the image.
        num_classes: length of the network's output.
    """
    found: dict[str, Convolution] = {}

    def note(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            assert isinstance(module, nn.Conv2d)
            _, channels, height, width = arguments[0].shape
            shape, padding = tuple(module.weight.shape), cast("tuple[int, int]", module.padding)
            if winograd.takes(channels, shape, module.stride, padding, module.dilation, module.groups):
                found.setdefault(path, Convolution(channels, height, width, shape, padding, module.groups))

        return hook

    with torch.random.fork_rng(devices=[]), torch.inference_mode(), WithoutValues():
        model = model_of(config, num_classes)
        for path, module in model.named_modules():
            if fuses_convolution(module):
                module.register_forward_pre_hook(note(path))
        model.eval()(torch.zeros(1, 3, config.image_size, config.image_size))
    return found


def measure(convolution: Convolution, images: int) -> dict[str, Times]:
    """Times each result of a convolution both ways, in turns: the better of two calls after one that is not timed.

    Args:
        convolution: what is computed, on noise.
        images: of a micro-batch; fewer are taken where those tell as much.

    Returns:
        By result: forward, input, weight.
    """
    c = convolution
    images = min(images, max(math.ceil(_GFLOP / c.gflop(1)), math.ceil(16 * _TILES / (c.height * c.width))))
    stride = dilation = (1, 1)
    random = torch.Generator()  # of its own: the run's numbers are to stay as they are
    x = torch.randn(images, c.channels, c.height, c.width, generator=random).to(memory_format=torch.channels_last)
    weight = torch.randn(c.weight, generator=random).to(memory_format=torch.channels_last)
    dy = winograd.conv2d(x, weight, None, c.padding, c.groups)

    def gradient(of: str) -> Callable[[], object]:
        mask = (of == "input", of == "weight", False)
        return lambda: bf16.conv2d_backward(dy, x, weight, None, stride, c.padding, dilation, c.groups, mask)

    ways: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "forward": (
            lambda: bf16.conv2d(x, weight, None, stride, c.padding, dilation, c.groups),
            lambda: winograd.conv2d(x, weight, None, c.padding, c.groups),
        ),
        "input": (gradient("input"), lambda: winograd.conv2d_input(dy, weight, c.padding, c.groups)),
        "weight": (gradient("weight"), lambda: winograd.conv2d_weight(x, dy, c.weight, c.padding, c.groups)),
    }
    return {result: _in_turns(*both, images) for result, both in ways.items()}


def _in_turns(direct: Callable[[], object], winograd: Callable[[], object], images: int) -> Times:
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(1 + _TURNS):
        for way, taken in zip((direct, winograd), seconds, strict=True):
            start = time.perf_counter()
            way()
            taken.append(time.perf_counter() - start)
    return Times(min(seconds[0][1:]), min(seconds[1][1:]), images)


def choose(
    config: RunConfig,
    *,
    num_classes: int,
    engine: str,
    precision: str,
    node: Node,
    threads: int,
    images: int,
    recorded: Choices | None = None,
) -> Choices:
    """Decides what Winograd's algorithm computes, as ``config.conv`` says.

    Args:
        config: names the network, the size of its images, and conv.
        num_classes: length of the network's output.
        engine: as it was resolved; only fused has the choice.
        precision: likewise; only of fp32 there is one.
        node: where it runs.
        threads: compute threads.
        images: of a micro-batch.
        recorded: what was chosen when the run began, to be kept.

    Raises:
        ConfigError: conv winograd, in bf16, by another engine than fused, or on a network that has nothing for it.
    """
    if config.conv == "winograd":
        if engine != "fused":
            raise ConfigError(f"conv winograd: engine {engine} has PyTorch's convolutions alone; add --engine fused")
        if precision != "fp32":
            raise ConfigError("conv winograd: it computes in float32; add --precision fp32")
    if config.conv == "direct" or engine != "fused" or precision != "fp32":
        return {}
    if recorded is not None:
        return recorded
    convolutions = eligible(config, num_classes)
    if config.conv == "winograd":
        if not convolutions:
            raise ConfigError(f"conv winograd: {config.model} has no convolution of 3 x 3 or 5 x 5 with stride 1 and "
                              "multiples of 16 channels; leave it out")  # fmt: skip
        return {path: list(RESULTS) for path in convolutions}
    if not convolutions:
        return {}
    settings = {**settings_of(config.model, precision, node, threads), "images": images, "size": config.image_size}
    found = stored_convolutions(settings)
    if found is None or not all(_known(found.get(str(one))) for one in convolutions.values()):
        found = {str(one): _faster(measure(one, images)) for one in set(convolutions.values())}
        store_convolutions(settings, found)
    return {path: list(found[str(one)]) for path, one in convolutions.items() if found[str(one)]}


def _known(results: object) -> bool:
    """Whether what a file says of a convolution is what this version writes."""
    return isinstance(results, list) and all(result in RESULTS for result in results)


def _faster(times: Mapping[str, Times]) -> list[str]:
    return [result for result, one in times.items() if one.winograd < one.direct]


def use(model: nn.Module, choices: Mapping[str, Sequence[str]]) -> None:
    """Has convolutions of a fused network computed as they were chosen to be.

    Args:
        model: after :func:`knltrain.models.fused.fuse`.
        choices: of :func:`choose`.
    """
    for path, results in choices.items():
        module = model.get_submodule(path)
        assert isinstance(module, FusedConv2d)
        module.by = convgrad.Winograd(**dict.fromkeys(results, True))
