import contextlib
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from conftest import write_jpeg

from knltrain.config import AugmentConfig, RunConfig
from knltrain.data import order
from knltrain.data.augment import centre_crop
from knltrain.data.decode import DecodedImage
from knltrain.data.folder import DataError, Folder
from knltrain.data.loader import Loader, RankBatch
from knltrain.ops.crops import MEAN, STD, normalize

CONFIG = RunConfig(image_size=24, seed=3, augment=AugmentConfig(name="rrc"))


@pytest.fixture
def make_loader(image_folder):
    loaders = []

    def make(part="train", config=CONFIG, dtype=torch.float32, workers=2):
        loaders.append(Loader(Folder(image_folder / part), config, dtype=dtype, workers=workers))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


def steps(loader, share, first, last):
    """The images and labels of each step, micro-batches joined."""
    batches = list(loader.training(share, first, last))
    images, labels = (torch.cat([b[i] for b in batches]) for i in (0, 1))
    return images.split(share.accumulate * share.local_batch), labels.split(share.accumulate * share.local_batch)


def test_the_same_images_at_any_number_of_ranks_workers_and_micro_batches(make_loader):
    whole, labels = steps(make_loader(), RankBatch(32, 32, 0, 1), 0, 4)
    for local in (8, 16):
        for workers in (1, 5):
            assert torch.equal(
                torch.cat(whole), torch.cat(steps(make_loader(workers=workers), RankBatch(32, local, 0, 1), 0, 4)[0])
            )
    ranks = [steps(make_loader(), RankBatch(32, 8, rank, 2), 0, 4) for rank in range(2)]
    for step in range(4):
        assert torch.equal(whole[step], torch.cat([images[step] for images, _ in ranks]))
        assert torch.equal(labels[step], torch.cat([labels[step] for _, labels in ranks]))


@pytest.mark.parametrize("shape", [(32, 47), (61, 32)])
def test_evaluation_of_images_that_need_no_scaling_takes_their_middle(shape, tmp_path):
    write_jpeg(tmp_path / "val" / "a" / "0.jpg", *shape, seed=1)
    config = RunConfig(image_size=24, augment=AugmentConfig(resize=32))
    dataset = Folder(tmp_path / "val")
    loader = Loader(dataset, config, dtype=torch.float32, workers=1)
    (batch,) = loader.evaluation(batch=4, rank=0, world_size=1)
    loader.close()
    expected = torch.empty((1, 3, 24, 24)).contiguous(memory_format=torch.channels_last)
    crop = centre_crop(dataset.image(0).pixels(), resize=32, size=24)
    normalize(torch.from_numpy(np.ascontiguousarray(crop))[None], expected)
    assert torch.equal(batch.images, expected)


class Numbered:
    """Grey images whose label is their number."""

    classes = ("any",)
    labels = np.arange(101)

    def __len__(self):
        return 101

    def image(self, index):
        return DecodedImage(np.full((8, 8, 3), index, np.uint8))

    def close(self):
        pass


