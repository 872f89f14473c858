"""One training step as a timeline: forward, backward, buckets on their way while it runs, optimizer.

It is the slowest rank's: every sum over the ranks waits for it. ::

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

_FAIR_SHARE = 0.5  # of a core, for a communicating thread that shares it with one that computes
EARLIER = "earlier micro-batches"  # the span of all but the last
_SYNC_ELEMENTS = 2  # the sum of losses, and of ranks that were asked to stop


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
        on_wire_s: how long gradients are on their way, hidden or not.
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
class _Flight:
    """A bucket on its way.

    Attributes:
        left_s: what is left of it while nobody computes.
        longer: how many times longer it takes while somebody computes.
        stolen: of the rank's computing speed, while it lasts.
        start: when it leaves.
        end: when it has arrived.
    """

    left_s: float
    longer: float
    stolen: float
    start: float = 0.0
    end: float = 0.0


class _Clock:
    """Time of a rank that computes while buckets are on the wire, one after the other."""

    def __init__(self) -> None:
        self.now = 0.0
        self.flights: list[_Flight] = []
        self._arrived = 0

    def compute(self, seconds: float) -> None:
        """Passes the time that so much computing takes, with what communication leaves of the cores."""
        while self._arrived < len(self.flights):
            flight = self.flights[self._arrived]
            speed = 1 - flight.stolen
            lasts = flight.left_s * flight.longer
            if speed * lasts > seconds:
                passed = seconds / speed
                flight.left_s -= passed / flight.longer
                self.now += passed
                return
            seconds -= speed * lasts
            self._arrive(lasts)
        self.now += seconds

    def send(self, seconds: float, longer: float, stolen: float) -> None:
        """Puts a bucket behind those that are on the wire."""
        self.flights.append(_Flight(seconds, longer, stolen, start=self.now))

    def wait(self) -> None:
        """Passes the time until all have arrived."""
        while self._arrived < len(self.flights):
            self._arrive(self.flights[self._arrived].left_s)

    def _arrive(self, lasts: float) -> None:
        self.now += lasts
        self.flights[self._arrived].end = self.now
        self._arrived += 1
        if self._arrived < len(self.flights):
            self.flights[self._arrived].start = self.now


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
        bucket_mb: MiB of gradients, in their own type, that travel together.
        optimizer_s: of the update.
        accumulate: micro-batches of a step; gradients travel during the last one's backward pass.
        slowest: how many times longer the slowest rank computes than an average one.
        input_s: what images take of a step.
        memory_bytes_per_s: of a rank, for the passes that divide, convert and copy back a bucket.
        thread_bytes_per_s: where no core is kept for communication, the bytes that the communicating thread handles
            in a second of computing time, which it takes from the ``threads`` that compute, of one at most the half
            that a fair scheduler gives it; None: it takes none.
        threads: compute threads of a rank.
        overlap: buckets leave as soon as they are full; else when the backward pass is over.
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
        # In their order: a bucket does not leave before the one in front of it, though it be full.
        while nth < len(waiting) and all(layer_of[gradient] <= done for gradient in waiting[nth]):
            members = [gradients[gradient] for gradient in waiting[nth]]
            elements = sum(gradient.elements for gradient in members)
            itemsize = members[0].itemsize
            converted = (itemsize != wire_itemsize) * (itemsize + wire_itemsize)
            computed("packing", (2 * itemsize + converted) * elements / memory_bytes_per_s)
            unpack_s = converted * elements / memory_bytes_per_s
            cost = all_reduce(fabric, elements, wire_itemsize, algorithm)
            busy_s = 2 * cost.bytes_sent / thread_bytes_per_s if thread_bytes_per_s else 0.0
            beside_s = max(cost.seconds, busy_s / _FAIR_SHARE)
            shared = busy_s / beside_s / threads if busy_s else 0.0
            clock.send(cost.seconds, beside_s / cost.seconds if cost.seconds else 1.0, shared)
            sizes.append(float(elements * wire_itemsize))
            sent, messages, nth = sent + cost.bytes_sent, messages + cost.messages, nth + 1
    backward_end = clock.now
    clock.wait()
    if clock.flights:
        clock.now = max(backward_end, clock.flights[-1].end + unpack_s)
    spans += [Span("network", f"bucket {nth}", flight.start, flight.end) for nth, flight in enumerate(clock.flights)]
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
        on_wire_s=sum(flight.end - flight.start for flight in clock.flights),
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
