"""Layers with native kernels, which replace torch's by module type.

Only the class of a module changes: parameters, buffers, hooks and names in state dicts stay.
"""

from __future__ import annotations

import collections
import itertools
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knltrain.models import resnet
from knltrain.ops import bf16
from knltrain.ops.batchnorm import batch_norm_act
from knltrain.ops.convgrad import NONE, Geometry, conv2d, conv2d_and_statistics
from knltrain.ops.dropout import dropout
from knltrain.ops.pool import max_pool2d


class FusedConv2d(nn.Conv2d):
    """nn.Conv2d with a faster weight gradient in bf16, and the chosen kernels in float32."""

    # The results that native kernels compute in float32; see knltrain.models.convolutions.
    by = NONE

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Any:
        """Returns the output; with a shift, if :meth:`has_statistics`, also its mean and variance per channel."""
        if shift is not None:
            stride, padding = cast("tuple[int, int]", self.stride), cast("tuple[int, int]", self.padding)
            return conv2d_and_statistics(x, self.weight, shift, Geometry(stride, padding, groups=self.groups), self.by)
        if x.dtype != self.weight.dtype:  # an image in float32, in evaluation
            x = x.to(self.weight.dtype)
        return conv2d(
            x,
            self.weight,
            self.bias,
            stride=cast("tuple[int, int]", self.stride),
            padding=cast("tuple[int, int]", self.padding),
            dilation=cast("tuple[int, int]", self.dilation),
            groups=self.groups,
            by=self.by if x.dim() == 4 else NONE,
        )

    def has_statistics(self, x: Tensor) -> bool:
        """Whether a native kernel computes the output, and can compute its statistics in the same pass."""
        return self.by.forward and self.bias is None and x.dim() == 4 and x.dtype == self.weight.dtype


class FusedLinear(nn.Linear):
    """nn.Linear that computes in float32 if PyTorch would emulate bf16, which is far slower."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype == torch.bfloat16 and not bf16.onednn_computes_bf16():
            return bf16.linear(x.to(torch.bfloat16), self.weight, self.bias)
        return super().forward(x)


class FusedBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d fused with a residual sum and ReLU: ``norm(x, residual=shortcut, relu=True)``."""

    # Whether the following ReLU is fused into this layer, and its upper bound (6 for ReLU6).
    followed_by_relu = False
    cap: float | None = None

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        relu: bool = False,
        statistics: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        return batch_norm_act(
            _channels_last(x),
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            residual=None if residual is None else _channels_last(residual),
            relu=relu or self.followed_by_relu,
            cap=self.cap,
            training=self.training,
            momentum=cast("float", self.momentum),
            eps=self.eps,
            statistics=statistics,
        )


class FusedMaxPool2d(nn.MaxPool2d):
    """nn.MaxPool2d with a native kernel, fused with the ReLU before it in a Sequential."""

    with_relu = False

    def forward(self, x: Tensor) -> Tensor:
        return max_pool2d(
            _channels_last(x),
            cast("int", self.kernel_size),
            cast("int", self.stride),
            cast("int", self.padding),
            ceil_mode=self.ceil_mode,
            relu=self.with_relu,
        )


class FusedDropout(nn.Dropout):
    """nn.Dropout with a native kernel, fused with the ReLU before it in a Sequential."""

    with_relu = False

    def forward(self, x: Tensor) -> Tensor:
        if not (x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))):
            x = x.contiguous()  # attention with the batch first ends in a transpose
        return dropout(x, self.p, training=self.training, relu=self.with_relu)


def _conv_norm(norm: Any, convolution: Any, x: Tensor, **more: Any) -> Tensor:
    """Returns norm(convolution(x)), with statistics that the convolution's kernel computes, if it can."""
    if norm.training and isinstance(convolution, FusedConv2d) and convolution.has_statistics(x):
        y, mean, var = convolution(x, norm.running_mean)
        normalised: Tensor = norm(y, statistics=(mean, var), **more)
    else:
        normalised = norm(convolution(x), **more)
    return normalised


def _sequence(self: Any, x: Any) -> Any:
    parts = list(self)
    for before, part, after in zip([None, *parts], parts, [*parts[1:], None], strict=False):
        if not _is_conv_norm(part, after):
            x = _conv_norm(part, before, x) if _is_conv_norm(before, part) else part(x)
    return x


def _is_conv_norm(convolution: nn.Module | None, norm: nn.Module | None) -> bool:
    """Whether two consecutive layers of a Sequential are a convolution and a batch norm to compute together."""
    return isinstance(convolution, FusedConv2d) and isinstance(norm, FusedBatchNorm2d)


def _shortcut(block: Any, x: Tensor) -> Tensor:
    shortcut: Tensor = x if block.downsample is None else block.downsample(x)
    return shortcut


def _bottleneck(self: Any, x: Tensor) -> Tensor:
    shortcut = _shortcut(self, x)
    x = _conv_norm(self.bn1, self.conv1, x, relu=True)
    x = _conv_norm(self.bn2, self.conv2, x, relu=True)
    return _conv_norm(self.bn3, self.conv3, x, residual=shortcut, relu=True)


