import numpy as np
import pytest
import torch
from PIL import Image

from knltrain.config import AugmentConfig, RunConfig
from knltrain.data import augment, order
from knltrain.data.augment import Box


def config(name, size=224, **options):
    return RunConfig(image_size=size, augment=AugmentConfig(name=name, **options))


def boxes(conf, height, width, count=500):
    return [augment.training_box(conf, height, width, row) for row in order.draws(0, 0, count, augment.NUM_DRAWS)]


def ramp(height, width):
    """A picture whose red channel tells the column and whose green channel tells the row."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), 0 * x], -1).astype(np.uint8)


@pytest.mark.parametrize("height, width", [(300, 500), (500, 300), (256, 256), (300, 301), (97, 333)])
def test_centre_crop_is_torchvisions_pixels(height, width, torchvision):
    transforms = torchvision.transforms
    rng = np.random.default_rng(0)
    picture = np.asarray(Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).resize((width, height)))
    reference = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])(Image.fromarray(picture))
    assert np.array_equal(augment.centre_crop(picture, resize=256, size=224), np.asarray(reference))


@pytest.mark.parametrize("left, top, resize", [(0, 0, 256), (32, 20, 256), (7, 3, 300)])
def test_a_cut_is_a_crop_of_the_resized_image(left, top, resize):
    """In one pass instead of two; Pillow holds boxes in single precision, so a few pixels round the other way."""
    rng = np.random.default_rng(0)
    picture = np.asarray(Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).resize((500, 375)))
    scale = resize / 375
    width = int(500 * scale)
    two_passes = np.asarray(Image.fromarray(picture).resize((width, resize), Image.Resampling.BILINEAR))
    box = Box(left, top, left + 224, top + 224).scaled(500 / width, 375 / resize)
    difference = np.abs(augment.cut(picture, box, 224).astype(int) - two_passes[top : top + 224, left : left + 224])
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.005


def test_crop_flip_takes_every_place_and_both_sides():
    found = boxes(config("crop-flip", size=224), 256, 256)
    assert {b.right - b.left for b in found} == {224}
    lefts = {b.left for b in found}
    assert min(lefts) == 0
    assert max(lefts) == 32
    assert len(lefts) == 33
    assert 0.4 < np.mean([b.flip for b in found]) < 0.6


def test_crop_flip_box_is_in_source_pixels():
    for box in boxes(config("crop-flip"), 512, 1024, 50):
        assert box.right - box.left == pytest.approx(448)
        assert 0 <= box.left <= 1024 - 448
        assert box.left % 2 == 0


def test_random_resized_crop_stays_inside():
    found = boxes(config("rrc"), 400, 600, 2000)
    assert all(b.left >= 0 and b.right <= 600 and b.top >= 0 and b.bottom <= 400 for b in found)


def test_random_resized_crop_has_torchvisions_distribution(torchvision):
    transforms = torchvision.transforms
    torch.manual_seed(0)
    blank = torch.zeros(3, 400, 600)
    theirs = np.array([transforms.RandomResizedCrop.get_params(blank, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(4000)])
    found = boxes(config("rrc"), 400, 600, 4000)
    ours = np.array([(b.top, b.left, b.bottom - b.top, b.right - b.left) for b in found])
    for measure in (lambda b: b[:, 2] * b[:, 3] / 240_000, lambda b: b[:, 3] / b[:, 2], lambda b: b[:, 0] / 400):
        quantiles = np.quantile(measure(ours), [0.05, 0.5, 0.95]), np.quantile(measure(theirs), [0.05, 0.5, 0.95])
        np.testing.assert_allclose(*quantiles, atol=0.03)


@pytest.mark.parametrize("height, width", [(10, 1000), (1000, 10), (1, 1)])
def test_random_resized_crop_of_extreme_shapes_falls_back_to_the_centre(height, width):
    for box in boxes(config("rrc", min_area=0.9), height, width, 50):
        assert 0 <= box.left < box.right <= width
        assert 0 <= box.top < box.bottom <= height


@pytest.mark.parametrize(
    "height, width, expected",
    [
        (1000, 300, Box(0, 300, 300, 700)),  # four thirds as high as wide
        (300, 1000, Box(300, 0, 700, 300)),  # four thirds as wide as high
        (90, 91, Box(0, 0, 91, 90)),
    ],
)
def test_where_no_try_fits_the_centre_is_as_long_as_the_ratio_allows(height, width, expected):
    """The whole image where its own ratio is between 3/4 and 4/3; see the fall-back of torchvision's crop."""
    assert augment._random_resized_box(height, width, 1.0, np.full(augment.NUM_DRAWS, 0.999)) == expected


def test_pad_crop_flip_moves_by_up_to_the_pad():
    found = boxes(config("pad-crop-flip", size=32), 32, 32, 2000)
    assert {b.left for b in found} == set(range(-4, 5))
    assert {b.top for b in found} == set(range(-4, 5))


def test_cut_copies_where_nothing_is_resampled():
    picture = ramp(40, 50)
    assert np.array_equal(augment.cut(picture, Box(3, 5, 35, 37), 32), picture[5:37, 3:35])
    assert np.array_equal(augment.cut(picture, Box(3, 5, 35, 37, flip=True), 32), picture[5:37, 3:35][:, ::-1])


@pytest.mark.parametrize("left, top", [(-4, -4), (4, 4), (-4, 4), (0, 0)])
def test_what_lies_over_the_border_is_black(left, top):
    picture = ramp(32, 32) | 1
    padded = np.zeros((40, 40, 3), np.uint8)
    padded[4:36, 4:36] = picture
    cut = augment.cut(picture, Box(left, top, left + 32, top + 32), 32)
    assert np.array_equal(cut, padded[top + 4 : top + 36, left + 4 : left + 36])


def test_cut_resamples_the_box_and_not_its_surroundings():
    picture = np.zeros((100, 100, 3), np.uint8)
    picture[20:60, 10:50] = 200
    assert np.all(augment.cut(picture, Box(10, 20, 50, 60), 20)[1:-1, 1:-1] == 200)
    half = augment.cut(picture, Box(30, 20, 70, 60), 20)
    assert np.all(half[1:-1, :9] == 200)
    assert np.all(half[1:-1, 11:] == 0)


def test_fractional_boxes_are_not_rounded():
    """A ramp of two levels a pixel, cut half a pixel further, is a level brighter."""
    picture = np.repeat(np.arange(0, 240, 2, dtype=np.uint8)[None, :, None], 64, 0).repeat(3, 2)
    whole = augment.cut(picture, Box(10, 0, 74, 64), 32).astype(int)
    shifted = augment.cut(picture, Box(10.5, 0, 74.5, 64), 32).astype(int)
    assert np.all(shifted[:, 2:-2] - whole[:, 2:-2] == 1)


def test_augmentation_depends_on_the_position_alone():
    conf = config("rrc")
    rows = order.draws(5, 100, 110, augment.NUM_DRAWS)
    again = order.draws(5, 104, 105, augment.NUM_DRAWS)
    assert augment.training_box(conf, 333, 444, rows[4]) == augment.training_box(conf, 333, 444, again[0])
