"""AlexNet: the grouped network of 2012, the batch-norm variant that was trained at 32K, and a small one.

Sources: Krizhevsky et al. 2012 for the architecture; Caffe's bvlc_alexnet (BVLC/caffe at 0d2354c) for the initial
weights of ``alexnet`` (Gaussian, 0.01 for convolutions and the last layer, 0.005 for fc6 and fc7; biases 0, or 0.1 for
conv2, conv4, conv5, fc6 and fc7); train_val2.prototxt in borisgin/nvcaffe-0.16 at 8896d33 for ``alexnet_bn`` (biases
0.01, or 0.1 for fc6 and fc7; batch-norm eps 1e-4, moving average 0.9), with the learned gamma and beta of Intel's copy.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from knltrain.errors import ConfigError
from knltrain.ops.lrn import local_response_norm


class LocalResponseNorm(nn.Module):
    """:func:`knltrain.ops.lrn.local_response_norm` as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return local_response_norm(x)


def _gaussian(layer: nn.Conv2d | nn.Linear, std: float, bias: float) -> None:
    nn.init.normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.constant_(layer.bias, bias)


def _features(*, batch_norm: bool) -> nn.Sequential:
    """Returns the convolutions, with batch norm after pooling, or local response norm before it."""

    def batch(channels: int) -> nn.Module | None:
        return nn.BatchNorm2d(channels, eps=1e-4, momentum=0.1) if batch_norm else None

    def response() -> nn.Module | None:
        return None if batch_norm else LocalResponseNorm()

    def relu() -> nn.Module:
        return nn.ReLU(inplace=True)

    def pool() -> nn.Module:
        return nn.MaxPool2d(3, 2, ceil_mode=True)

    layers: list[tuple[str, nn.Module | None]] = [
        ("conv1", nn.Conv2d(3, 96, 11, stride=4)), ("relu1", relu()),
        ("norm1", response()), ("pool1", pool()), ("norm1", batch(96)),
        ("conv2", nn.Conv2d(96, 256, 5, padding=2, groups=2)), ("relu2", relu()),
        ("norm2", response()), ("pool2", pool()), ("norm2", batch(256)),
        ("conv3", nn.Conv2d(256, 384, 3, padding=1)), ("relu3", relu()), ("norm3", batch(384)),
        ("conv4", nn.Conv2d(384, 384, 3, padding=1, groups=2)), ("relu4", relu()), ("norm4", batch(384)),
        ("conv5", nn.Conv2d(384, 256, 3, padding=1, groups=2)), ("relu5", relu()), ("pool5", pool()),
    ]  # fmt: skip
    return nn.Sequential(OrderedDict((name, layer) for name, layer in layers if layer is not None))


class AlexNet(nn.Module):
    """The five convolutions and three dense layers of 2012, with two groups in conv2, conv4 and conv5.

    Input N x 3 x S x S, S = 227 in the sources (224 gives the same layer sizes except after conv1); output N x
    num_classes logits.

    Args:
        num_classes: length of the output.
        batch_norm: normalise the inputs of conv2 to conv5 instead of local response normalisation.
        dropout: probability on fc6 and fc7.
    """

    def __init__(self, num_classes: int, *, batch_norm: bool, dropout: float, image_size: int) -> None:
        super().__init__()
        if image_size < 67:
            raise ConfigError(f"image-size {image_size}: AlexNet needs at least 67 pixels; use alexnet_bn_small")
        self.features = _features(batch_norm=batch_norm)
        size = (image_size - 11) // 4 + 1
        for _ in range(3):
            size = -(-(size - 3) // 2) + 1
        self.classifier = nn.Sequential(
            OrderedDict(
                fc6=nn.Linear(256 * size * size, 4096),
                relu6=nn.ReLU(inplace=True),
                drop6=nn.Dropout(dropout),
                fc7=nn.Linear(4096, 4096),
                relu7=nn.ReLU(inplace=True),
                drop7=nn.Dropout(dropout),
                fc8=nn.Linear(4096, num_classes),
            )
        )
        biases = {"conv2": 0.1, "conv4": 0.1, "conv5": 0.1, "fc6": 0.1, "fc7": 0.1}
        for name, layer in [*self.features.named_children(), *self.classifier.named_children()]:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                bias = biases.get(name, 0.0)
                if batch_norm:
                    bias = 0.1 if name in ("fc6", "fc7") else 0.01
                _gaussian(layer, 0.005 if name in ("fc6", "fc7") else 0.01, bias)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.flatten(self.features(x), 1))
        return logits


def alexnet(*, num_classes: int = 1000, image_size: int = 227, dropout: float = 0.5) -> nn.Module:
    """AlexNet with groups and local response normalisation; 60,965,224 parameters for 1000 classes."""
    return AlexNet(num_classes, batch_norm=False, dropout=dropout, image_size=image_size)


def alexnet_bn(*, num_classes: int = 1000, image_size: int = 227, dropout: float = 0.5) -> nn.Module:
    """AlexNet with batch norm on the inputs of conv2 to conv5, as the 32K solvers train it."""
    return AlexNet(num_classes, batch_norm=True, dropout=dropout, image_size=image_size)


class SmallAlexNet(nn.Module):
    """AlexNet-BN for images of 32 to 64 pixels: 3x3 kernels, a pool after conv1, conv2 and conv3, one dense layer.

    As in ``alexnet_bn``, batch norm is on the inputs of conv2 to conv5, after ReLU and pooling; here also on the dense
    layer's. Input N x 3 x S x S with S of at least 8, because the last feature map is averaged to 2 x 2; output N x
    num_classes logits. 24 million multiply-adds for 32 pixels.
    """

    def __init__(self, num_classes: int, *, dropout: float) -> None:
        super().__init__()
        widths = (3, 32, 64, 128, 256, 256)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for index in range(1, 6):
            conv = nn.Conv2d(widths[index - 1], widths[index], 3, padding=1)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            layers[f"conv{index}"] = conv
            layers[f"relu{index}"] = nn.ReLU(inplace=True)
            if index <= 3:
                layers[f"pool{index}"] = nn.MaxPool2d(2)
            layers[f"norm{index}"] = nn.BatchNorm2d(widths[index])
        layers["pool5"] = nn.AdaptiveAvgPool2d(2)
        self.features = nn.Sequential(layers)
        fc6 = nn.Linear(widths[-1] * 4, num_classes)
        _gaussian(fc6, 0.01, 0.0)
        self.classifier = nn.Sequential(OrderedDict(drop6=nn.Dropout(dropout), fc6=fc6))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.flatten(self.features(x), 1))
        return logits


def alexnet_bn_small(*, num_classes: int = 10, image_size: int = 32, dropout: float = 0.0) -> nn.Module:
    """A small AlexNet-BN for CIFAR-sized images."""
    del image_size  # the last pool makes the network independent of it
    return SmallAlexNet(num_classes, dropout=dropout)
