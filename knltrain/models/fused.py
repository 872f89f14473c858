"""Layers with native kernels, which replace torch's by module type.

Only the class of a module changes: parameters, buffers, hooks and names in state dicts stay. Nothing is assumed that
may change later:

* a layer computes what torch's does for any input and with any settings. Where the kernel does not take an input
  (another type or layout, an empty batch, a transform of torch.func), the layer is torch's own;
* what several modules compute together, as batch norm and the ReLU after it, is joined by the module that calls them,
  in its forward pass, and only where each is plain: of the expected type, without hooks. Otherwise its own forward
  pass runs. The modules themselves are not changed by it, so anybody may call one of them alone.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable
from typing import Any, ClassVar, TypeGuard, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from knltrain.models import resnet
from knltrain.ops import bf16
from knltrain.ops.batchnorm import batch_norm_act
from knltrain.ops.convgrad import NONE, Geometry, Native, conv2d, conv2d_and_statistics, native_results
from knltrain.ops.dropout import dropout
from knltrain.ops.pool import max_pool2d, takes_window

_FLOATS = (torch.bfloat16, torch.float32)
_Kind = TypeVar("_Kind", bound=nn.Module)


# Layers --------------------------------------------------------------------------------------------------------------


class FusedConv2d(nn.Conv2d):
    """nn.Conv2d with a faster weight gradient in bf16, and the chosen kernels in float32."""

    # The results that native kernels compute in float32; see knltrain.models.convolutions.
    by = NONE

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Any:
        """Returns the output; with a shift, if :meth:`has_statistics`, also its mean and variance per channel."""
        if shift is not None:
            return conv2d_and_statistics(x, self.weight, shift, self._geometry, self._kernels(x))
        if type(self) is not FusedConv2d:  # its weight is computed, by a parametrization, whenever it is looked at
            return super().forward(x)
        if self.weight.dtype == torch.bfloat16 and x.dtype == torch.float32:  # an image, in evaluation
            x = x.to(torch.bfloat16)
        if not self._takes(x):
            return super().forward(x)
        if x.dim() == 3:
            return self.forward(x[None])[0]
        return conv2d(x, self.weight, self.bias, **self._geometry._asdict(), by=self._kernels(x))

    def has_statistics(self, x: Tensor) -> bool:
        """Whether a native kernel computes the output, and can compute its statistics in the same pass."""
        return self.bias is None and self._takes(x) and x.dim() == 4 and x.numel() > 0 and self._kernels(x).forward

    @property
    def _geometry(self) -> Geometry:
        stride, padding, dilation = (
            cast("tuple[int, int]", pair) for pair in (self.stride, self.padding, self.dilation)
        )
        return Geometry(stride, padding, dilation, self.groups)

    def _takes(self, x: Tensor) -> bool:
        """Whether input and weights are of one type that autocast would not change."""
        return (
            fuses_geometry(self)
            and x.dim() in (3, 4)
            and {x.dtype} == {tensor.dtype for tensor in (self.weight, self.bias) if tensor is not None}
            and not (torch.is_autocast_enabled("cpu") and x.dtype == torch.float32)
            and not _in_transform()
        )

    def _kernels(self, x: Tensor) -> Native:
        """The chosen results, if the layer is still what they were chosen for, and PyTorch's would be channels-last."""
        if self.by == NONE or x.dtype not in _FLOATS or x.device.type != "cpu":
            return NONE
        # Weights of 1 x 1 are in both formats, and PyTorch then goes by the input.
        if not x.is_contiguous(memory_format=torch.channels_last) and self.weight.is_contiguous():
            return NONE
        possible = native_results(x.shape[1], self.weight.shape, self._geometry, x.dtype)
        return Native(*(chosen and is_possible for chosen, is_possible in zip(self.by, possible, strict=True)))


class FusedLinear(nn.Linear):
    """nn.Linear that computes in float32 if PyTorch would emulate bf16, which is far slower."""

    def forward(self, x: Tensor) -> Tensor:
        if type(self) is FusedLinear and self.weight.dtype == torch.bfloat16 and not bf16.onednn_computes_bf16():
            return bf16.linear(x.to(torch.bfloat16), self.weight, self.bias)
        return super().forward(x)


class FusedBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d with a native kernel, which can add a residual and apply a ReLU too."""

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        relu: bool = False,
        cap: float | None = None,
        statistics: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Returns the output, and if :meth:`takes`, with the operations of ``batch_norm_act`` after it."""
        if not self.takes(x):
            return super().forward(x)
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return batch_norm_act(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            residual=None if residual is None else _channels_last(residual),
            relu=relu,
            cap=cap,
            training=self.training,
            momentum=cast("float", self.momentum),
            eps=self.eps,
            statistics=statistics,
        )

    def takes(self, x: Tensor) -> bool:
        """Whether the kernel computes the layer; the rest is torch's, and so are errors."""
        return (
            type(self) is FusedBatchNorm2d
            and _is_image(x)
            and x.shape[1] == self.num_features
            and self.momentum is not None
            and self.track_running_stats
            and all(
                tensor is not None and tensor.dtype == torch.float32 and tensor.is_contiguous()
                for tensor in (self.weight, self.bias, self.running_mean, self.running_var)
            )
            and not (self.training and x.numel() == x.shape[1])
        )


class FusedMaxPool2d(nn.MaxPool2d):
    """nn.MaxPool2d with a native kernel, which can apply a ReLU too."""

    def forward(self, x: Tensor, relu: bool = False) -> Any:
        """Returns the output, and if :meth:`takes`, that of a ReLU before it."""
        if not self.takes(x):
            return super().forward(x)
        size, stride, padding = (cast("int", value) for value in (self.kernel_size, self.stride, self.padding))
        return max_pool2d(x, size, stride, padding, ceil_mode=self.ceil_mode, relu=relu)

    def takes(self, x: Tensor) -> bool:
        """Whether the kernel computes the layer; the rest is torch's, and so are errors."""
        return (
            _is_image(x)
            and self.dilation in (1, (1, 1))
            and not self.return_indices
            and takes_window(x, self.kernel_size, self.stride, self.padding, ceil_mode=self.ceil_mode)
        )


class FusedDropout(nn.Dropout):
    """nn.Dropout with a native kernel, which can apply a ReLU too."""

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        """Returns the output, and if :meth:`takes`, that of a ReLU before it."""
        if not self.takes(x):
            return super().forward(x)
        if not (x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))):
            x = x.contiguous()  # attention with the batch first ends in a transpose
        return dropout(x, self.p, training=self.training, relu=relu)

    def takes(self, x: Tensor) -> bool:
        """Whether the kernel computes the layer; the rest is torch's."""
        on_cpu = x.device.type == "cpu" and x.dtype in _FLOATS and x.numel() < 2**32
        return on_cpu and not self.inplace and not _in_transform()


def fuses_convolution(module: nn.Module) -> bool:
    """Whether a module becomes a :class:`FusedConv2d`."""
    return type(module) is nn.Conv2d and fuses_geometry(module)


def fuses_geometry(convolution: nn.Conv2d) -> bool:
    """Whether a convolution is padded with a given number of zeros."""
    return convolution.padding_mode == "zeros" and not isinstance(convolution.padding, str)


