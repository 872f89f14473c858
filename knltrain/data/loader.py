"""Data loader: batches are prefetched by decoder threads, which release the GIL."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from knltrain.config import RunConfig
from knltrain.data import augment, order
from knltrain.data.augment import Box, Pixels
from knltrain.data.decode import DecodeError, is_bad, refuse_large
from knltrain.data.folder import DataError
from knltrain.data.packed import Packed
from knltrain.node.binding import prefer_memory
from knltrain.node.cpulist import format_cpu_list
from knltrain.ops.crops import crop_flip_normalize, crop_flip_normalize_at
from knltrain.ops.native import kernels

# Micro-batches decoded ahead: one is ready for the trainer while threads work on the next.
_PREFETCHED_BATCHES = 2

_T = TypeVar("_T")


class SourceImage(Protocol):
    """An image whose size is known before its pixels are decoded."""

    height: int
    width: int

    def pixels(self) -> Pixels:
        """H x W x 3."""

    def around(self, box: Box, size: int) -> tuple[Pixels, Box]:
        """Returns pixels, perhaps at another scale, from which a box is resampled to ``size``; and the box in them."""


class Dataset(Protocol):
    """Images with labels, by index.

    Attributes:
        classes: names, in the order of their numbers.
        labels: class number of every image.
        remarks: what was left out, and what may not be as it was meant, for people.
    """

    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    remarks: tuple[str, ...]

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Returns the image's name, for error messages."""

    def image(self, index: int) -> SourceImage:
        """Opens one image."""

    def check(self, count: int) -> None:
        """Decodes some images and raises DataError for a bad one."""

    def bad(self, index: int, error: DecodeError | OSError) -> DataError:
        """Returns the error for an image that cannot be used: its name, and what to do."""

    def files_sha256(self) -> str:
        """Returns a hash of where the images are, without reading any; equal for a copy."""

    def close(self) -> None:
        """Closes all files."""


def replaced(images: float) -> str:
    """Returns the message about skipped images, with ``on_bad`` ``skip``."""
    return f"{images:,.0f} images could not be decoded; the next good ones were used instead"


