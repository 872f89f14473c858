import math

import numpy as np
import pytest
import torch
from PIL import Image

from knltrain.data.augment import Box, cut
from knltrain.ops.crops import MEAN, STD, crop_flip_normalize, normalize

LAST = torch.channels_last
# Pillow rounds to 8 bits after each of its two passes: half a step each, and its weights have 22 bits.
TOLERANCE_OF_PILLOW = 1.001
ROUNDING = {torch.float32: 2**-20, torch.bfloat16: 2**-8}


def empty(count, height, width, dtype=torch.float32):
    return torch.empty((count, 3, height, width), dtype=dtype, memory_format=LAST)


def random_pixels(generator, *shape):
    return torch.randint(256, (*shape, 3), generator=generator, dtype=torch.uint8)


def as_pixels(out):
    """The reverse of normalising: N x H x W x 3, on the scale from 0 to 255."""
    return (out.double().permute(0, 2, 3, 1) * torch.tensor(STD) + torch.tensor(MEAN)) * 255


def weights(begin, length, pixels, size):
    """The triangle filter's definition, in float64, one output pixel after the other; size x pixels."""
    matrix = np.zeros((size, pixels))
    scale = length / size
    reach = max(scale, 1.0)
    extent = range(min(0, math.floor(begin)), max(pixels, math.ceil(begin + length)))
    for index in range(size):
        centre = begin + (index + 0.5) * scale
        of = {i: max(0.0, 1 - abs(i + 0.5 - centre) / reach) for i in extent}
        for i in range(pixels):
            matrix[index, i] = of[i] / sum(of.values())
    return matrix


