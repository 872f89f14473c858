"""Timeline of one training step: forward, backward with buckets on the wire, optimizer.

It is the slowest rank's, for which every all-reduce waits. ::

    images | forward | backward, layer by layer ............ | wait | loss | optimizer
                                      bucket ready -> bucket -> bucket --->|
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from knltrain.predict.allreduce import Fabric, all_reduce
from knltrain.predict.layers import LayerTime, buckets

# A communication thread gets at most this part of a core on which a thread computes.
_MAX_COMM_CORE_SHARE = 0.5
EARLIER = "earlier micro-batches"  # the span of all but the last
_SYNC_ELEMENTS = 2  # the all-reduce of losses and stop requests


class Span(NamedTuple):
    """A part of a step, in seconds from its beginning.

    Attributes:
        lane: input, compute, network or optimizer.
        name: what it is.
        start: when it begins.
        end: when it ends.
    """

    lane: str
    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Step:
    """Where the time of a step goes; the parts add up to ``seconds``.

    Attributes:
        seconds: of the whole step.
        input_s: reading and decoding images.
        forward_s: of all micro-batches, at an average rank's speed.
        backward_s: the same.
        straggler_s: how much longer the slowest rank computes than an average one.
        exposed_s: communication that the backward pass does not hide, and what it takes from computing.
        optimizer_s: the update.
        on_wire_s: communication of gradients, hidden or not.
        bytes_sent: by each rank.
        messages: sent by each rank.
        sizes: bytes of each bucket on the wire, in order.
        spans: the picture.
    """

    seconds: float
    input_s: float
    forward_s: float
    backward_s: float
    straggler_s: float
    exposed_s: float
    optimizer_s: float
    on_wire_s: float
    bytes_sent: float
    messages: int
    sizes: tuple[float, ...]
    spans: tuple[Span, ...]


@dataclass
class _Transfer:
    """The all-reduce of a bucket.

    Attributes:
        left_s: remaining time if nothing computes.
        stretch: factor on its time while the rank computes.
        slowdown: part of the rank's computing speed that it takes meanwhile.
        start: when it begins.
        end: when it has ended.
    """

    left_s: float
    stretch: float
    slowdown: float
    start: float = 0.0
    end: float = 0.0


class _Clock:
    """Time of a rank that computes while buckets are on the wire, one after the other."""

    def __init__(self) -> None:
        self.now = 0.0
        self.transfers: list[_Transfer] = []
        self._arrived = 0

    def compute(self, seconds: float) -> None:
        """Advances by so much computing, slowed down by communication on the same cores."""
        while self._arrived < len(self.transfers):
            transfer = self.transfers[self._arrived]
            speed = 1 - transfer.slowdown
            duration = transfer.left_s * transfer.stretch
            if speed * duration > seconds:
                passed = seconds / speed
                transfer.left_s -= passed / transfer.stretch
                self.now += passed
                return
            seconds -= speed * duration
            self._arrive(duration)
        self.now += seconds

    def send(self, seconds: float, stretch: float, slowdown: float) -> None:
        """Queues a bucket behind those on the wire."""
        self.transfers.append(_Transfer(seconds, stretch, slowdown, start=self.now))

    def wait(self) -> None:
        """Advances until all buckets have arrived."""
        while self._arrived < len(self.transfers):
            self._arrive(self.transfers[self._arrived].left_s)

    def _arrive(self, duration: float) -> None:
        self.now += duration
        self.transfers[self._arrived].end = self.now
        self._arrived += 1
        if self._arrived < len(self.transfers):
            self.transfers[self._arrived].start = self.now


def simulate(
    times: Sequence[LayerTime],
    *,
    fabric: Fabric,
    algorithm: str,
    wire_itemsize: int,
    bucket_mb: float,
    optimizer_s: float = 0.0,
    accumulate: int = 1,
    slowest: float = 1.0,
    input_s: float = 0.0,
    memory_bytes_per_s: float = float("inf"),
    thread_bytes_per_s: float | None = None,
    threads: int = 1,
    overlap: bool = True,
) -> Step:
    """Simulates a step of data-parallel training as ``knltrain train`` does it.

    Args:
        times: what a rank needs for each layer and micro-batch, in the order of the forward pass.
        fabric: the ranks, and what is between them.
        algorithm: of the all-reduce, see :data:`knltrain.predict.allreduce.ALGORITHMS`.
        wire_itemsize: bytes of a gradient's number on the wire.
        bucket_mb: MiB of gradients, in their own type, of a bucket.
        optimizer_s: of the update.
        accumulate: micro-batches of a step; gradients are sent during the backward pass of the last.
        slowest: how many times longer the slowest rank computes than an average one.
        input_s: what images take of a step.
        memory_bytes_per_s: of a rank, for the passes that divide, convert and copy back a bucket.
        thread_bytes_per_s: where no core is kept for communication, the bytes that the communicating thread handles
            in a second of computing time, which it takes from the ``threads`` that compute, of one at most the half
            that a fair scheduler gives it; None: it takes none.
        threads: compute threads of a rank.
        overlap: buckets are sent as soon as they are full; otherwise after the backward pass.
    """
    forward_s = accumulate * sum(time.forward_s for time in times)
    backward_s = accumulate * sum(time.backward_s for time in times)
    computing = forward_s + backward_s
    clock = _Clock()
    spans = [Span("input", "images", 0.0, input_s)] if input_s else []
    clock.now = input_s

    def computed(name: str, seconds: float) -> None:
        start = clock.now
        clock.compute(seconds)
        if clock.now > start:
            spans.append(Span("compute", name, start, clock.now))

    computed(EARLIER, (accumulate - 1) * slowest * computing / accumulate)
    computed("forward", slowest * sum(time.forward_s for time in times))

    backward = list(reversed(times))
    gradients = [gradient for time in backward for gradient in time.gradients]
    layer_of = [index for index, time in enumerate(backward) for _ in time.gradients]
    waiting = buckets(gradients, bucket_mb) if fabric.ranks > 1 else []
    sizes, sent, messages, unpack_s, nth = [], 0.0, 0, 0.0, 0
    for index, time in enumerate(backward):
        computed(f"backward {time.name}", slowest * time.backward_s)
        done = index if overlap or index == len(backward) - 1 else -1
        # Buckets are sent in their order: a full one waits for the one before it.
        while nth < len(waiting) and all(layer_of[gradient] <= done for gradient in waiting[nth]):
            members = [gradients[gradient] for gradient in waiting[nth]]
            elements = sum(gradient.elements for gradient in members)
            itemsize = members[0].itemsize
            converted = (itemsize != wire_itemsize) * (itemsize + wire_itemsize)
            computed("packing", (2 * itemsize + converted) * elements / memory_bytes_per_s)
            unpack_s = converted * elements / memory_bytes_per_s
            cost = all_reduce(fabric, elements, wire_itemsize, algorithm)
            busy_s = 2 * cost.bytes_sent / thread_bytes_per_s if thread_bytes_per_s else 0.0
            beside_s = max(cost.seconds, busy_s / _MAX_COMM_CORE_SHARE)
            shared = busy_s / beside_s / threads if busy_s else 0.0
            clock.send(cost.seconds, beside_s / cost.seconds if cost.seconds else 1.0, shared)
            sizes.append(float(elements * wire_itemsize))
            sent, messages, nth = sent + cost.bytes_sent, messages + cost.messages, nth + 1
    backward_end = clock.now
    clock.wait()
    if clock.transfers:
        clock.now = max(backward_end, clock.transfers[-1].end + unpack_s)
    spans += [
        Span("network", f"bucket {nth}", transfer.start, transfer.end) for nth, transfer in enumerate(clock.transfers)
    ]
    if clock.now > backward_end:
        spans.append(Span("compute", "waiting for gradients", backward_end, clock.now))
    clock.now += all_reduce(fabric, _SYNC_ELEMENTS, 8, algorithm).seconds
    straggler_s = (slowest - 1) * computing
    exposed_s = clock.now - input_s - computing - straggler_s
    spans.append(Span("optimizer", "optimizer", clock.now, clock.now + optimizer_s))
    return Step(
        seconds=clock.now + optimizer_s,
        input_s=input_s,
        forward_s=forward_s,
        backward_s=backward_s,
        straggler_s=straggler_s,
        exposed_s=max(0.0, exposed_s),
        optimizer_s=optimizer_s,
        on_wire_s=sum(transfer.end - transfer.start for transfer in clock.transfers),
        bytes_sent=sent,
        messages=messages,
        sizes=tuple(sizes),
        spans=tuple(spans),
    )


def expected_maximum(ranks: int) -> float:
    """Expected maximum of so many independent standard normal variables (Blom 1958): 0 of one, 3.0 of 512."""
    if ranks < 2:
        return 0.0
    return statistics.NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))
