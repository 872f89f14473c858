"""Placement of ranks on a node: cores, hardware threads and memory of each rank.

The rules, in order; ``knltrain plan`` draws the result:

1. One rank per NUMA domain with cores, unless asked otherwise. Ranks that divide by domains (or domains by ranks) get
   whole domains or equal parts of one; for other numbers, the list of all cores is split into equal parts, with cores
   that share a cache side by side. More ranks than cores share cores.
2. With several ranks, each reserves some cores for the workers of the communication library, none if it has fewer than
   8. One in 16 rounded, 1 to 4, matches the recommendation for Caffe on these processors: 4 of a Xeon Phi's 68 cores, 2
   of a Xeon's 28 (https://github.com/intel/caffe/issues/218). All ranks reserve as many as the smallest rank, since the
   library has one setting for all.
3. One compute thread on each of the other cores. If ``OMP_NUM_THREADS`` or the control group's CPU quota allows fewer,
   threads are not pinned to some of the cores: a plan does not know which ones another run or container uses, and two
   runs with the same plan would choose the same.
4. Decoders run on the second hardware thread of each compute core. If cores have only one, or it is in use, decoders
   share all compute cores: on fewer, they would limit the run.
5. Memory is allocated by first touch, in the rank's own domain, since its threads are there. It is not bound: a rank
   that needs more than its domain has gets memory of other domains instead of being killed. MCDRAM or HBM in flat mode
   is preferred for compute threads, until it is full, if a rank's part of it is 2 GiB or more.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

from knltrain.errors import ConfigError
from knltrain.node.cpulist import format_cpu_list
from knltrain.node.topology import Cores, Node

_MIN_CORES_FOR_COMM = 8
_CORES_PER_COMM = 16
_MAX_COMM_CORES = 4
# Less has room for weights and momentum, but not for the activations of a useful batch.
_MIN_FAST_MEMORY_MB = 2048


@dataclass(frozen=True)
class MemoryPolicy:
    """Memory policy of a rank's compute threads.

    Attributes:
        mode: local (first touch) or prefer (``nodes``, until they are full).
        nodes: the kernel's node numbers of MCDRAM or HBM.
        reason: the reason, for people.
    """

    mode: Literal["local", "prefer"]
    nodes: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class RankPlan:
    """One rank's part of the node.

    Attributes:
        local_rank: rank on this node.
        domains: the NUMA domains of its cores.
        cores: number of cores.
        threads: number of compute threads.
        compute: logical CPUs of compute threads; at most one thread each, not pinned if there are more CPUs.
        comm: logical CPUs of the communication library's workers.
        decode: logical CPUs of the decoders.
        memory: memory policy.
    """

    local_rank: int
    domains: tuple[int, ...]
    cores: int
    threads: int
    compute: tuple[int, ...]
    comm: tuple[int, ...]
    decode: tuple[int, ...]
    memory: MemoryPolicy

    @property
    def cpus(self) -> frozenset[int]:
        """All logical CPUs that the rank uses."""
        return frozenset((*self.compute, *self.comm, *self.decode))

    @property
    def num_unpinned_cpus(self) -> int:
        """Number of compute CPUs without a thread; the scheduler decides which."""
        return max(0, len(self.compute) - self.threads)

    @property
    def num_spare_cpus(self) -> int:
        """Number of CPUs that other processes may use without delaying a thread of this rank."""
        return self.num_unpinned_cpus * len({*self.compute, *self.decode}) // len(self.compute)


@dataclass(frozen=True)
class Plan:
    """Placement of all ranks of a node.

    Attributes:
        ranks: the plan of each rank, by local rank.
        idle: cores that no rank uses.
        notes: for the user, one sentence each.
        origin: how the numbers of ranks and threads were chosen, for people.
    """

    ranks: tuple[RankPlan, ...]
    idle: Cores
    notes: tuple[str, ...]
    origin: str = ""


def asked_threads(environ: Mapping[str, str]) -> int | None:
    """Returns ``OMP_NUM_THREADS``, or None if the plan decides.

    The 1 that torchrun sets by default is ignored: the user did not choose it, and it makes CPU training slow.

    Raises:
        ConfigError: it is not a positive number.
    """
    asked = environ.get("OMP_NUM_THREADS", "")
    by_torchrun = bool(environ.get("TORCHELASTIC_RUN_ID")) and asked == "1"
    if not asked or by_torchrun:
        return None
    # OpenMP allows one number per nesting level; the first is the outermost.
    first = asked.split(",")[0].strip()
    if not first.isdecimal() or int(first) < 1:
        raise ConfigError(f"OMP_NUM_THREADS={asked} is not a positive number; unset it or correct it")
    return int(first)


def threads_per_rank(node: Node, local_size: int, environ: Mapping[str, str] | None = None) -> int:
    """Returns the number of compute threads of one of several equal ranks that reserve no cores for communication.

    ``OMP_NUM_THREADS`` takes precedence. A rank that its launcher did not pin has an equal share of the cores, and no
    more threads than the control group's CPU quota allows.

    Args:
        node: the part of the node that this process may use.
        local_size: ranks on this node.
        environ: the environment, by default this process's.

    Raises:
        ConfigError: ``OMP_NUM_THREADS`` is not a positive number.
    """
    asked = asked_threads(os.environ if environ is None else environ)
    if asked:
        return asked
    pinned = len(node.cpus) * local_size <= len(node.group_cpus)
    share = max(1, len(node.cores) if pinned else len(node.cores) // local_size)
    return min(share, _threads_within_quota(node, local_size) or share)


def comm_cores(cores: int, world_size: int) -> int:
    """Returns the number of a rank's cores reserved for the communication library's workers."""
    if world_size == 1 or cores < _MIN_CORES_FOR_COMM:
        return 0
    return min(max(round(cores / _CORES_PER_COMM), 1), _MAX_COMM_CORES)


def plan_node(
    node: Node,
    ranks_per_node: int | None = None,
    *,
    world_size: int | None = None,
    environ: Mapping[str, str] | None = None,
) -> Plan:
    """Places ranks on a node.

    Args:
        node: the part of the node that the ranks share.
        ranks_per_node: by default one per NUMA domain with cores.
        world_size: ranks on all nodes, by default on this one; a single rank reserves no cores for communication.
        environ: the environment, by default this process's; its ``OMP_NUM_THREADS`` takes precedence.

    Raises:
        ConfigError: fewer than one rank, or ``OMP_NUM_THREADS`` is not a positive number.
    """
    asked = asked_threads(os.environ if environ is None else environ)
    count = len(node.domains) if ranks_per_node is None else ranks_per_node
    if count < 1:
        raise ConfigError(f"{count} ranks per node: give 1 or more")
    shares = _cores_by_rank(node, count)
    allowed = _threads_within_quota(node, count)
    smallest = min(len(cores) for cores in shares)
    comm = comm_cores(min(smallest, allowed or smallest), world_size or count)
    if asked:
        comm = min(comm, max(0, smallest - asked))
    home = {core: domain.number for domain in node.domains for core in domain.cores}
    on = [tuple(sorted({home[core] for core in cores})) for cores in shares]
    ranks = tuple(
        _rank(
            local_rank,
            cores,
            on[local_rank],
            comm=comm,
            threads=asked or max(1, min(len(cores), allowed or len(cores)) - comm),
            memory=_memory(node, on, local_rank),
        )
        for local_rank, cores in enumerate(shares)
    )
    busy = frozenset[int]().union(*(rank.cpus for rank in ranks))
    idle = tuple(core for core in node.cores if not busy & set(core))
    origin = "one rank per NUMA domain by rule" if ranks_per_node is None else "number of ranks asked for"
    origin += "; threads as OMP_NUM_THREADS says" if asked else "; threads by rule"
    return Plan(ranks, idle, tuple(_notes(node, ranks, allowed=allowed, asked=asked)), origin)


def _cores_by_rank(node: Node, count: int) -> list[Cores]:
    """Returns the cores of each rank."""
    domains = [domain.cores for domain in node.domains]
    if count > len(node.cores):
        row = [core for cores in domains for core in cores]
        return [(row[rank * len(row) // count],) for rank in range(count)]
    if count % len(domains) == 0 and all(count // len(domains) <= len(cores) for cores in domains):
        return [part for cores in domains for part in _split_evenly(cores, count // len(domains))]
    if len(domains) % count == 0:
        size = len(domains) // count
        return [sum(domains[first : first + size], ()) for first in range(0, len(domains), size)]
    return _split_evenly(sum(domains, ()), count)


def _split_evenly(cores: Cores, count: int) -> list[Cores]:
    """Splits cores into consecutive parts; the first have one more if they cannot be equal."""
    sizes = [len(cores) // count + (part < len(cores) % count) for part in range(count)]
    return [cores[first:stop] for first, stop in pairwise(accumulate(sizes, initial=0))]


def _threads_within_quota(node: Node, count: int) -> int | None:
    """Returns how many threads of a rank the CPU quota allows to run; None if it allows all cores."""
    if node.cpu_quota is None or node.cpu_quota >= len(node.cores):
        return None
    return max(1, int(node.cpu_quota) // count)


def _rank(
    local_rank: int, cores: Cores, domains: tuple[int, ...], *, comm: int, threads: int, memory: MemoryPolicy
) -> RankPlan:
    computing, communicating = cores[: len(cores) - comm], cores[len(cores) - comm :]
    deepest = max(len(core) for core in computing)
    # First hardware threads of all cores, then second ones: the order in which more threads than cores use them.
    slots = [core[depth] for depth in range(deepest) for core in computing if depth < len(core)]
    compute = tuple(slots[: max(threads, len(computing))])
    siblings = [core[1] for core in computing if len(core) > 1 and core[1] not in compute]
    alone = len(siblings) == len(computing)
    decode = tuple(siblings) if alone else (*compute, *siblings)
    return RankPlan(
        local_rank=local_rank,
        domains=domains,
        cores=len(cores),
        threads=threads,
        compute=compute,
        comm=tuple(core[0] for core in communicating),
        decode=decode,
        memory=memory,
    )


def _memory(node: Node, on: list[tuple[int, ...]], local_rank: int) -> MemoryPolicy:
    fast = [one for one in node.memory_nodes if one.kind in ("MCDRAM", "HBM")]
    near = [one for one in fast if set(one.domains) & set(on[local_rank])]
    if not near:
        return MemoryPolicy("local", (), "first touch: its threads stay in their domains")
    sharers = {one.number: sum(bool(set(one.domains) & set(domains)) for domains in on) for one in near}
    part = sum(one.memory_mb // sharers[one.number] for one in near)
    if part < _MIN_FAST_MEMORY_MB:
        return MemoryPolicy("local", (), f"first touch: {part:,} MiB of {near[0].kind} a rank are too little")
    nodes = tuple(one.number for one in near)
    where = f"{part:,} MiB of {near[0].kind} (node {format_cpu_list(nodes)})"
    return MemoryPolicy("prefer", nodes, f"prefers {where} until it is full")


def _notes(node: Node, ranks: tuple[RankPlan, ...], *, allowed: int | None, asked: int | None) -> list[str]:
    notes = []
    if len(node.group_cpus) < node.online:
        notes.append(f"the control group leaves {len(node.group_cpus)} of this node's {node.online} CPUs")
    if len(node.cpus) < len(node.group_cpus):
        notes.append(f"this process may run on {len(node.cpus)} of {len(node.group_cpus)} CPUs")
    if allowed:
        notes.append(f"the control group allows {node.cpu_quota:g} CPUs' time; more threads would be put to sleep")
    if len(ranks) > len(node.cores):
        notes.append(f"{len(ranks)} ranks on {len(node.cores)} cores: ranks share cores, and the run is slow")
    fewest, most = min(rank.cores for rank in ranks), max(rank.cores for rank in ranks)
    if fewest < most:
        notes.append(f"ranks have {fewest} to {most} cores; a step takes as long as the smallest rank's")
    if len(ranks) > 1 and len(ranks) < len(node.cores) and any(
        len(rank.domains) > 1 for rank in ranks
    ) and len(node.domains) % len(ranks):  # fmt: skip
        notes.append(f"{len(ranks)} ranks do not fit {len(node.domains)} domains: some rank has cores in two of them")
    most_threads = max(len(rank.compute) for rank in ranks)
    if asked and asked > most_threads:
        notes.append(f"OMP_NUM_THREADS={asked} is more than the {most_threads} CPUs that a rank has")
    return notes
