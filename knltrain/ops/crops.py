"""Crops, resamples and normalises 8-bit images into a network's input batch."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knltrain.ops.library import operator
from knltrain.ops.native import address, check, kernels, tasks_for

# Mean and standard deviation of ImageNet's training images, per channel, of pixels scaled to [0, 1].
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
_SCALE = [1 / (255 * std) for std in STD]
_SHIFT = [-mean / std for mean, std in zip(MEAN, STD, strict=True)]


def normalize(pixels: Tensor, out: Tensor) -> None:
    """Writes (pixels / 255 - MEAN) / STD to ``out``.

    Args:
        pixels: N x H x W x 3, uint8, contiguous.
        out: N x 3 x H x W, float32 or bf16, channels-last in memory.

    Raises:
        ValueError: a wrong type, layout, shape or device.
    """
    crop_flip_normalize(pixels, None, None, out)


def crop_flip_normalize(pixels: Tensor, boxes: Tensor | None, flips: Tensor | None, out: Tensor) -> None:
    """Resamples a box of each image to ``out``'s size, mirrors it or not, and normalises as :func:`normalize` does.

    A box of that size at a whole pixel is copied. Any other is resampled with a triangle filter that is widened by the
    scale where the box shrinks: Pillow's BILINEAR, but without rounding to 8 bits after either direction. As there, the
    filter also reads pixels of the image outside the box. Pixels beyond the image's border are black.

    Args:
        pixels: N x H x W x 3, uint8, contiguous.
        boxes: N x 4, float32 or float64: top, left, height and width in source pixels, over the border by the image's
            height or width at most; None for the whole images, which then have ``out``'s size.
        flips: N, bool: which to mirror left to right; None for none.
        out: N x 3 x S x T, float32 or bf16, channels-last in memory.

    Raises:
        ValueError: a wrong type, layout, shape or device, or a box without pixels or too far outside.
    """
    torch.ops.knltrain.crop_flip_normalize(pixels, boxes, flips, out)


# Unlike the other operations it writes to a given tensor: decoding threads fill a batch image by image.
@operator("crop_flip_normalize", mutates=("out",))
def _crop_flip_normalize(pixels: Tensor, boxes: Tensor | None, flips: Tensor | None, out: Tensor) -> None:
    boxes = _check(pixels, boxes, flips, out)
    module = kernels()
    if module is None:
        out.copy_(_in_torch(pixels, boxes, flips, out))
    elif out.numel():
        module.crop_flip_normalize(
            pixels=address(pixels),
            addresses=0,
            sizes=0,
            boxes=address(boxes),
            flips=address(flips),
            out=address(out),
            images=len(pixels),
            in_size=list(pixels.shape[1:3]),
            out_size=list(out.shape[2:]),
            scale=_SCALE,
            shift=_SHIFT,
            is_bf16=out.dtype == torch.bfloat16,
            tasks=tasks_for(out.numel()),
        )


def crop_flip_normalize_at(
    addresses: NDArray[np.int64], sizes: NDArray[np.int64], boxes: Tensor, flips: Tensor, out: Tensor
) -> None:
    """:func:`crop_flip_normalize` of images of any sizes at any addresses, as in files mapped into memory.

    Args:
        addresses: N; where each image begins, height x width x 3 bytes. They cannot be checked.
        sizes: N x 2; height and width of each image, pixels.
        boxes: N x 4, as of :func:`crop_flip_normalize`.
        flips: N, bool.
        out: N x 3 x S x T, float32 or bf16, channels-last in memory.

    Raises:
        ValueError: a wrong type, layout, shape or device, or a box without pixels or too far outside.
    """
    boxes = _check_boxes(boxes, torch.from_numpy(sizes))
    _check_out(out, len(addresses))
    _check_flips(flips, len(addresses))
    module = kernels()
    assert module is not None, "without kernels, use crop_flip_normalize on one tensor"
    addresses, sizes = (np.ascontiguousarray(each, np.int64) for each in (addresses, sizes))
    if out.numel():
        module.crop_flip_normalize(
            pixels=0,
            addresses=addresses.ctypes.data,
            sizes=sizes.ctypes.data,
            boxes=address(boxes),
            flips=address(flips),
            out=address(out),
            images=len(addresses),
            in_size=sizes.max(axis=0).tolist(),
            out_size=list(out.shape[2:]),
            scale=_SCALE,
            shift=_SHIFT,
            is_bf16=out.dtype == torch.bfloat16,
            tasks=tasks_for(out.numel()),
        )


def _check(pixels: Tensor, boxes: Tensor | None, flips: Tensor | None, out: Tensor) -> Tensor | None:
    """Returns the boxes in float64."""
    check("pixels", pixels, (torch.uint8,))
    if pixels.dim() != 4 or pixels.shape[3] != 3 or not pixels.is_contiguous():
        raise ValueError(f"pixels has shape {tuple(pixels.shape)}, strides {pixels.stride()}; "
                         "it must be N x H x W x 3, contiguous")  # fmt: skip
    count, height, width, _ = pixels.shape
    _check_out(out, count)
    if flips is not None:
        _check_flips(flips, count)
    if boxes is None:
        if out.shape[2:] != (height, width):
            raise ValueError(f"out is {out.shape[2]} x {out.shape[3]} pixels; without boxes it must be as large as "
                             f"the images, {height} x {width}")  # fmt: skip
        return None
    return _check_boxes(boxes, torch.tensor([[height, width]]).expand(count, 2))


def _check_out(out: Tensor, count: int) -> None:
    check("out", out, (torch.float32, torch.bfloat16))
    if out.dim() != 4 or out.shape[:2] != (count, 3) or not out.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(f"out has shape {tuple(out.shape)}, strides {out.stride()}; "
                         f"it must be {count} x 3 x S x T, channels-last")  # fmt: skip


def _check_flips(flips: Tensor, count: int) -> None:
    check("flips", flips, (torch.bool,), (count,))
    if not flips.is_contiguous():
        raise ValueError(f"flips has strides {flips.stride()}; it must be contiguous")


def _check_boxes(boxes: Tensor, images: Tensor) -> Tensor:
    check("boxes", boxes, (torch.float32, torch.float64), (len(images), 4))
    boxes = boxes.double().contiguous()
    begin, size = boxes[:, :2], boxes[:, 2:]
    good = (size > 0) & (begin >= -images) & (begin + size <= 2 * images)
    if not good.all():
        bad = int(good.all(1).logical_not().nonzero()[0])
        height, width = images[bad].tolist()
        raise ValueError(f"box {bad} is {boxes[bad].tolist()} (top, left, height, width); it must have pixels, and "
                         f"reach over the border of its {height} x {width} image by no more than that")  # fmt: skip
    return boxes


def _in_torch(pixels: Tensor, boxes: Tensor | None, flips: Tensor | None, out: Tensor) -> Tensor:
    values = pixels.float()
    with torch.autocast("cpu", enabled=False):
        if boxes is not None:
            down = _weights(boxes[:, 0], boxes[:, 2], pixels.shape[1], out.shape[2])
            across = _weights(boxes[:, 1], boxes[:, 3], pixels.shape[2], out.shape[3])
            values = torch.einsum("nsh,nhwc->nswc", down, values)
            values = torch.einsum("ntw,nswc->nstc", across, values)
    if flips is not None:
        values = torch.where(flips[:, None, None, None], values.flip(2), values)
    return values.mul_(torch.tensor(_SCALE)).add_(torch.tensor(_SHIFT)).permute(0, 3, 1, 2)


def _weights(begin: Tensor, length: Tensor, pixels: int, size: int) -> Tensor:
    """The weight of each source pixel in each of ``size`` output pixels along one side: N x size x pixels."""
    begin, length = begin[:, None, None], length[:, None, None]
    scale = length / size
    centre = begin + (torch.arange(size)[:, None] + 0.5) * scale
    position = torch.arange(-pixels, 2 * pixels)
    weights = (1 - (position + 0.5 - centre).abs() / scale.clamp(min=1)).clamp(min=0)
    # A pixel outside of image and box has no weight, so the others weigh more; inside the box it is black.
    first, last = begin.floor().clamp(max=0), (begin + length).ceil().clamp(min=pixels)
    weights = weights * ((position >= first) & (position < last))
    weights = weights / weights.sum(2, keepdim=True)
    inside: Tensor = weights[:, :, pixels : 2 * pixels].float()
    return inside
