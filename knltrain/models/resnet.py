"""ResNet-50 v1.5: He et al. 2015 with the stride of a stage's first block on its 3x3 convolution.

Module names are torchvision's, so that state dicts pass between the two.
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

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Bottleneck) and zero_init_residual:
                nn.init.zeros_(module.bn3.weight)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x)), inplace=True))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        logits: Tensor = self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits


def resnet50(*, num_classes: int = 1000, image_size: int = 224, zero_init_residual: bool = False) -> nn.Module:
    """ResNet-50 v1.5; 25,557,032 parameters for 1000 classes."""
    if image_size < 32:
        raise ConfigError(f"image-size {image_size}: resnet50 halves the picture five times and needs at least 32")
    return ResNet((3, 4, 6, 3), num_classes, zero_init_residual=zero_init_residual)
