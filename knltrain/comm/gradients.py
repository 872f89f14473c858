"""Gradient averaging over the ranks: buckets are all-reduced while the backward pass runs."""

# No "from __future__ import annotations": DistributedDataParallel checks the hook's annotations as objects.

import functools
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from knltrain.comm.group import Group
from knltrain.comm.powersgd import PowerSGD
from knltrain.config import CommConfig


class CommTiming(NamedTuple):
    """Communication time of a step's gradients, in seconds; 0 if nothing was communicated.

    Attributes:
        on_wire: from the start of the first bucket's all-reduce to the end of the last one's.
        exposed: the part of it after the last bucket was started, which the backward pass cannot hide.
    """

    on_wire: float
    exposed: float


class GradientClock:
    """Measures how long gradients are communicated, and how much of it the backward pass does not hide.

    Attributes:
        compressor: the gradient compression in use, or None.
    """

    def __init__(self) -> None:
        self.compressor: PowerSGD | None = None
        self._first = self._sent = self._last = 0.0

    def started(self) -> None:
        """Notes that a bucket's all-reduce is about to start."""
        if not self._first:
            self._first = time.perf_counter()

    def sent(self) -> None:
        """Notes that a bucket's all-reduce has started; the backward pass goes on, or this bucket was its last."""
        self._sent = time.perf_counter()

    def finished(self) -> None:
        """Notes that a bucket's all-reduce is done."""
        self._last = time.perf_counter()

    def pop_step(self) -> CommTiming:
        """Returns the times of the step that has ended, and resets the clock for the next."""
        timing = CommTiming(max(0.0, self._last - self._first), max(0.0, self._last - self._sent))
        self._first = self._sent = self._last = 0.0
        return timing


def data_parallel(
    model: nn.Module,
    config: CommConfig,
    group: Group,
    accumulated: dict[Tensor, Tensor],
    on_bucket: Callable[[Tensor], None] | None = None,
) -> tuple[nn.Module, GradientClock]:
    """Wraps a model so that its gradients are averaged over the ranks; with one rank, returns the model itself.

    Args:
        model: the network; rank 0's weights are broadcast.
        config: bucket size, data type of the all-reduce, compression.
        group: the ranks.
        accumulated: by parameter, float32 sums of the gradients of a step's earlier micro-batches; they are added to
            the last one's before the all-reduce.
        on_bucket: called with each bucket of this rank's own gradients before they are averaged; not with PowerSGD.
    """
    clock = GradientClock()
    if group.world_size == 1:
        return model, clock
    # Each rank keeps its own running statistics, see statistics.py.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer PyTorch renames broadcast_buffers
        parallel = DistributedDataParallel(
            model, bucket_cap_mb=config.bucket_mb_of(group.world_size), broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )  # fmt: skip
    wire = torch.bfloat16 if config.dtype == "bf16" else torch.float32

    def add_accumulated(bucket: GradBucket) -> None:
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            if parameter in accumulated:
                gradient.copy_(accumulated.pop(parameter).add_(gradient))

    def reduce_mean(state: GradientClock, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        buffer = bucket.buffer()
        add_accumulated(bucket)
        if on_bucket:
            on_bucket(buffer)
        message = buffer.div_(group.world_size).to(wire)
        state.started()

        def copy_back(future: torch.futures.Future[list[Tensor]]) -> Tensor:
            state.finished()
            (reduced,) = future.value()
            return buffer.copy_(reduced) if reduced is not buffer else buffer

        group.count_collective()
        work = dist.all_reduce(message, group=group.channel, async_op=True)
        state.sent()
        mean: torch.futures.Future[Tensor] = work.get_future().then(copy_back)
        return mean

    def compressed_mean(state: PowerSGD, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        add_accumulated(bucket)
        return state.all_reduce(bucket)

    if config.compression == "powersgd":
        clock.compressor = PowerSGD(config.powersgd_rank, functools.partial(_average, group, clock))
        parallel.register_comm_hook(clock.compressor, compressed_mean)
    else:
        parallel.register_comm_hook(clock, reduce_mean)
    return parallel, clock


def _average(group: Group, clock: GradientClock, flat: Tensor) -> None:
    clock.started()
    clock.sent()
    group.count_collective()
    dist.all_reduce(flat, group=group.channel)
    flat /= group.world_size
    clock.finished()


def prime_ddp_buckets(
    model: nn.Module, clock: GradientClock, images: Tensor, forward: AbstractContextManager[object]
) -> None:
    """Makes DistributedDataParallel form its buckets before the first step; does nothing to any other model.

    DistributedDataParallel rebuilds its buckets once, after a first backward pass with a single bucket. The position of
    a gradient in its bucket decides in which order the contributions of three or more ranks are added, and so the last
    bits: a resumed run must start with the buckets that the uninterrupted run has.

    Args:
        model: as :func:`data_parallel` returned it. Its buffers are unchanged afterwards, its gradients are not.
        clock: as :func:`data_parallel` returned it.
        images: gives shape and type of a micro-batch, N x 3 x S x S.
        forward: the context of a forward pass, such as autocast.
    """
    if not isinstance(model, DistributedDataParallel):
        return
    before = [buffer.clone() for buffer in model.buffers()]
    black = torch.zeros(images.shape, dtype=images.dtype).contiguous(memory_format=torch.channels_last)
    with forward:
        outputs = model(black)
    outputs.float().sum().backward()
    clock.pop_step()
    if clock.compressor:
        clock.compressor.reset()
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)