class Batch(NamedTuple):
    """Images N x 3 x S x S, channels-last and normalised, and their labels, int64."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class RankBatch:
    """This rank's part of every global batch, its micro-batches, and their image size and augmentation.

    Attributes:
        global_batch: images of a step over all ranks.
        local_batch: images of a micro-batch.
        rank: this rank.
        world_size: ranks.
        first_step: first step with these settings.
        first_image: position of its first image in the stream.
        image_size: pixels; None for the configuration's.
        augmented: whether the configuration's augmentation is used, or evaluation's crop.
    """

    global_batch: int
    local_batch: int
    rank: int
    world_size: int
    first_step: int = 0
    first_image: int = 0
    image_size: int | None = None
    augmented: bool = True

    @property
    def accumulate(self) -> int:
        """Number of micro-batches of this rank in a step."""
        return self.global_batch // self.world_size // self.local_batch

    def ranges(self, step: int) -> list[tuple[int, int]]:
        """Returns the stream positions [first, stop) of this rank's micro-batches in a step."""
        start = self.first_image + (step - self.first_step) * self.global_batch
        first = start + self.rank * (self.global_batch // self.world_size)
        return [(first + i * self.local_batch, first + (i + 1) * self.local_batch) for i in range(self.accumulate)]


class _Item(NamedTuple):
    """A sample's index and its random numbers, None for the centre crop."""

    sample: int
    draws: NDArray[np.float64] | None


class _SynchronousExecutor(Executor):
    """Runs submitted functions immediately, in the submitting thread."""

    def submit(self, fn: Callable[..., _T], /, *args: Any, **kwargs: Any) -> Future[_T]:
        future: Future[_T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class Loader:
    """Decodes, augments and normalises the images of a data set.

    Args:
        dataset: the data set; closed with the loader.
        config: the configuration, with augmentation and image size.
        dtype: data type of the images, float32 or bf16.
        workers: decoder threads; with 0, batches are decoded in the consumer's thread.
        cpus: logical CPUs of the threads; by default those of the creating thread.
    """

    def __init__(
        self, dataset: Dataset, config: RunConfig, *, dtype: torch.dtype, workers: int, cpus: Collection[int] = ()
    ) -> None:
        self._dataset = dataset
        self._config = config
        self._dtype = dtype
        self._workers = workers
        self._cpus = frozenset(cpus)
        self._threads: list[int] = []
        self._bad: set[int] = set()
        # torch calls of workers must not start OpenMP threads of their own, see _init_worker. After this call the
        # trainer's thread keeps its own number of threads.
        torch.get_num_threads()
        self._ahead = _PREFETCHED_BATCHES if workers else 0
        self._pool = (
            ThreadPoolExecutor(workers, "decode", initializer=self._init_worker) if workers else _SynchronousExecutor()
        )

    def _init_worker(self) -> None:
        """Initialises a decoder thread."""
        torch.set_num_threads(1)
        if self._cpus:
            # The trainer may prefer MCDRAM or HBM; images from disk must not fill it.
            prefer_memory(())
            with contextlib.suppress(OSError):  # moved() reports it
                os.sched_setaffinity(0, self._cpus)
            self._threads.append(threading.get_native_id())

    def moved(self) -> str:
        """Returns a warning if a library has changed the CPUs of decoder threads; otherwise an empty string."""
        found = {frozenset(os.sched_getaffinity(thread)) for thread in self._threads} - {self._cpus}
        if not found:
            return ""
        where = " and ".join(sorted(map(format_cpu_list, found)))
        return f"decoders were bound to CPUs {format_cpu_list(self._cpus)} and are on {where} now"

    def close(self) -> None:
        """Stops the threads, cancels pending work, and closes the data set."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._dataset.close()

    def __len__(self) -> int:
        """Number of images of the data set."""
        return len(self._dataset)

    def skipped(self, total: Callable[..., list[float]]) -> int:
        """Counts the distinct images skipped on any rank, with ``on_bad`` ``skip``.

        All ranks call it at once.

        Args:
            total: sums values over all ranks, as ``Group.sum``.
        """
        (found,) = total(len(self._bad))
        if not found:
            return 0
        # An image belongs to different ranks in different epochs: the ranks' counts must not be added.
        return sum(count > 0 for count in total(*(index in self._bad for index in range(len(self)))))

    def training(self, part: RankBatch, first_step: int, last_step: int) -> Generator[Batch, None, None]:
        """Yields this rank's micro-batches of the steps [first_step, last_step).

        Raises:
            DataError: an image that cannot be decoded; the message has its path.
        """
        seed, count = self._config.seed, len(self._dataset)
        config = self._config if part.image_size is None else self._config.at_size(part.image_size)

        def batches() -> Iterator[list[_Item]]:
            for step in range(first_step, last_step):
                for first, stop in part.ranges(step):
                    chosen = order.samples(seed, count, first, stop)
                    if config.augment.name == "none" or not part.augmented:
                        yield [_Item(sample, None) for sample in chosen.tolist()]
                        continue
                    drawn = order.draws(seed, first, stop, augment.NUM_DRAWS)
                    yield [_Item(sample, row) for sample, row in zip(chosen.tolist(), drawn, strict=True)]

        return self._prefetched(batches(), config)

    def evaluation(self, *, batch: int, rank: int, world_size: int) -> Generator[Batch, None, None]:
        """Yields centre crops of every image once over all ranks, none twice; the last batches are shorter.

        Raises:
            DataError: an image that cannot be decoded; the message has its path.
        """
        mine = range(rank, len(self._dataset), world_size)

        def batches() -> Iterator[list[_Item]]:
            for start in range(0, len(mine), batch):
                yield [_Item(sample, None) for sample in mine[start : start + batch]]

        return self._prefetched(batches(), self._config)

    def _prefetched(self, batches: Iterator[list[_Item]], config: RunConfig) -> Generator[Batch, None, None]:
        pending: deque[tuple[Batch, list[Future[None]]]] = deque()
        try:
            for items in batches:
                pending.append(self._submit(items, config))
                if len(pending) > self._ahead:
                    yield _wait(*pending.popleft())
            while pending:
                yield _wait(*pending.popleft())
        finally:
            for _, futures in pending:
                for future in futures:
                    future.cancel()

    def _submit(self, items: list[_Item], config: RunConfig) -> tuple[Batch, list[Future[None]]]:
        size = config.image_size
        images = torch.empty((len(items), 3, size, size), dtype=self._dtype, memory_format=torch.channels_last)
        labels = torch.from_numpy(self._dataset.labels[[item.sample for item in items]])
        # Small enough to keep all workers busy until the end of a batch, large enough for little overhead.
        chunk = max(1, min(32, -(-len(items) // (2 * max(1, self._workers)))))
        futures = [
            self._pool.submit(
                self._fill,
                items[start : start + chunk],
                images[start : start + chunk],
                labels[start : start + chunk],
                config,
            )
            for start in range(0, len(items), chunk)
        ]
        return Batch(images, labels), futures

    def _fill(self, items: list[_Item], out: Tensor, labels: Tensor, config: RunConfig) -> None:
        if isinstance(self._dataset, Packed):
            self._crop(self._dataset, items, out, config)
            return
        parts: list[Pixels] = []
        boxes: list[Box] = []
        for place, item in enumerate(items):
            part, box, sample = self._decode_box(item, config)
            parts.append(np.ascontiguousarray(part))
            boxes.append(box)
            if sample != item.sample:
                labels[place] = int(self._dataset.labels[sample])
        flips = torch.tensor([item.draws is not None and augment.is_flipped(item.draws) for item in items])
        if kernels() is None:
            size = config.image_size
            pixels = np.stack([augment.cut(part, box, size) for part, box in zip(parts, boxes, strict=True)])
            crop_flip_normalize(torch.from_numpy(pixels), None, flips, out)
            return
        crop_flip_normalize_at(
            np.array([part.ctypes.data for part in parts]),
            np.array([part.shape[:2] for part in parts]),
            torch.tensor(
                [(box.top, box.left, box.bottom - box.top, box.right - box.left) for box in boxes],
                dtype=torch.float64,  # in float32 a box that ends on the border may be rounded beyond it
            ),
            flips,
            out,
        )

    def _crop(self, dataset: Packed, items: list[_Item], out: Tensor, config: RunConfig) -> None:
        """Crops from the mapped files directly into the batch."""
        samples = np.array([item.sample for item in items])
        if items[0].draws is None:
            box = augment.centre_box(dataset.size, resize=config.resize, size=config.image_size)
            boxes, flips = np.tile(box, (len(items), 1)), np.zeros(len(items), bool)
        else:
            draws = np.stack([item.draws for item in items if item.draws is not None])
            boxes, flips = augment.training_boxes(config, dataset.size, draws)
        where, mirrored = torch.from_numpy(boxes), torch.from_numpy(flips)
        if kernels() is None:
            pixels = np.stack([dataset.image(sample).pixels() for sample in samples.tolist()])
            crop_flip_normalize(torch.from_numpy(pixels), where, mirrored, out)
        else:
            sizes = np.full((len(items), 2), dataset.size)
            crop_flip_normalize_at(dataset.addresses(samples), sizes, where, mirrored, out)

    def _decode_box(self, item: _Item, config: RunConfig) -> tuple[Pixels, Box, int]:
        """Returns pixels, the box in them, and the sample: the next good one if a bad one is skipped."""
        sample = item.sample
        while True:
            try:
                return *self._around(sample, item.draws, config), sample
            except (DecodeError, OSError) as error:
                if config.on_bad == "fail" or not is_bad(error):
                    raise self._dataset.bad(sample, error) from None
                self._bad.add(sample)
                if len(self._bad) == len(self._dataset):
                    raise self._dataset.bad(sample, error) from None
                sample = (sample + 1) % len(self._dataset)

    def _around(self, sample: int, draws: NDArray[np.float64] | None, config: RunConfig) -> tuple[Pixels, Box]:
        size, resize = config.image_size, config.resize
        image = self._dataset.image(sample)
        if draws is None:
            scaled = augment.short_side(image.height, image.width, resize)
            refuse_large(*scaled, " after scaling")
            if (image.height, image.width) == scaled:
                return image.around(augment.centre(image.height, image.width, size), size)
            return augment.centre_crop(image.pixels(), resize=resize, size=size), Box(0, 0, size, size)
        box = augment.training_box(config, image.height, image.width, draws)
        return image.around(box._replace(flip=False), size)


def _wait(batch: Batch, futures: list[Future[None]]) -> Batch:
    for future in futures:
        future.result()
    return batch
