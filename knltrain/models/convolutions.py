"""What computes each convolution of a network: measured here, layer by layer, both ways in turns."""

from __future__ import annotations

import functools
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
from knltrain.node.memory import release_freed_memory
from knltrain.node.topology import Node
from knltrain.node.tuning_cache import settings_of, store_convolutions, stored_convolutions
from knltrain.ops import convgrad, winograd

# By a convolution's path in the network, which of its results (the fields of convgrad.Native) native kernels compute.
Choices: TypeAlias = dict[str, list[str]]

RESULTS = convgrad.Native._fields
# A measured call has at least so much work, and as many pixels as make little of what is done once a call.
_GFLOP, _PIXELS = 1.0, 4096
# Both ways have two turns, and as many more up to this as it takes until one is faster by this factor.
_MOST_TURNS, _CLEARLY = 4, 1.15


class Convolution(NamedTuple):
    """What the time of a convolution depends on, besides the number of images.

    Attributes:
        channels: of the input.
        height: of the input, in pixels.
        width: of the input, in pixels.
        weight: K, C/groups, R, S.
        geometry: how the kernel moves.
    """

    channels: int
    height: int
    width: int
    weight: tuple[int, ...]
    geometry: convgrad.Geometry

    def __str__(self) -> str:
        of = f"{self.channels}x{self.height}x{self.width} by {'x'.join(map(str, self.weight))}"
        stride, padding, dilation = (f"{down},{across}" for down, across in self.geometry[:3])
        return f"{of}, stride {stride}, padding {padding}, dilation {dilation}, groups {self.geometry.groups}"

    def gflop(self, images: int) -> float:
        """Of one result, summed directly, with 2 per multiply-add."""
        outputs, inputs, *kernel = self.weight
        stride, padding, dilation, _ = self.geometry
        height, width = (
            (size + 2 * pad - reach * (length - 1) - 1) // step + 1
            for size, pad, reach, length, step in zip(
                (self.height, self.width), padding, dilation, kernel, stride, strict=True
            )
        )
        return 2e-9 * images * height * width * outputs * inputs * math.prod(kernel)

    def native(self, dtype: torch.dtype = torch.float32) -> convgrad.Native:
        """Which of its results there are kernels for, that are to be measured."""
        return convgrad.native_results(self.channels, self.weight, self.geometry, dtype)

    def has_winograd(self) -> bool:
        """Whether Winograd's algorithm computes it."""
        return winograd.takes(self.channels, self.weight, *self.geometry)


class Times(NamedTuple):
    """How long one result of a convolution takes.

    Attributes:
        direct: seconds of PyTorch's, a direct sum; of a weight gradient in bf16, what the engine has without a choice.
        native: seconds of the kernels'.
        images: that both took.
    """

    direct: float
    native: float
    images: int


