"""Layers on the native kernels, put in the place of torch's by module type.

A module changes its class and nothing else: parameters, buffers, hooks and names in state dicts stay.
"""

from __future__ import annotations

import sys
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
    """nn.Conv2d with a faster weight gradient in bf16, and in float32 what was chosen."""

    # What native kernels compute of it in float32; see knltrain.models.convolutions.
    by = NONE

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Any:
        """The output; with a shift, and :meth:`has_statistics`, a tuple of it and its mean and variance by channel."""
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
        """Whether a kernel computes the output, which then can take its statistics on the way."""
        return self.by.forward and self.bias is None and x.dim() == 4 and x.dtype == self.weight.dtype


class FusedLinear(nn.Linear):
    """nn.Linear that is computed in float32 where PyTorch would emulate bf16, which is far slower."""

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.dtype == torch.bfloat16 and not bf16.onednn_computes_bf16():
            return bf16.linear(x.to(torch.bfloat16), self.weight, self.bias)
        return super().forward(x)


class FusedBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d with what follows it: ``norm(x, residual=shortcut, relu=True)``."""

    # Whether a ReLU that followed in a Sequential is part of this layer.
    followed_by_relu = False

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
            training=self.training,
            momentum=cast("float", self.momentum),
            eps=self.eps,
            statistics=statistics,
        )


class FusedMaxPool2d(nn.MaxPool2d):
    """nn.MaxPool2d on the kernel, with the ReLU that stood before it in a Sequential."""

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
    """nn.Dropout on the kernel, with the ReLU that stood before it in a Sequential."""

    with_relu = False

    def forward(self, x: Tensor) -> Tensor:
        if not (x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))):
            x = x.contiguous()  # attention with the batch first ends in a transpose
        return dropout(x, self.p, training=self.training, relu=self.with_relu)


def _normalised(norm: Any, convolution: Any, x: Tensor, **more: Any) -> Tensor:
    """norm(convolution(x)), with statistics that were taken while the convolution's results were in registers."""
    if norm.training and isinstance(convolution, FusedConv2d) and convolution.has_statistics(x):
        y, mean, var = convolution(x, norm.running_mean)
        normalised: Tensor = norm(y, statistics=(mean, var), **more)
    else:
        normalised = norm(convolution(x), **more)
    return normalised


def _shortcut(block: Any, x: Tensor) -> Tensor:
    match block.downsample:
        case None:
            return x
        case nn.Sequential() as parts if list(map(type, parts)) == [FusedConv2d, FusedBatchNorm2d]:
            return _normalised(parts[1], parts[0], x)
        case other:
            shortcut: Tensor = other(x)
            return shortcut


def _bottleneck(self: Any, x: Tensor) -> Tensor:
    shortcut = _shortcut(self, x)
    x = _normalised(self.bn1, self.conv1, x, relu=True)
    x = _normalised(self.bn2, self.conv2, x, relu=True)
    return _normalised(self.bn3, self.conv3, x, residual=shortcut, relu=True)


def _basic_block(self: Any, x: Tensor) -> Tensor:
    shortcut = _shortcut(self, x)
    x = _normalised(self.bn1, self.conv1, x, relu=True)
    return _normalised(self.bn2, self.conv2, x, residual=shortcut, relu=True)


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
    """Puts fused layers in the place of a model's, in place.

    Convolutions, dense layers, batch norms, max pools, dropout, and the blocks of ResNets, ours and torchvision's; in a
    Sequential, a ReLU joins the batch norm before it, or the max pool or dropout after it. Layers with settings that
    the kernels do not have stay as they are.
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
    for module in model.modules():
        if isinstance(module, nn.Sequential):
            for before, after in zip(module, list(module)[1:], strict=False):
                if isinstance(before, FusedBatchNorm2d) and type(after) is nn.ReLU:
                    before.followed_by_relu = True
                    after.__class__ = nn.Identity  # type: ignore[assignment]
                elif type(before) is nn.ReLU and isinstance(after, FusedMaxPool2d | FusedDropout):
                    after.with_relu = True
                    before.__class__ = nn.Identity  # type: ignore[assignment]


def _fuse_blocks(model: nn.Module) -> None:
    forwards = {resnet.Bottleneck: _bottleneck, resnet.BasicBlock: _basic_block, resnet.ResNet: _resnet,
                resnet.SmallResNet: _small_resnet}  # fmt: skip
    theirs = sys.modules.get("torchvision.models.resnet")
    if theirs is not None:
        forwards |= {theirs.Bottleneck: _bottleneck, theirs.BasicBlock: _basic_block, theirs.ResNet: _resnet}
    for module in model.modules():
        forward = forwards.get(type(module))
        norms = [child for child in module.children() if isinstance(child, nn.BatchNorm2d)]
        if forward is not None and all(isinstance(norm, FusedBatchNorm2d) for norm in norms):
            module.__class__ = type(f"Fused{type(module).__name__}", (type(module),), {"forward": forward})


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
