"""Time of an all-reduce: the alpha-beta-gamma model of the algorithms that oneCCL and MPI have.

Time is counted along the slowest rank: alpha seconds for each message it waits for, beta for each byte it sends, gamma
for each byte it adds up. Sources: Thakur, Rabenseifner, Gropp 2005, "Optimization of Collective Communication
Operations in MPICH" (ring, recursive doubling, halving-doubling after Rabenseifner); Goyal et al. 2017, section 4
(2 (p-1)/p bytes a server, 2 log2 p steps of halving-doubling, 2 (p-1) of the ring). Which algorithm oneCCL takes
is read from its own table (src/coll/selection/selector_allreduce.cpp in oneapi-src/oneCCL).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

from knltrain.errors import ConfigError


class Fabric(NamedTuple):
    """The network between ranks.

    Attributes:
        nodes: nodes of the job.
        ranks_per_node: equal on all.
        latency_s: of a message to another node: wire, switches and software.
        link_bytes_per_s: of a node's link, each way; its ranks share it.
        shared_latency_s: of a message to a rank of the same node.
        shared_bytes_per_s: of a copy through a node's memory to a rank of the same node, for each rank.
        sum_bytes_per_s: how many received bytes a rank adds up in a second.
        call_s: what a call takes before and after its messages, by itself.
    """

    nodes: int
    ranks_per_node: int
    latency_s: float
    link_bytes_per_s: float
    shared_latency_s: float = 1e-6
    shared_bytes_per_s: float = math.inf
    sum_bytes_per_s: float = math.inf
    call_s: float = 0.0

    @property
    def ranks(self) -> int:
        """Ranks on all nodes."""
        return self.nodes * self.ranks_per_node


class Cost(NamedTuple):
    """What an all-reduce costs each rank.

    Attributes:
        seconds: from the last rank's arrival to the result.
        bytes_sent: by each rank.
        messages: sent by each rank.
    """

    seconds: float
    bytes_sent: float
    messages: int


def _hop(fabric: Fabric, num_bytes: float, *, apart: int, sharing: int) -> float:
    """Seconds of a message to the rank ``apart`` ranks away while ``sharing`` ranks of the node use its link."""
    if fabric.nodes == 1 or apart < fabric.ranks_per_node:
        return fabric.shared_latency_s + num_bytes / fabric.shared_bytes_per_s
    return fabric.latency_s + num_bytes * sharing / fabric.link_bytes_per_s


def ring(fabric: Fabric, num_bytes: float) -> Cost:
    """Reduce-scatter and all-gather around a ring: 2 (p-1) messages of 1/p of the bytes.

    Neighbours are on one node but for the last rank of each, so only one message at a time is on a link.
    """
    ranks = fabric.ranks
    part = num_bytes / ranks
    hops = [_hop(fabric, part, apart=fabric.ranks_per_node, sharing=1)]
    if fabric.ranks_per_node > 1:
        hops.append(_hop(fabric, part, apart=1, sharing=1))
    seconds = (ranks - 1) * (2 * max(hops) + part / fabric.sum_bytes_per_s)
    return Cost(seconds, 2 * (ranks - 1) * part, 2 * (ranks - 1))


def direct(fabric: Fabric, num_bytes: float) -> Cost:
    """Reduce-scatter and all-gather with every rank writing to every other: what oneCCL calls nreduce."""
    ranks, local = fabric.ranks, fabric.ranks_per_node
    part = num_bytes / ranks
    near = (local - 1) * _hop(fabric, part, apart=0, sharing=1)
    far = (ranks - local) * (fabric.latency_s + part * local / fabric.link_bytes_per_s) if fabric.nodes > 1 else 0.0
    seconds = 2 * (near + far) + (ranks - 1) * part / fabric.sum_bytes_per_s
    return Cost(seconds, 2 * (ranks - 1) * part, 2 * (ranks - 1))


class _Exchange(NamedTuple):
    """A round of a doubling algorithm, in which ranks exchange data in pairs.

    Attributes:
        crossing: the most ranks of a node whose partner is on another one; they share its link.
        inside: whether the partners of some pair are on one node.
    """

    crossing: int
    inside: bool

    def seconds(self, fabric: Fabric, num_bytes: float) -> float:
        """Seconds until the slowest pair has exchanged so many bytes."""
        far = _hop(fabric, num_bytes, apart=fabric.ranks_per_node, sharing=self.crossing) if self.crossing else 0.0
        near = _hop(fabric, num_bytes, apart=0, sharing=1) if self.inside else 0.0
        return max(far, near)


@functools.lru_cache(maxsize=256)
def _exchanges(nodes: int, local: int) -> tuple[_Exchange, ...]:
    """Returns the rounds of a power of two of ranks, at distance 1, 2, 4, ...; the node has ``local`` ranks in a row.

    Of the ranks beyond the largest power of two, each sends its data to the next one and takes no part: of the first
    ``2 * rest`` ranks only the odd ones do. The ranks of a node that take part have consecutive numbers.
    """
    ranks = nodes * local
    power = 1 << (ranks.bit_length() - 1)
    rest = ranks - power

    def first(node: int) -> int:
        rank = node * local
        return rank // 2 if rank <= 2 * rest else rank - rest

    # What a node's pairs are repeats itself: with the distance, and none is as far apart as a node has ranks.
    fold = 2 * rest // local
    sample = sorted({*range(min(nodes, 4 * local)), *range(fold, min(nodes, fold + 1 + 2 * local)), nodes - 1})
    blocks = [(first(node), first(node + 1)) for node in sample]
    rounds = []
    for apart in (1 << step for step in range(power.bit_length() - 1)):
        inside = [_paired_inside(start, stop, apart) for start, stop in blocks]
        crossing = max(stop - start - paired for (start, stop), paired in zip(blocks, inside, strict=True))
        rounds.append(_Exchange(crossing, any(inside)))
    return tuple(rounds)


def _paired_inside(start: int, stop: int, apart: int) -> int:
    """Returns how many of the numbers from start to stop have their partner, ``number ^ apart``, among them."""

    def lower_partners(end: int) -> int:  # below end, numbers whose partner is the higher one
        return end // (2 * apart) * apart + min(end % (2 * apart), apart)

    return 2 * (lower_partners(max(start, stop - apart)) - lower_partners(start))


def _folded(fabric: Fabric, num_bytes: float, cost: Cost) -> Cost:
    """Cost of an algorithm for powers of two; ranks beyond the largest power go through a partner before and after."""
    rest = fabric.ranks - (1 << (fabric.ranks.bit_length() - 1))
    if not rest:
        return cost
    local = fabric.ranks_per_node
    # Partners are neighbours: the last rank of a node with an odd number of them has its own on the next node.
    fold = _Exchange(crossing=int(local % 2 == 1 and local < 2 * rest), inside=local > 1)
    return Cost(cost.seconds + 2 * fold.seconds(fabric, num_bytes) + num_bytes / fabric.sum_bytes_per_s,
                cost.bytes_sent + num_bytes, cost.messages + 1)  # fmt: skip


def halving_doubling(fabric: Fabric, num_bytes: float) -> Cost:
    """Recursive halving to reduce, recursive doubling to gather (Rabenseifner): 2 log2 p messages of falling size."""
    seconds, sent, messages, part = 0.0, 0.0, 0, num_bytes
    for exchange in _exchanges(fabric.nodes, fabric.ranks_per_node):
        part /= 2
        seconds += 2 * exchange.seconds(fabric, part) + part / fabric.sum_bytes_per_s
        sent, messages = sent + 2 * part, messages + 2
    return _folded(fabric, num_bytes, Cost(seconds, sent, messages))


def recursive_doubling(fabric: Fabric, num_bytes: float) -> Cost:
    """All bytes in each of log2 p exchanges: the fewest messages, for few bytes."""
    exchanges = _exchanges(fabric.nodes, fabric.ranks_per_node)
    rounds = len(exchanges)
    seconds = sum(exchange.seconds(fabric, num_bytes) for exchange in exchanges)
    cost = Cost(seconds + rounds * num_bytes / fabric.sum_bytes_per_s, rounds * num_bytes, rounds)
    return _folded(fabric, num_bytes, cost)


def two_level(fabric: Fabric, num_bytes: float) -> Cost:
    """Reduce-scatter in the node's memory, all-reduce of each part between nodes, all-gather in the node's memory."""
    local = fabric.ranks_per_node
    if fabric.nodes == 1 or local == 1:
        return min(ring(fabric, num_bytes), halving_doubling(fabric, num_bytes))
    inside = fabric._replace(nodes=1)
    part = num_bytes / local
    near = ring(inside, num_bytes)
    # Ranks with the same local rank exchange each part; all parts share the nodes' links.
    between = fabric._replace(ranks_per_node=1, link_bytes_per_s=fabric.link_bytes_per_s / local)
    far = min(ring(between, part), halving_doubling(between, part))
    return Cost(near.seconds + far.seconds, near.bytes_sent + far.bytes_sent, near.messages + far.messages)


# Limits of oneCCL's selection table.
_MAX_RECURSIVE_DOUBLING_ELEMENTS, _MAX_DIRECT_ELEMENTS = 8192, 2**20

_ALGORITHMS: dict[str, Callable[[Fabric, float], Cost]] = {
    "ring": ring,
    "direct": direct,
    "halving-doubling": halving_doubling,
    "recursive-doubling": recursive_doubling,
    "two-level": two_level,
}
# oneccl: what oneCCL's table has for its own transport (ofi). mpi: the fastest, as an MPI that was tuned takes it, to
# which oneCCL leaves the choice with CCL_ATL_TRANSPORT=mpi.
ALGORITHMS = ("oneccl", "mpi", *_ALGORITHMS)


def all_reduce(fabric: Fabric, elements: int, itemsize: int, algorithm: str = "oneccl") -> Cost:
    """Returns what the sum of ``elements`` numbers over all ranks costs.

    Args:
        fabric: ranks, and what is between them.
        elements: numbers of each rank.
        itemsize: bytes of each on the wire.
        algorithm: one of ``ALGORITHMS``.

    Raises:
        ConfigError: no such algorithm.
    """
    if fabric.ranks == 1:
        return Cost(0.0, 0.0, 0)
    num_bytes = float(elements * itemsize)
    if algorithm == "oneccl":
        algorithm = (
            "recursive-doubling" if elements <= _MAX_RECURSIVE_DOUBLING_ELEMENTS
            else "direct" if elements <= _MAX_DIRECT_ELEMENTS
            else "ring"
        )  # fmt: skip
    if algorithm == "mpi":
        cost = min(function(fabric, num_bytes) for function in _ALGORITHMS.values())
    elif algorithm in _ALGORITHMS:
        cost = _ALGORITHMS[algorithm](fabric, num_bytes)
    else:
        raise ConfigError(f"algorithm {algorithm!r}: there are {', '.join(ALGORITHMS)}")
    # However ranks are placed, a node's link carries this much each way (Goyal et al.).
    least_s = 2 * (fabric.nodes - 1) / fabric.nodes * num_bytes / fabric.link_bytes_per_s
    return cost._replace(seconds=max(cost.seconds, least_s) + fabric.call_s)