def _is_image(x: Tensor) -> bool:
    """Whether a tensor is N x C x H x W as kernels take it: channels-last on the CPU, in bf16 or float32."""
    return (
        not _in_transform()
        and x.dim() == 4
        and x.numel() > 0
        and x.device.type == "cpu"
        and x.dtype in _FLOATS
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _in_transform() -> bool:
    """Whether torch.func or forward-mode differentiation transforms what is computed: the kernels have neither."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


# Modules that join what their children compute -----------------------------------------------------------------------


def measures(hook: Callable[..., None]) -> Callable[..., None]:
    """Marks a hook that changes nothing and looks at no values: modules with no others are joined all the same."""
    hook.only_measures = True  # type: ignore[attr-defined]
    return hook


def _is_plain(module: nn.Module | None, *kinds: type[_Kind]) -> TypeGuard[_Kind]:
    """Whether a module is of one of some types, and a call of it does nothing but compute its type's forward pass."""
    if module is None or type(module) not in kinds:
        return False
    of_module = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    hooks = (hook for some in of_module for hook in some.values() if not hasattr(hook, "only_measures"))
    return not (any(hooks) or "forward" in vars(module) or module._compiled_call_impl or _has_any_global_hook())


def _normalized(
    norm: FusedBatchNorm2d,
    x: Tensor,
    convolution: nn.Module | None = None,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    cap: float | None = None,
) -> Tensor:
    """Returns relu(norm(convolution(x)) + residual), as far together as the kernels can.

    Args:
        norm: plain.
        x: input.
        convolution: before the norm, or None; its kernel computes the norm's statistics, if it can.
        residual: added before the ReLU.
        relu: whether there is a ReLU.
        cap: upper bound of the ReLU.
    """
    statistics = None
    if convolution is not None:
        if norm.training and _has_statistics(convolution, norm, x):
            x, *statistics = convolution(x, norm.running_mean)
        else:
            x = convolution(x)
    if norm.takes(x) and (residual is None or (residual.shape, residual.dtype) == (x.shape, x.dtype)):
        joined: Tensor = norm(x, residual=residual, relu=relu, cap=cap, statistics=statistics)
        return joined
    y: Tensor = norm(x)
    y = y if residual is None else y.add_(residual)
    if relu:
        y = F.relu(y) if cap is None else F.hardtanh(y, 0.0, cap)
    return y


def _has_statistics(convolution: nn.Module, norm: FusedBatchNorm2d, x: Tensor) -> bool:
    shift = norm.running_mean
    return (
        _is_plain(convolution, FusedConv2d)
        and convolution.has_statistics(x)
        and shift is not None
        and shift.dtype == torch.float32
        and len(shift) == convolution.out_channels
    )


def _sequence(self: Any, x: Any) -> Any:
    layers, place = list(self), 0
    while place < len(layers):
        x, count = _next_layers(layers, place, x)
        place += count
    return x


def _next_layers(layers: list[nn.Module], place: int, x: Any) -> tuple[Any, int]:
    """Computes the layers of a Sequential from a place on that go together, and counts them."""
    first, second, third = (*layers[place : place + 3], None, None)[:3]
    if _is_plain(first, FusedBatchNorm2d):
        y, count = _normalized_and_activated(first, x, None, second)
        return y, 1 + count
    if _is_plain(first, FusedConv2d) and _is_plain(second, FusedBatchNorm2d):
        y, count = _normalized_and_activated(second, x, first, third)
        return y, 2 + count
    if _is_plain(first, nn.ReLU) and not (first.inplace and _is_callers(layers, place)):
        if _is_plain(second, FusedMaxPool2d) and second.takes(x):
            return second(x, relu=True), 2
        # The gradient needs the result, so the layer after it must not be one that writes to it.
        if _is_plain(second, FusedDropout) and second.takes(x) and _is_plain(third, FusedLinear, FusedConv2d):
            return second(x, relu=True), 2
    return layers[place](x), 1


def _normalized_and_activated(
    norm: FusedBatchNorm2d, x: Tensor, convolution: nn.Module | None, after: nn.Module | None
) -> tuple[Tensor, int]:
    """Computes a batch norm with the ReLU after it, if one is there, and counts it."""
    if _is_plain(after, nn.ReLU6):
        return _normalized(norm, x, convolution, relu=True, cap=after.max_val), 1
    relu = _is_plain(after, nn.ReLU)
    return _normalized(norm, x, convolution, relu=relu), int(relu)


def _is_callers(layers: list[nn.Module], place: int) -> bool:
    """Whether the input of a Sequential's layer may be seen by others, who then see what is written to it."""
    makes_new = (FusedConv2d, FusedLinear, FusedBatchNorm2d, FusedMaxPool2d)
    return place == 0 or not _is_plain(layers[place - 1], *makes_new)


def _shortcut(block: Any, x: Tensor) -> Tensor:
    shortcut: Tensor = x if block.downsample is None else block.downsample(x)
    return shortcut


def _bottleneck(self: Any, x: Tensor) -> Tensor:
    shortcut = _shortcut(self, x)
    x = _normalized(self.bn1, x, self.conv1, relu=True)
    x = _normalized(self.bn2, x, self.conv2, relu=True)
    return _normalized(self.bn3, x, self.conv3, residual=shortcut, relu=True)


def _basic_block(self: Any, x: Tensor) -> Tensor:
    shortcut = _shortcut(self, x)
    x = _normalized(self.bn1, x, self.conv1, relu=True)
    return _normalized(self.bn2, x, self.conv2, residual=shortcut, relu=True)


def _dense_layer(self: Any, x: Tensor | list[Tensor]) -> Tensor:
    y = _normalized(self.norm1, x if isinstance(x, Tensor) else torch.cat(x, 1), relu=True)
    y = self.conv2(_normalized(self.norm2, y, self.conv1, relu=True))
    new: Tensor = F.dropout(y, self.drop_rate, self.training) if self.drop_rate > 0 else y
    return new


def _resnet(self: Any, x: Tensor) -> Tensor:
    x = self.maxpool(_normalized(self.bn1, self.conv1(x), relu=True))
    x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
    logits: Tensor = self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
    return logits


def _torchvisions_resnet(self: Any, x: Tensor) -> Tensor:
    x = self.maxpool(_normalized(self.bn1, self.conv1(x), relu=True))
    x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
    logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
    return logits


def _small_resnet(self: Any, x: Tensor) -> Tensor:
    x = _normalized(self.bn1, self.conv1(x), relu=True)
    x = self.layer3(self.layer2(self.layer1(x)))
    logits: Tensor = self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
    return logits


_NORMS, _RELUS = {"bn1", "bn2", "bn3", "norm1", "norm2"}, {"relu", "relu1", "relu2"}


def _can_join(module: nn.Module) -> bool:
    """Whether all that a block's or network's forward pass joins is plain; a Sequential looks at its layers itself."""
    kinds = {**dict.fromkeys(_NORMS, FusedBatchNorm2d), **dict.fromkeys(_RELUS, nn.ReLU)}
    return isinstance(module, nn.Sequential) or not (
        any(not _is_plain(child, kinds[name]) for name, child in module._modules.items() if name in kinds)
        or "_forward_impl" in vars(module)  # that of torchvision's ResNet, replaced
        or getattr(module, "memory_efficient", False)  # a layer of DenseNet that checkpoints activations
    )


class _Joining(nn.Module):
    """Comes before a module's class, and joins what the module's children compute where that is possible."""

    _join: ClassVar[Callable[[Any, Any], Any]]

    def forward(self, *inputs: Any, **named: Any) -> Any:
        if len(inputs) == 1 and not named and _can_join(self):
            return self._join(inputs[0])
        return super().forward(*inputs, **named)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class cannot be found by its name; a copy makes it again.
        _, _, *state = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))
        return _new_joining, (type(self).__bases__[1],), *state