def formula(image, box, flip, height, width):
    top, left, h, w = box
    down, across = weights(top, h, image.shape[0], height), weights(left, w, image.shape[1], width)
    values = np.einsum("sh,hwc,tw->stc", down, image.astype(np.float64), across)
    return ((values[:, ::-1] if flip else values) / 255 - MEAN) / STD


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 1, 1), (2, 3, 16), (1, 9, 33), (2, 2, 325), (1, 4, 700)])
@pytest.mark.parametrize("flip", [False, True])
def test_normalize_is_the_formula(each_isa, generator, shape, flip, dtype):
    pixels = random_pixels(generator, *shape)
    expected = ((pixels.double() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)
    out = empty(*shape, dtype)
    if flip:
        crop_flip_normalize(pixels, None, torch.ones(shape[0], dtype=torch.bool), out)
        expected = expected.flip(3)
    else:
        normalize(pixels, out)
    torch.testing.assert_close(out.double(), expected, rtol=ROUNDING[dtype], atol=2**-20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_box_of_the_results_size_is_copied_black_beyond_the_border(each_isa, generator, dtype):
    pixels = random_pixels(generator, 6, 11, 40)
    boxes = [(0, 0), (3, 17), (-2, -3), (5, 30), (-11, 5), (2, 60)]
    flips = torch.tensor([False, True, False, True, True, False])
    out = empty(6, 8, 20, dtype)
    crop_flip_normalize(pixels, torch.tensor([(top, left, 8.0, 20.0) for top, left in boxes]), flips, out)
    for index, (top, left) in enumerate(boxes):
        expected = np.zeros((8, 20, 3), np.uint8)
        for row in range(8):
            for col in range(20):
                if 0 <= top + row < 11 and 0 <= left + col < 40:
                    expected[row, col] = pixels[index, top + row, left + col]
        if flips[index]:
            expected = expected[:, ::-1].copy()
        alone = empty(1, 8, 20, dtype)
        normalize(torch.from_numpy(expected)[None], alone)
        assert torch.equal(out[index], alone[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wide_box_is_copied_black_beyond_the_border(each_isa, generator, dtype):
    """Wider than the 320 pixels that are put in order at a time."""
    lefts, width = [-330, -330, -17, -17, 60, 60, 90, 90], 350
    flips = torch.tensor([False, True] * 4)
    pixels, out, alone = random_pixels(generator, 8, 1, 400), empty(8, 1, width, dtype), empty(8, 1, width, dtype)
    crop_flip_normalize(pixels, torch.tensor([(0.0, left, 1.0, width) for left in lefts]), flips, out)
    bordered = torch.nn.functional.pad(pixels, (0, 0, 400, 400))
    expected = torch.stack([image[:, 400 + left :][:, :width] for image, left in zip(bordered, lefts, strict=True)])
    normalize(torch.where(flips[:, None, None, None], expected.flip(2), expected), alone)
    assert torch.equal(out, alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (17, 16), (40, 33)])
def test_any_other_box_is_resampled_as_the_filter_is_defined(each_isa, generator, size, dtype):
    pixels = random_pixels(generator, 10, 23, 29)
    begin, end = torch.rand(2, 10, 2, generator=generator).sort(0).values
    boxes = torch.cat([begin, end - begin + 0.01], 1).double() * torch.tensor([23.0, 29.0, 22.0, 28.0])
    boxes[4] = torch.tensor([-3.5, -2.0, 30.0, 12.0])  # over three borders
    boxes[5] = torch.tensor([20.0, 27.0, 20.0, 31.0])  # mostly black
    boxes[6] = torch.tensor([0.0, 30.0, 23.0, 5.0])  # nothing but black
    # Of the result's size, but not at a whole pixel, or in one direction only.
    boxes[7], boxes[8], boxes[9] = torch.tensor([[1.5, 2.0, *size], [2.0, 1.5, *size], [1.0, 2.0, size[0], 11.0]])
    flips = torch.rand(10, generator=generator) < 0.5
    out = empty(10, *size, dtype)
    crop_flip_normalize(pixels, boxes, flips, out)
    for index in range(10):
        expected = formula(pixels[index].numpy(), boxes[index].tolist(), bool(flips[index]), *size)
        torch.testing.assert_close(
            out[index].double().permute(1, 2, 0), torch.from_numpy(expected.copy()), rtol=ROUNDING[dtype], atol=4e-6
        )


def test_is_pillows_bilinear_but_for_rounding(each_isa, generator):
    for height, width, size in ((97, 131, 32), (40, 36, 64), (200, 50, 24)):
        pixels = random_pixels(generator, 4, height, width)
        begin, end = torch.rand(2, 4, 2, generator=generator).sort(0).values
        boxes = torch.cat([begin * 0.9, (end - begin) * 0.9 + 0.05], 1) * torch.tensor([height, width, height, width])
        out = empty(4, size, size)
        crop_flip_normalize(pixels, boxes, None, out)
        for index, (top, left, h, w) in enumerate(boxes.tolist()):
            image = Image.fromarray(pixels[index].numpy())
            expected = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h))
            difference = as_pixels(out)[index] - torch.from_numpy(np.asarray(expected).astype(np.float64))
            assert difference.abs().max() < TOLERANCE_OF_PILLOW


@pytest.mark.parametrize("box", [Box(-4, -2, 28, 30, True), Box(3.25, 1.5, 20.0, 37.75), Box(-1.5, 4, 46, 43, True)])
def test_is_what_the_loader_cuts(each_isa, generator, box):
    image = random_pixels(generator, 1, 40, 44)
    out = empty(1, 32, 32)
    boxes = torch.tensor([[box.top, box.left, box.bottom - box.top, box.right - box.left]], dtype=torch.float64)
    crop_flip_normalize(image, boxes, torch.tensor([box.flip]), out)
    expected = torch.from_numpy(cut(image[0].numpy(), box, 32).astype(np.float64))
    assert (as_pixels(out)[0] - expected).abs().max() < TOLERANCE_OF_PILLOW


def test_fills_a_part_of_a_batch_and_no_more(each_isa, generator):
    batch = empty(3, 6, 6).fill_(7)
    crop_flip_normalize(random_pixels(generator, 1, 9, 8), torch.tensor([[1.0, 0.5, 7.0, 6.5]]), None, batch[1:2])
    assert (batch[[0, 2]] == 7).all()
    assert (batch[1] != 7).all()


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_no_number_depends_on_the_threads(each_isa, generator, threads):
    pixels = random_pixels(generator, 3, 100, 120)
    boxes = torch.tensor([[1.0, 2.0, 64.0, 64.0], [0.0, 3.5, 99.0, 80.0], [-5.0, 9.0, 50.0, 40.0]])
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, threads, threads):
            torch.set_num_threads(count)
            results.append(empty(3, 64, 64))
            crop_flip_normalize(pixels, boxes, torch.tensor([True, False, True]), results[-1])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[1], results[2])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0 if each_isa != "torch" else 1e-5)