def _basic_block(self: Any, x: Tensor) -> Tensor:
    shortcut = _shortcut(self, x)
    x = _conv_norm(self.bn1, self.conv1, x, relu=True)
    return _conv_norm(self.bn2, self.conv2, x, residual=shortcut, relu=True)


def _dense_layer(self: Any, x: Tensor | list[Tensor]) -> Tensor:
    y = self.norm1(x if isinstance(x, Tensor) else torch.cat(x, 1), relu=True)
    y = self.conv2(_conv_norm(self.norm2, self.conv1, y, relu=True))
    new: Tensor = F.dropout(y, self.drop_rate, self.training) if self.drop_rate > 0 else y
    return new


def _resnet(self: nn.Module, x: Tensor) -> Tensor:
    x = self.maxpool(self.bn1(self.conv1(x), relu=True))  # type: ignore[operator]
    for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
        x = stage(x)  # type: ignore[operator]
    logits: Tensor = self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))  # type: ignore[operator]
    return logits


def _small_resnet(self: nn.Module, x: Tensor) -> Tensor:
    x = self.bn1(self.conv1(x), relu=True)  # type: ignore[operator]
    for stage in (self.layer1, self.layer2, self.layer3):
        x = stage(x)  # type: ignore[operator]
    logits: Tensor = self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))  # type: ignore[operator]
    return logits


def fuse(model: nn.Module) -> None:
    """Replaces layers of a model by fused ones, in place.

    These are convolutions, dense layers, batch norms, max pools, dropout, the blocks of knltrain's and torchvision's
    ResNets, and those of torchvision's DenseNets. In a Sequential, a batch norm gets its statistics from the
    convolution before it, a ReLU or ReLU6 is fused into the batch norm before it, and a ReLU into the max pool or
    dropout after it. Layers with settings that the kernels do not support are unchanged.
    """
    _fuse_layers(model)
    _join_relus(model)
    _fuse_blocks(model)


def fuses_convolution(module: nn.Module) -> bool:
    """Whether a module becomes a :class:`FusedConv2d`."""
    return type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _fuse_layers(model: nn.Module) -> None:
    for module in list(model.modules()):
        if fuses_convolution(module):
            module.__class__ = FusedConv2d
        elif type(module) is nn.Linear:
            module.__class__ = FusedLinear
        elif (
            type(module) is nn.BatchNorm2d
            and module.affine
            and module.track_running_stats
            and module.momentum is not None
        ):
            module.__class__ = FusedBatchNorm2d
        elif type(module) is nn.MaxPool2d and module.dilation in (1, (1, 1)) and not module.return_indices:
            module.__class__ = FusedMaxPool2d
        elif type(module) is nn.Dropout:
            module.__class__ = FusedDropout


def _join_relus(model: nn.Module) -> None:
    # A module, such as a ReLU, may be used several times.
    uses = collections.Counter(child for module in model.modules() for child in module._modules.values())
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            for before, after in itertools.pairwise(module):
                if uses[before] == uses[after] == 1:
                    _join_relu(before, after)


def _join_relu(before: nn.Module, after: nn.Module) -> None:
    if isinstance(before, FusedBatchNorm2d) and type(after) in (nn.ReLU, nn.ReLU6):
        before.followed_by_relu = True
        before.cap = after.max_val if isinstance(after, nn.ReLU6) else None
        after.__class__ = nn.Identity
    elif type(before) is nn.ReLU and isinstance(after, FusedMaxPool2d | FusedDropout):
        after.with_relu = True
        before.__class__ = nn.Identity  # type: ignore[assignment]


def _fuse_blocks(model: nn.Module) -> None:
    forwards: dict[type[nn.Module], Callable[..., Any]]
    forwards = {resnet.Bottleneck: _bottleneck, resnet.BasicBlock: _basic_block, resnet.ResNet: _resnet,
                resnet.SmallResNet: _small_resnet}  # fmt: skip
    if torchvision_module := sys.modules.get("torchvision.models.resnet"):
        forwards |= {
            torchvision_module.Bottleneck: _bottleneck,
            torchvision_module.BasicBlock: _basic_block,
            torchvision_module.ResNet: _resnet,
        }
    if torchvision_module := sys.modules.get("torchvision.models.densenet"):
        forwards |= {torchvision_module._DenseLayer: _dense_layer}
    for module in model.modules():
        norms = [child for child in module.children() if isinstance(child, nn.BatchNorm2d)]
        forward = _sequence if _has_conv_norm(module) else forwards.get(type(module))
        if (
            forward
            and all(isinstance(norm, FusedBatchNorm2d) for norm in norms)
            and not _checkpoints_activations(module)
        ):
            module.__class__ = type(f"Fused{type(module).__name__}", (type(module),), {"forward": forward})


def _has_conv_norm(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Sequential)
        and type(module).forward is nn.Sequential.forward
        and any(itertools.starmap(_is_conv_norm, itertools.pairwise(module)))
    )


def _checkpoints_activations(module: nn.Module) -> bool:
    """Whether a DenseNet layer uses activation checkpointing."""
    return bool(getattr(module, "memory_efficient", False))


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