@pytest.fixture(scope="module")
def printed_order():
    command = [sys.executable, "-m", "knltrain.data.order", "5", "101", "3"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    assert sorted(map(int, printed[101:202])) == list(range(101))
    return list(map(int, printed))


@pytest.mark.parametrize("workers", [0, 1, 8])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_three_epochs_come_in_the_order_that_the_script_prints(world_size, workers, printed_order):
    config = RunConfig(image_size=8, seed=5, augment=AugmentConfig(name="crop-flip", resize=8))
    of_ranks = []
    for rank in range(world_size):
        loader = Loader(Numbered(), config, dtype=torch.float32, workers=workers)
        images, labels = steps(loader, RankBatch(12, 12 // world_size, rank, world_size), 0, 26)
        loader.close()
        of_ranks.append([step.tolist() for step in labels])
        for step, numbers in zip(images, labels, strict=True):
            grey = (step[:, 0, 0, 0] * STD[0] + MEAN[0]) * 255
            assert torch.equal(grey.round().long(), numbers)
    seen = [sample for step in zip(*of_ranks, strict=True) for rank in step for sample in rank]
    assert seen[: 3 * 101] == printed_order


def test_without_workers_a_bad_image_ends_the_run_as_with_them(image_folder, tmp_path):
    broken = tmp_path / "train" / "a"
    write_jpeg(broken / "0.jpg", 30, 30, seed=0)
    (broken / "0.jpg").write_bytes((broken / "0.jpg").read_bytes()[:200])
    loader = Loader(Folder(tmp_path / "train"), CONFIG, dtype=torch.float32, workers=0)
    with pytest.raises(DataError, match=r"0\.jpg"):
        next(loader.training(RankBatch(2, 2, 0, 1), 0, 1))
    loader.close()


def test_a_later_start_goes_on_in_the_same_stream(make_loader):
    whole, _ = steps(make_loader(), RankBatch(32, 16, 0, 1), 0, 6)
    later, _ = steps(make_loader(), RankBatch(32, 16, 0, 1), 4, 6)
    assert torch.equal(torch.cat(whole[4:]), torch.cat(later))


def test_labels_belong_to_their_images(make_loader, image_folder):
    config = RunConfig(image_size=24, augment=AugmentConfig(name="none"))
    images, labels = steps(make_loader(config=config), RankBatch(48, 48, 0, 1), 0, 1)
    dataset = Folder(image_folder / "train")
    for place, sample in enumerate(order.samples(0, 48, 0, 48)):
        assert labels[0][place] == dataset.labels[sample]
        crop = centre_crop(dataset.image(sample).pixels(), resize=config.resize, size=24)
        expected = (crop.transpose(2, 0, 1) / 255 - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]
        np.testing.assert_allclose(images[0][place].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("world_size", [1, 2, 3, 20])
def test_evaluation_sees_every_image_once(make_loader, world_size):
    labels = [
        batch.labels
        for rank in range(world_size)
        for batch in make_loader("val").evaluation(batch=4, rank=rank, world_size=world_size)
    ]
    assert sorted(torch.cat(labels).tolist()) == [0] * 5 + [1] * 4 + [2] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batches_are_channels_last_in_the_type_asked_for(make_loader, dtype):
    batch = next(make_loader(dtype=dtype).training(RankBatch(16, 16, 0, 1), 0, 1))
    assert batch.images.dtype == dtype
    assert batch.images.shape == (16, 3, 24, 24)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels.dtype == torch.int64


def test_normalize_is_the_formula():
    pixels = torch.randint(256, (3, 5, 7, 3), dtype=torch.uint8)
    expected = ((pixels.double() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        out = torch.empty((3, 3, 5, 7), dtype=dtype, memory_format=torch.channels_last)
        normalize(pixels, out)
        torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=0, check_dtype=False)


def test_a_bad_image_met_later_names_its_path(tmp_path):
    for index in range(4):
        write_jpeg(tmp_path / "x" / f"{index}.jpg", 30, 30, index)
    loader = Loader(Folder(tmp_path), CONFIG, dtype=torch.float32, workers=2)
    (tmp_path / "x" / "2.jpg").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"2\.jpg"):
        list(loader.training(RankBatch(4, 4, 0, 1), 0, 1))
    (tmp_path / "x" / "2.jpg").unlink()
    with pytest.raises(DataError, match=r"2\.jpg.*No such file"):
        list(loader.training(RankBatch(4, 4, 0, 1), 0, 1))
    loader.close()


def test_threads_end_with_the_loader_and_leave_the_trainers_threads_alone(image_folder):
    torch.set_num_threads(2)
    before = threading.active_count()
    loader = Loader(Folder(image_folder / "train"), CONFIG, dtype=torch.float32, workers=3)
    batches = loader.training(RankBatch(16, 16, 0, 1), 0, 100)
    next(batches)
    batches.close()
    loader.close()
    assert threading.active_count() == before
    assert torch.get_num_threads() == 2


def test_a_batch_larger_than_the_data_set(make_loader):
    images, _ = steps(make_loader(), RankBatch(128, 64, 0, 1), 0, 2)
    assert [len(step) for step in images] == [128, 128]


def test_decoders_run_where_they_are_told_and_notice_when_they_are_moved(image_folder):
    mine = sorted(os.sched_getaffinity(0))
    if len(mine) < 2:
        pytest.skip("one CPU: nowhere to move")
    others = set(threading.enumerate())
    loader = Loader(Folder(image_folder / "train"), CONFIG, dtype=torch.float32, workers=2, cpus={mine[1]})
    with contextlib.closing(loader):
        list(loader.training(RankBatch(16, 16, 0, 1), 0, 2))
        threads = [thread.native_id for thread in set(threading.enumerate()) - others if thread.name[:6] == "decode"]
        assert threads
        deadline = time.monotonic() + 60  # the first may have made all batches before the second came to its place
        while any(os.sched_getaffinity(thread) != {mine[1]} for thread in threads):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert os.sched_getaffinity(0) == set(mine), "the trainer's thread stays where it was"
        assert loader.moved() == ""
        os.sched_setaffinity(threads[0], {mine[0]})
        assert f"are on {mine[0]} now" in loader.moved()