def test_resamples_in_float32_under_autocast(each_isa, generator):
    pixels, boxes = random_pixels(generator, 1, 20, 20), torch.tensor([[1.0, 1.0, 18.0, 17.0]])
    under, without = empty(1, 8, 8), empty(1, 8, 8)
    crop_flip_normalize(pixels, boxes, None, without)
    with torch.autocast("cpu", torch.bfloat16):
        crop_flip_normalize(pixels, boxes, None, under)
    assert torch.equal(under, without)


PIXELS = torch.zeros(2, 8, 9, 3, dtype=torch.uint8)
WHOLE = torch.tensor([[0.0, 0.0, 8.0, 9.0]] * 2)


@pytest.mark.parametrize(
    "pixels, boxes, flips, out, message",
    [
        (PIXELS.float(), WHOLE, None, empty(2, 4, 4), "pixels is torch.float32"),
        (PIXELS.permute(0, 2, 1, 3), WHOLE, None, empty(2, 4, 4), "contiguous"),
        (PIXELS[0], WHOLE, None, empty(2, 4, 4), "N x H x W x 3"),
        (PIXELS, WHOLE, None, empty(2, 4, 4).double(), "out is torch.float64"),
        (PIXELS, WHOLE, None, empty(1, 4, 4), "2 x 3 x S x T"),
        (PIXELS, WHOLE, None, torch.zeros(2, 3, 4, 4), "channels-last"),
        (PIXELS, None, None, empty(2, 4, 4), "without boxes"),
        (PIXELS, WHOLE.long(), None, empty(2, 4, 4), "boxes is torch.int64"),
        (PIXELS, WHOLE[:1], None, empty(2, 4, 4), "boxes has shape"),
        (PIXELS, WHOLE * torch.tensor([1, 1, 0, 1]), None, empty(2, 4, 4), "box 0 .* must have pixels"),
        (PIXELS, WHOLE * torch.tensor([[1.0], [float("nan")]]), None, empty(2, 4, 4), "box 1"),
        (PIXELS, WHOLE - torch.tensor([0, 10, 0, 0]), None, empty(2, 4, 4), "8 x 9 image"),
        (PIXELS, WHOLE * 3, None, empty(2, 4, 4), "border"),
        (PIXELS, WHOLE, torch.zeros(2), empty(2, 4, 4), "flips is torch.float32"),
        (PIXELS, WHOLE, torch.zeros(3, dtype=torch.bool), empty(2, 4, 4), "flips has shape"),
    ],
)
def test_refuses_what_the_kernel_cannot_read(each_isa, pixels, boxes, flips, out, message):
    with pytest.raises(ValueError, match=message):
        crop_flip_normalize(pixels, boxes, flips, out)


@pytest.mark.parametrize("each_isa", ["torch", "avx2"], indirect=True)
def test_is_a_well_behaved_operator(each_isa, generator):
    boxes = torch.tensor([[0.5, 1.0, 6.0, 7.0], [1.0, 2.0, 4.0, 4.0]])
    arguments = (random_pixels(generator, 2, 8, 9), boxes, torch.tensor([True, False]), empty(2, 4, 4).zero_())
    torch.library.opcheck(torch.ops.knltrain.crop_flip_normalize, arguments)
    torch.library.opcheck(
        torch.ops.knltrain.crop_flip_normalize, (arguments[0][:, :4, :4].contiguous(), None, None, arguments[3])
    )