def eligible(config: RunConfig, num_classes: int) -> dict[str, Convolution]:
    """The convolutions of a network that there are kernels for, by path; found by running one image.

    Args:
        config: names the network, and the size of the image.
        num_classes: length of the network's output.
    """
    found: dict[str, Convolution] = {}

    def note(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            assert isinstance(module, nn.Conv2d)
            _, channels, height, width = arguments[0].shape
            stride, padding, dilation = (
                cast("tuple[int, int]", pair) for pair in (module.stride, module.padding, module.dilation)
            )
            geometry = convgrad.Geometry(stride, padding, dilation, module.groups)
            one = Convolution(channels, height, width, tuple(module.weight.shape), geometry)
            if any(one.native()):
                found.setdefault(path, one)

        return hook

    with torch.random.fork_rng(devices=[]), torch.inference_mode(), WithoutValues():
        model = model_of(config, num_classes)
        for path, module in model.named_modules():
            if fuses_convolution(module):
                module.register_forward_pre_hook(note(path))
        model.eval()(torch.zeros(1, 3, config.image_size, config.image_size))
    return found


def measure(convolution: Convolution, images: int, dtype: torch.dtype = torch.float32) -> dict[str, Times]:
    """Times each result that there is a kernel for, both ways in turns: the best of two calls, or more if it is close.

    Args:
        convolution: what is computed, on noise.
        images: of a micro-batch; fewer are taken where those tell as much.
        dtype: of the tensors.

    Returns:
        By result: forward, input, weight.
    """
    c = convolution
    images = min(images, max(math.ceil(_GFLOP / c.gflop(1)), math.ceil(_PIXELS / (c.height * c.width))))
    random = torch.Generator()  # of its own: the run's numbers are to stay as they are
    x, weight = (
        torch.randn(shape, generator=random).to(dtype, memory_format=torch.channels_last)
        for shape in ((images, c.channels, c.height, c.width), c.weight)
    )
    dy = convgrad.forward(x, weight, None, c.geometry, convgrad.NONE)

    def call(result: str, by: convgrad.Native) -> object:
        if result == "forward":
            return convgrad.forward(x, weight, None, c.geometry, by)
        needs = (result == "input", result == "weight", False)
        return convgrad.backward(dy, x, weight, None, c.geometry, needs, by)

    times = {}
    for result, there_is in c.native(dtype)._asdict().items():
        if there_is:
            direct, native = (functools.partial(call, result, by) for by in (convgrad.NONE, c.native(dtype)))
            times[result] = _in_turns(direct, native, images)
    return times


def _in_turns(direct: Callable[[], object], native: Callable[[], object], images: int) -> Times:
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(_MOST_TURNS):
        for way, taken in zip((direct, native), seconds, strict=True):
            start = time.perf_counter()
            way()
            taken.append(time.perf_counter() - start)
        slower, faster = sorted(map(min, seconds), reverse=True)
        if turn > 0 and slower > _CLEARLY * faster:
            break
    return Times(min(seconds[0]), min(seconds[1]), images)


def choose(
    config: RunConfig,
    *,
    num_classes: int,
    engine: str,
    precision: str,
    node: Node,
    threads: int,
    images: int,
    keep: bool = True,
    recorded: Choices | None = None,
) -> Choices:
    """Decides what native kernels compute, as ``config.conv`` says.

    Args:
        config: names the network, the size of its images, and conv.
        num_classes: length of the network's output.
        engine: as it was resolved; only fused has the choice.
        precision: likewise.
        node: where it runs.
        threads: compute threads.
        images: of a micro-batch.
        keep: store what was measured: one rank of a node does, for another's measurement may say something else.
        recorded: what was chosen when the run began, to be kept.

    Raises:
        ConfigError: conv winograd by another engine than fused, or on a network that has nothing for it.
    """
    if config.conv == "winograd" and engine != "fused":
        raise ConfigError(f"conv winograd: engine {engine} has PyTorch's convolutions alone; add --engine fused")
    if config.conv == "direct" or engine != "fused":
        return {}
    if recorded is not None:
        return recorded
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    convolutions = {path: one for path, one in eligible(config, num_classes).items() if any(one.native(dtype))}
    if config.conv == "winograd":
        convolutions = {path: one for path, one in convolutions.items() if one.has_winograd()}
        if not convolutions:
            raise ConfigError(f"conv winograd: {config.model} has no convolution of 3 x 3 or 5 x 5 with stride 1 and "
                              "multiples of 16 channels; leave it out")  # fmt: skip
        return {path: list(RESULTS) for path in convolutions}
    if not convolutions or (precision == "bf16" and "amx_bf16" in node.flags):  # AMX multiplies faster than this saves
        return {}
    settings = {
        **settings_of(config.model, precision, node, threads), "fp32_precision": config.fp32_precision,
        "images": images, "size": config.image_size,
    }  # fmt: skip
    found = _faster_ones(set(convolutions.values()), settings, images, dtype, keep)
    return {path: list(found[str(one)]) for path, one in convolutions.items() if found[str(one)]}


def _faster_ones(
    convolutions: set[Convolution], settings: dict[str, object], images: int, dtype: torch.dtype, keep: bool
) -> Mapping[str, Sequence[str]]:
    """By convolution, in which results the kernels are faster: as it is stored for such settings, or measured now."""
    found = stored_convolutions(settings)
    if found is None or not all(_known(found.get(str(one))) for one in convolutions):
        found = {str(one): _faster(measure(one, images, dtype)) for one in convolutions}
        release_freed_memory()  # a run's tensors have other sizes
        if keep:
            store_convolutions(settings, found)
    return found


def _known(results: object) -> bool:
    """Whether what a file says of a convolution is what this version writes."""
    return isinstance(results, list) and all(result in RESULTS for result in results)


def _faster(times: Mapping[str, Times]) -> list[str]:
    return [result for result, one in times.items() if one.native < one.direct]


def use(model: nn.Module, choices: Mapping[str, Sequence[str]]) -> None:
    """Has convolutions of a fused network computed as they were chosen to be.

    Args:
        model: after :func:`knltrain.models.fused.fuse`.
        choices: of :func:`choose`.
    """
    for path, results in choices.items():
        module = model.get_submodule(path)
        assert isinstance(module, FusedConv2d)
        module.by = convgrad.Native(**dict.fromkeys(results, True))
