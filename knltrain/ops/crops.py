"""Pixels of a batch to what the network takes: normalised, channels-last, in the type it computes in."""

from __future__ import annotations

import torch
from torch import Tensor

# Mean and standard deviation of ImageNet's training images, per channel, of pixels scaled to [0, 1].
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def normalize(pixels: Tensor, out: Tensor) -> None:
    """Writes (pixels / 255 - MEAN) / STD to ``out``.

    Args:
        pixels: N x H x W x 3, uint8, contiguous.
        out: N x 3 x H x W, float32 or bf16, channels-last in memory.
    """
    count, height, width, _ = pixels.shape
    # Rows of W x 3 numbers against a mean and scale repeated W times: the innermost loop is then long and contiguous.
    std = torch.tensor(STD).repeat(width)
    rows = pixels.view(count, height, width * 3).float()
    rows.mul_(1 / (255 * std)).sub_(torch.tensor(MEAN).repeat(width) / std)
    out.permute(0, 2, 3, 1).view(count, height, width * 3).copy_(rows)
