"""ResNet-50 v1.5: He et al. 2015 with the stride of a stage's first block on its 3x3 convolution; and their ResNet-20.

Module names are torchvision's, so that state dicts of ResNet-50 are interchangeable.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knltrain.errors import ConfigError


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 to four times the width, and the shortcut added before the last ReLU."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = width * self.expansion
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        return F.relu(self.bn3(self.conv3(x)).add_(shortcut), inplace=True)


class ResNet(nn.Module):
    """A stem, four stages of bottlenecks, and a linear classifier.

    Input N x 3 x S x S (S = 224 in the sources, at least 32), output N x num_classes logits. Initial weights as
    Goyal et al. 2017, section 5.1: He for convolutions, N(0, 0.01) for the classifier, gamma 1.

    Args:
        blocks: bottlenecks in each stage.
        zero_init_residual: gamma 0 for the last batch norm of each bottleneck, as the same section has it.
    """

    def __init__(self, blocks: tuple[int, int, int, int], num_classes: int, *, zero_init_residual: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        channels = 64
        stages = []
        for stage, count in enumerate(blocks):
            width = 64 * 2**stage
            bottlenecks = []
            for block in range(count):
                bottlenecks.append(Bottleneck(channels, width, stride=2 if stage > 0 and block == 0 else 1))
                channels = width * Bottleneck.expansion
            stages.append(nn.Sequential(*bottlenecks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = nn.Linear(channels, num_classes)

        _initialize(self, self.fc, zero_init_residual=zero_init_residual)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x)), inplace=True))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        logits: Tensor = self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits


def _initialize(network: nn.Module, classifier: nn.Linear, *, zero_init_residual: bool) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, Bottleneck) and zero_init_residual:
            nn.init.zeros_(module.bn3.weight)
        elif isinstance(module, BasicBlock) and zero_init_residual:
            nn.init.zeros_(module.bn2.weight)
    nn.init.normal_(classifier.weight, std=0.01)
    nn.init.zeros_(classifier.bias)


class PaddedShortcut(nn.Module):
    """A shortcut without parameters, option A of He et al. 2015: every other pixel, zeros for new channels.

    Args:
        new_channels: number of channels to add.
    """

    def __init__(self, new_channels: int) -> None:
        super().__init__()
        self.new_channels = new_channels

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.new_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, the first with the stride, and the shortcut added before the last ReLU."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = PaddedShortcut(width - channels) if stride != 1 else None

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(x)).add_(shortcut), inplace=True)


class SmallResNet(nn.Module):
    """The network of He et al. 2015, section 4.2: a 3x3 stem, stages of 16, 32 and 64 channels, a linear classifier.

    Input N x 3 x S x S (S = 32 in the source; any S works, because the last feature maps are averaged), output N x
    num_classes logits. Shortcuts are option A, as there. Initial weights are those of :class:`ResNet`.

    Args:
        blocks: blocks of two convolutions in each stage; the depth is 6 x blocks + 2.
        num_classes: length of the output.
        zero_init_residual: gamma 0 for the last batch norm of each block.
    """

    def __init__(self, blocks: int, num_classes: int, *, zero_init_residual: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        stages = []
        for stage, width in enumerate((16, 32, 64)):
            first = BasicBlock(width // 2, width, stride=2) if stage else BasicBlock(width, width, stride=1)
            stages.append(nn.Sequential(first, *(BasicBlock(width, width, stride=1) for _ in range(blocks - 1))))
        self.layer1, self.layer2, self.layer3 = stages
        self.fc = nn.Linear(64, num_classes)
        _initialize(self, self.fc, zero_init_residual=zero_init_residual)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        for stage in (self.layer1, self.layer2, self.layer3):
            x = stage(x)
        logits: Tensor = self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits


def resnet50(*, num_classes: int = 1000, image_size: int = 224, zero_init_residual: bool = False) -> nn.Module:
    """ResNet-50 v1.5; 25,557,032 parameters for 1000 classes."""
    if image_size < 32:
        raise ConfigError(f"image-size {image_size}: resnet50 halves the picture five times and needs at least 32")
    return ResNet((3, 4, 6, 3), num_classes, zero_init_residual=zero_init_residual)


def resnet20(*, num_classes: int = 10, image_size: int = 32, zero_init_residual: bool = False) -> nn.Module:
    """ResNet-20 for CIFAR-sized pictures; 269,722 parameters for 10 classes, 41 million multiply-adds for 32 pixels."""
    del image_size  # the last pool makes the network independent of it
    return SmallResNet(3, num_classes, zero_init_residual=zero_init_residual)
