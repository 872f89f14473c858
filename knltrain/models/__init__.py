"""The networks, and building them by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from knltrain.config import RunConfig
from knltrain.errors import ConfigError
from knltrain.models import alexnet, resnet

MODELS: dict[str, Callable[..., nn.Module]] = {
    "alexnet": alexnet.alexnet,
    "alexnet_bn": alexnet.alexnet_bn,
    "alexnet_bn_small": alexnet.alexnet_bn_small,
    "resnet20": resnet.resnet20,
    "resnet50": resnet.resnet50,
}


def build_model(
    name: str,
    *,
    num_classes: int,
    image_size: int,
    dropout: float | None = None,
    zero_init_residual: bool = False,
) -> nn.Module:
    """Builds a network with fresh weights from torch's global generator.

    Args:
        name: a key of ``MODELS``, or ``torchvision:NAME`` for any classifier of torchvision.
        num_classes: length of the output.
        image_size: height and width of the images, in pixels; the small AlexNet sizes its first dense layer by it.
        dropout: probability before the last layers; None for the model's default.
        zero_init_residual: start every residual block's last batch-norm gamma at zero.

    Raises:
        ConfigError: an unknown name, images too small for the network, or an option that the network does not have.
    """
    options: dict[str, Any] = {}
    if dropout is not None:
        options["dropout"] = dropout
    if zero_init_residual:
        options["zero_init_residual"] = True
    if name.startswith("torchvision:"):
        return _torchvision(name.partition(":")[2], num_classes, options)
    if name not in MODELS:
        raise ConfigError(f"model: no {name!r}; there are {', '.join(MODELS)} and torchvision:NAME")
    accepted = inspect.signature(MODELS[name]).parameters
    for option in options:
        if option not in accepted:
            raise ConfigError(f"{option} has no effect on {name}: leave it at its default")
    return MODELS[name](num_classes=num_classes, image_size=image_size, **options)


def model_of(config: RunConfig, num_classes: int) -> nn.Module:
    """Builds a configuration's network, in channels-last memory format."""
    model = build_model(
        config.model,
        num_classes=num_classes,
        image_size=config.image_size,
        dropout=config.dropout,
        zero_init_residual=config.zero_init_residual,
    )
    channels_last: nn.Module = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return channels_last


def refuse_unbuildable(config: RunConfig) -> None:
    """Checks that a configuration's network can be built, before anything expensive starts.

    Its weights are not initialised, and torch's global generator is unchanged.

    Raises:
        ConfigError: as :func:`build_model`, or it does not accept a configured image size.
    """
    # The device meta would need no memory, but its convolution and batch norm import torch._dynamo, which takes 1 s.
    with torch.random.fork_rng(devices=[]), torch.inference_mode(), WithoutValues():
        model = model_of(config, num_classes=1)
        weights = [weight.shape for weight in model.parameters()]
        _refuse_size(model, config, "image-size")
        for size in config.schedule.image_sizes:
            other = model_of(config.at_size(size), num_classes=1)
            if [weight.shape for weight in other.parameters()] != weights:
                raise ConfigError(f"schedule.image-sizes: the weights of {config.model} are made for one image-size")
            _refuse_size(other, config.at_size(size), "schedule.image-sizes")


def refuse_single_values(config: RunConfig, image_sizes: Iterable[int], remedy: str) -> None:
    """Checks that a configuration's network can be trained on one image at a time, of any of some sizes.

    Batch norm cannot where its input has one pixel: a single value per channel has no variance.

    Args:
        config: gives the network.
        image_sizes: height and width of the images of steps with micro-batches of one, in pixels.
        remedy: what to do instead.

    Raises:
        ConfigError: it cannot; the message names the layer.
    """
    with torch.random.fork_rng(devices=[]), torch.inference_mode(), WithoutValues():
        for size in sorted(set(image_sizes)):
            model = model_of(config.at_size(size), num_classes=1)
            single: list[str] = []
            for path, module in model.named_modules():
                if isinstance(module, _BatchNorm):
                    module.register_forward_pre_hook(_record_single_values(single, path))
            model.eval()(torch.zeros(1, 3, size, size))
            if single:
                raise ConfigError(
                    f"a micro-batch of one image: batch norm {single[0]} of {config.model} gets one value per channel "
                    f"at image-size {size}, which has no variance; {remedy}"
                )


def _record_single_values(found: list[str], path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if arguments[0].numel() == arguments[0].shape[1]:
            found.append(path)

    return hook


class WithoutValues(TorchFunctionMode):
    """Skips random initialisation, which takes most of the time of building a network."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in (Tensor.uniform_, Tensor.normal_, nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def _refuse_size(model: nn.Module, config: RunConfig, field: str) -> None:
    """Raises ConfigError if a network does not accept an image size."""
    try:
        model.eval()(torch.zeros(1, 3, config.image_size, config.image_size))
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{field} {config.image_size}: {config.model} does not take such images ({reason}); give another size"
        ) from None


def _import_torchvision(model: str) -> Any:
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:
        # RuntimeError: a torchvision built for another torch fails while it registers its operators.
        raise ConfigError(f"model {model}: torchvision does not import here ({error})") from None
    return models


def _torchvision(name: str, num_classes: int, options: dict[str, Any]) -> nn.Module:
    models = _import_torchvision(f"torchvision:{name}")
    if name not in models.list_models(module=models):
        raise ConfigError(f"model: torchvision has no classifier {name!r}")
    if name in ("googlenet", "inception_v3"):
        options = {**options, "aux_logits": False, "init_weights": True}
    try:
        network: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **options)
    except TypeError as error:
        raise ConfigError(f"model torchvision:{name} refuses an option: {error}") from None
    return network