@functools.cache
def _joining(base: Any) -> type[_Joining]:
    """Returns the class that joins what modules of a class compute."""
    join = _joins().get(base, _sequence)
    return type(f"Fused{base.__name__}", (_Joining, base), {"_join": join, "__module__": base.__module__})


def _new_joining(base: Any) -> _Joining:
    kind = _joining(base)
    return kind.__new__(kind)


def _joins() -> dict[type[nn.Module], Callable[..., Any]]:
    """Returns, by the classes whose forward passes are known, what computes the same."""
    joins: dict[type[nn.Module], Callable[..., Any]]
    joins = {resnet.Bottleneck: _bottleneck, resnet.BasicBlock: _basic_block, resnet.ResNet: _resnet,
             resnet.SmallResNet: _small_resnet}  # fmt: skip
    if theirs := sys.modules.get("torchvision.models.resnet"):
        joins |= {theirs.Bottleneck: _bottleneck, theirs.BasicBlock: _basic_block, theirs.ResNet: _torchvisions_resnet}
    if theirs := sys.modules.get("torchvision.models.densenet"):
        joins |= {theirs._DenseLayer: _dense_layer}
    return joins


# ---------------------------------------------------------------------------------------------------------------------


def fuse(model: nn.Module) -> None:
    """Replaces layers of a model by fused ones, in place; the model is best channels-last.

    These are convolutions, dense layers, batch norms, max pools and dropout. In the blocks of knltrain's and
    torchvision's ResNets, in those of torchvision's DenseNets and in each Sequential, a batch norm gets its statistics
    from the convolution before it, a residual and a ReLU or ReLU6 are computed with the batch norm before them, and a
    ReLU with the max pool or dropout after it.

    Subclasses of torch's layers and layers with settings that the kernels do not support are unchanged.
    """
    for module in list(model.modules()):
        _fuse_layer(module)
    for module in list(model.modules()):
        kind: Any = type(module)
        if (kind in _joins() and _is_original(kind)) or _is_joinable_sequential(module):
            module.__class__ = _joining(kind)


def _fuse_layer(module: nn.Module) -> None:
    if fuses_convolution(module):
        module.__class__ = FusedConv2d
    elif type(module) is nn.Linear:
        module.__class__ = FusedLinear
    elif (
        type(module) is nn.BatchNorm2d and module.affine and module.track_running_stats and module.momentum is not None
    ):
        module.__class__ = FusedBatchNorm2d
    elif type(module) is nn.MaxPool2d and module.dilation in (1, (1, 1)) and not module.return_indices:
        module.__class__ = FusedMaxPool2d
    elif type(module) is nn.Dropout:
        module.__class__ = FusedDropout


def _is_original(kind: type[nn.Module]) -> bool:
    """Whether a known class has the forward pass that it came with."""
    passes = (vars(kind).get(name) for name in ("forward", "_forward_impl"))
    return all(function.__module__ == kind.__module__ for function in passes if function)


def _is_joinable_sequential(module: nn.Module) -> bool:
    if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
        return False
    pairs = ((FusedBatchNorm2d, (nn.ReLU, nn.ReLU6)), (FusedConv2d, FusedBatchNorm2d),
             (nn.ReLU, (FusedMaxPool2d, FusedDropout)))  # fmt: skip
    return any(
        isinstance(before, first) and isinstance(after, then)
        for before, after in itertools.pairwise(module)
        for first, then in pairs
    )
