"""Gradients over the ranks: buckets that travel while the backward pass still runs."""

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
    """What a step's gradients took on their way, in seconds; 0 where nothing travelled.

    Attributes:
        on_wire: from the first bucket's leaving to the last one's return.
        exposed: of that, what was left when the last bucket was under way, and so the backward pass computed.
    """

    on_wire: float
    exposed: float


class GradientClock:
    """How long gradients were on the wire, and how much of it the backward pass did not hide.

    Attributes:
        compressor: what approximates them on their way, if anything does.
    """

    def __init__(self) -> None:
        self.compressor: PowerSGD | None = None
        self._first = self._sent = self._last = 0.0

    def started(self) -> None:
        """A bucket leaves."""
        if not self._first:
            self._first = time.perf_counter()

    def sent(self) -> None:
        """A bucket is under way; the backward pass goes on, or this was its last."""
        self._sent = time.perf_counter()

    def finished(self) -> None:
        """A bucket is back."""
        self._last = time.perf_counter()

    def pop_step(self) -> CommTiming:
        """Returns the times of the step that has ended, and begins with the next."""
        travel = CommTiming(max(0.0, self._last - self._first), max(0.0, self._last - self._sent))
        self._first = self._sent = self._last = 0.0
        return travel


def data_parallel(
    model: nn.Module,
    config: CommConfig,
    group: Group,
    carried: dict[Tensor, Tensor],
    look: Callable[[Tensor], None] | None = None,
) -> tuple[nn.Module, GradientClock]:
    """Wraps a model so that its gradients are the mean over the ranks; alone, returns the model itself.

    Args:
        model: with equal weights on every rank, or rank 0's are taken.
        config: bucket size, and the type in which gradients travel.
        group: the ranks.
        carried: by parameter, float32 sums of the gradients of a step's earlier micro-batches; they join the last
            one's before it travels.
        look: sees each bucket of this rank's own gradients before they are averaged; not with PowerSGD.
    """
    clock = GradientClock()
    if group.world_size == 1:
        return model, clock
    # Running statistics stay each rank's own, see statistics.py.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer PyTorch renames broadcast_buffers
        parallel = DistributedDataParallel(
            model, bucket_cap_mb=config.bucket_mb_of(group.world_size), broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )  # fmt: skip
    wire = torch.bfloat16 if config.dtype == "bf16" else torch.float32

    def add_carried(bucket: GradBucket) -> None:
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            if parameter in carried:
                gradient.copy_(carried.pop(parameter).add_(gradient))

    def reduce_mean(state: GradientClock, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        buffer = bucket.buffer()
        add_carried(bucket)
        if look:
            look(buffer)
        sent = buffer.div_(group.world_size).to(wire)
        state.started()

        def arrived(future: torch.futures.Future[list[Tensor]]) -> Tensor:
            state.finished()
            (received,) = future.value()
            return buffer.copy_(received) if received is not buffer else buffer

        work = dist.all_reduce(sent, group=group.channel, async_op=True)
        state.sent()
        mean: torch.futures.Future[Tensor] = work.get_future().then(arrived)
        return mean

    def compressed_mean(state: PowerSGD, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        add_carried(bucket)
        return state.take(bucket)

    if config.compression == "powersgd":
        clock.compressor = PowerSGD(config.powersgd_rank, functools.partial(_average, group, clock))
        parallel.register_comm_hook(clock.compressor, compressed_mean)
    else:
        parallel.register_comm_hook(clock, reduce_mean)
    return parallel, clock


def _average(group: Group, clock: GradientClock, flat: Tensor) -> None:
    clock.started()
    clock.sent()
    dist.all_reduce(flat, group=group.channel)
    flat /= group.world_size
    clock.finished()


def prime_ddp_buckets(
    model: nn.Module, clock: GradientClock, images: Tensor, forward: AbstractContextManager[object]
) -> None:
    """Has DistributedDataParallel form its buckets before the first step; does nothing to any other model.

    It forms them as gradients arrive in its first backward pass, which goes through a single one. A gradient's place in
    its bucket decides in which order three or more ranks' parts are added up, and so the last bits: a run that was
    stopped must begin with the buckets that it would have had.

    Args:
        model: as :func:`data_parallel` returned it; its buffers are left as they are, gradients are not.
        clock: with it.
        images: shape and type of a micro-batch.
        forward: the context of a forward pass.
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
        clock.compressor.forget()
    with torch.no_grad():
        for buffer, value in zip(model.buffers(), before, strict=True):
            buffer.copy_(value)
