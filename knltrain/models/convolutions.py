"""Choice of the algorithm of each convolution, PyTorch's or a native kernel, by measuring both on this node."""

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

# By a convolution's module path, the results (fields of convgrad.Native) that native kernels compute.
Choices: TypeAlias = dict[str, list[str]]

RESULTS = convgrad.Native._fields
# Minimum work of a measured call, and minimum pixels, so that the overhead per call is negligible.
_GFLOP, _PIXELS = 1.0, 4096
# Both are timed at least twice, alternately; again, up to a maximum, until one is faster by this factor.
_MAX_TURNS, _CLEAR_RATIO = 4, 1.15


class Convolution(NamedTuple):
    """Parameters of a convolution that its time depends on, except the number of images.

    Attributes:
        channels: input channels.
        height: input height, pixels.
        width: input width, pixels.
        weight: shape of the weights: K, C/groups, R, S.
        geometry: stride, padding, dilation, groups.
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
        """Returns the GFLOP of one result by direct convolution, 2 FLOP per multiply-add."""
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
        """Returns the results for which there is a native kernel to measure."""
        return convgrad.native_results(self.channels, self.weight, self.geometry, dtype)

    def has_winograd(self) -> bool:
        """Whether the Winograd kernels support it."""
        return winograd.takes(self.channels, self.weight, *self.geometry)


class Times(NamedTuple):
    """Measured times of one result of a convolution.

    Attributes:
        direct: seconds with PyTorch's direct convolution; for a bf16 weight gradient, with the engine's default.
        native: seconds with the native kernel.
        images: number of images in both.
    """

    direct: float
    native: float
    images: int


def eligible(config: RunConfig, num_classes: int) -> dict[str, Convolution]:
    """Returns the convolutions with native kernels, by module path, from a forward pass of one image.

    Args:
        config: gives network and image size.
        num_classes: length of the network's output.
    """
    found: dict[str, Convolution] = {}

    def record_shape(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
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
                module.register_forward_pre_hook(record_shape(path))
        model.eval()(torch.zeros(1, 3, config.image_size, config.image_size))
    return found


def measure(convolution: Convolution, images: int, dtype: torch.dtype = torch.float32) -> dict[str, Times]:
    """Times each result that has a native kernel, with it and with PyTorch alternately; the best of two or more calls.

    Args:
        convolution: the convolution, computed on random data.
        images: images of a micro-batch; fewer are used for large convolutions.
        dtype: data type of the tensors.

    Returns:
        Times by result: forward, input, weight.
    """
    c = convolution
    images = min(images, max(math.ceil(_GFLOP / c.gflop(1)), math.ceil(_PIXELS / (c.height * c.width))))
    random = torch.Generator()  # its own, so that the run's random numbers do not change
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
    for result, has_kernel in c.native(dtype)._asdict().items():
        if has_kernel:
            direct, native = (functools.partial(call, result, by) for by in (convgrad.NONE, c.native(dtype)))
            times[result] = _time_alternately(direct, native, images)
    return times


def _time_alternately(direct: Callable[[], object], native: Callable[[], object], images: int) -> Times:
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(_MAX_TURNS):
        for call, times in zip((direct, native), seconds, strict=True):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        slower, faster = sorted(map(min, seconds), reverse=True)
        if turn > 0 and slower > _CLEAR_RATIO * faster:
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
    """Returns the results that native kernels compute, according to ``config.conv``.

    Args:
        config: gives network, image size and conv.
        num_classes: length of the network's output.
        engine: resolved engine; only fused has a choice.
        precision: resolved precision.
        node: this node.
        threads: compute threads.
        images: images of a micro-batch.
        keep: store the measurement. Only one rank of a node does, because ranks may measure different results.
        recorded: the choices at the start of the run, which a resumed run keeps.

    Raises:
        ConfigError: conv winograd with an engine other than fused, or for a network without a suitable convolution.
    """
    if config.conv == "winograd" and engine != "fused":
        raise ConfigError(f"conv winograd: engine {engine} has only PyTorch's convolutions; add --engine fused")
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
                              "multiples of 16 channels; use another conv")  # fmt: skip
        return {path: list(RESULTS) for path in convolutions}
    if not convolutions or (precision == "bf16" and "amx_bf16" in node.flags):  # AMX multiplies faster than this saves
        return {}
    settings = {
        **settings_of(config.model, precision, node, threads), "fp32_precision": config.fp32_precision,
        "images": images, "size": config.image_size,
    }  # fmt: skip
    found = _faster_results(set(convolutions.values()), settings, images, dtype, keep)
    return {path: list(found[str(one)]) for path, one in convolutions.items() if found[str(one)]}


def _faster_results(
    convolutions: set[Convolution], settings: dict[str, object], images: int, dtype: torch.dtype, keep: bool
) -> Mapping[str, Sequence[str]]:
    """Returns, by convolution, the results that native kernels compute faster, stored or measured now."""
    found = stored_convolutions(settings)
    if found is None or not all(_valid(found.get(str(one))) for one in convolutions):
        found = {str(one): _faster(measure(one, images, dtype)) for one in convolutions}
        release_freed_memory()  # tensors of the run have other sizes
        if keep:
            store_convolutions(settings, found)
    return found


def _valid(results: object) -> bool:
    """Whether a convolution's entry in the file is valid for this version."""
    return isinstance(results, list) and all(result in RESULTS for result in results)


def _faster(times: Mapping[str, Times]) -> list[str]:
    return [result for result, one in times.items() if one.native < one.direct]


def use(model: nn.Module, choices: Mapping[str, Sequence[str]]) -> None:
    """Applies choices to the convolutions of a fused network.

    Args:
        model: a network after :func:`knltrain.models.fused.fuse`.
        choices: the result of :func:`choose`.
    """
    for path, results in choices.items():
        module = model.get_submodule(path)
        assert isinstance(module, FusedConv2d)
        module.by = convgrad.Native(**dict.fromkeys(results, True))
