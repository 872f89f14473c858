"""Which rank of a node has which cores, what runs on each of their hardware threads, and where its memory is.

The rules, in order; ``knltrain plan`` draws what comes of them:

1. One rank per NUMA domain with cores, unless asked otherwise. Ranks that divide by domains (or domains by ranks) get
   whole parts of them, as equal as can be; other numbers cut through the row of all cores, neighbours by cache staying
   together. More ranks than cores share cores.
2. With several ranks, each keeps some of its cores for the workers of the communication library, none where it has
   fewer than 8. One in 16 rounded, 1 to 4, gives what was recommended for Caffe on these processors: 4 of a Xeon Phi's
   68 cores, 2 of a Xeon's 28 (https://github.com/intel/caffe/issues/218). All ranks keep as many as the smallest, since
   the library is told one number.
3. One compute thread on each of the other cores. Where ``OMP_NUM_THREADS`` or the control group's quota of CPU time
   makes it fewer, the kernel chooses among the cores: which of them another run or container is on, a plan does not
   know, and a second one would come to the same.
4. Decoders run on the second hardware thread of each compute core. Where cores have one, or none is free, they share
   all of the rank's cores but the communication's: confined to fewer they would be what the run waits for.
5. Memory comes from the domain that touches it first, which is the rank's own, since its threads are there; a rank
   that needs more than its domain has takes the neighbours' instead of being killed, as it would be if bound. MCDRAM
   or HBM in flat mode is preferred by compute threads, until it is full, where a rank's part of it is 2 GiB or more.
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

_FEWEST_FOR_COMM = 8
_CORES_PER_COMM = 16
_MOST_COMM = 4
# Less would hold weights and momentum but no activations of a useful batch.
_FAST_ENOUGH_MB = 2048


@dataclass(frozen=True)
class MemoryPolicy:
    """Where a rank's compute threads take memory from.

    Attributes:
        mode: local (the domain that touches a page first) or prefer (``nodes``, until they are full).
        nodes: the kernel's numbers of MCDRAM or HBM.
        reason: why, for people.
    """

    mode: Literal["local", "prefer"]
    nodes: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class RankPlan:
    """One rank's part of the node.

    Attributes:
        local_rank: which one.
        domains: the NUMA domains its cores are in.
        cores: how many it has.
        threads: compute threads.
        compute: logical CPUs they run on, one each; where they are more, wherever it is free.
        comm: logical CPUs of the communication library's workers.
        decode: logical CPUs of the decoders.
        memory: where its memory comes from.
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
        """All logical CPUs that something of the rank runs on."""
        return frozenset((*self.compute, *self.comm, *self.decode))

    @property
    def num_unpinned_cpus(self) -> int:
        """How many of its compute CPUs have no thread; which they are, the kernel chooses."""
        return max(0, len(self.compute) - self.threads)

    @property
    def num_spare_cpus(self) -> int:
        """How many of all its CPUs others may take without a thread having to wait."""
        return self.num_unpinned_cpus * len({*self.compute, *self.decode}) // len(self.compute)


@dataclass(frozen=True)
class Plan:
    """What every rank of a node has.

    Attributes:
        ranks: by local rank.
        idle: cores on which nothing runs.
        notes: what a person should know of it, a sentence each.
        origin: where the number of ranks and threads comes from, for people.
    """

    ranks: tuple[RankPlan, ...]
    idle: Cores
    notes: tuple[str, ...]
    origin: str = ""


def asked_threads(environ: Mapping[str, str]) -> int | None:
    """Returns ``OMP_NUM_THREADS``, or None where the plan decides.

    The 1 that torchrun sets for whoever did not is nobody's wish: it makes CPU training silently slow.

    Raises:
        ConfigError: it is no positive number.
    """
    asked = environ.get("OMP_NUM_THREADS", "")
    by_torchrun = "TORCHELASTIC_RUN_ID" in environ and asked == "1"
    if not asked or by_torchrun:
        return None
    # OpenMP allows one number per nesting level; the first is ours.
    first = asked.split(",")[0].strip()
    if not first.isdecimal() or int(first) < 1:
        raise ConfigError(f"OMP_NUM_THREADS={asked} is no positive number; unset it or give one")
    return int(first)


def threads_per_rank(node: Node, local_size: int, environ: Mapping[str, str] | None = None) -> int:
    """Returns the number of compute threads of one of several equal ranks, all of whose cores compute.

    ``OMP_NUM_THREADS`` is obeyed. A rank whose launcher left it the whole machine takes its share of the cores, and no
    more than the control group's quota of CPU time lets run.

    Args:
        node: what this process may use.
        local_size: ranks on this node.
        environ: the environment, by default this process's.

    Raises:
        ConfigError: ``OMP_NUM_THREADS`` is no positive number.
    """
    asked = asked_threads(os.environ if environ is None else environ)
    if asked:
        return asked
    pinned = len(node.cpus) * local_size <= len(node.group_cpus)
    share = max(1, len(node.cores) if pinned else len(node.cores) // local_size)
    return min(share, _within_quota(node, local_size) or share)


def comm_cores(cores: int, world_size: int) -> int:
    """Returns how many of a rank's cores the communication library's workers have."""
    if world_size == 1 or cores < _FEWEST_FOR_COMM:
        return 0
    return min(max(round(cores / _CORES_PER_COMM), 1), _MOST_COMM)


def plan_node(
    node: Node,
    ranks_per_node: int | None = None,
    *,
    world_size: int | None = None,
    environ: Mapping[str, str] | None = None,
) -> Plan:
    """Places ranks on a node.

    Args:
        node: what they may use together.
        ranks_per_node: by default one per NUMA domain with cores.
        world_size: ranks on all nodes, by default this node's: a rank that is alone keeps no cores for communication.
        environ: the environment, by default this process's; ``OMP_NUM_THREADS`` in it is obeyed.

    Raises:
        ConfigError: fewer than one rank, or ``OMP_NUM_THREADS`` is no positive number.
    """
    asked = asked_threads(os.environ if environ is None else environ)
    count = len(node.domains) if ranks_per_node is None else ranks_per_node
    if count < 1:
        raise ConfigError(f"{count} ranks per node: give 1 or more")
    shares = _shares(node, count)
    allowed = _within_quota(node, count)
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


def _shares(node: Node, count: int) -> list[Cores]:
    """The cores of each rank."""
    domains = [domain.cores for domain in node.domains]
    if count > len(node.cores):
        row = [core for cores in domains for core in cores]
        return [(row[rank * len(row) // count],) for rank in range(count)]
    if count % len(domains) == 0 and all(count // len(domains) <= len(cores) for cores in domains):
        return [part for cores in domains for part in _parts(cores, count // len(domains))]
    if len(domains) % count == 0:
        size = len(domains) // count
        return [sum(domains[first : first + size], ()) for first in range(0, len(domains), size)]
    return _parts(sum(domains, ()), count)


def _parts(cores: Cores, count: int) -> list[Cores]:
    """Consecutive parts; the first have one more where they cannot be equal."""
    sizes = [len(cores) // count + (part < len(cores) % count) for part in range(count)]
    return [cores[first:stop] for first, stop in pairwise(accumulate(sizes, initial=0))]


def _within_quota(node: Node, count: int) -> int | None:
    """How many threads of a rank the control group does not put to sleep; None where it lets all cores compute."""
    if node.cpu_quota is None or node.cpu_quota >= len(node.cores):
        return None
    return max(1, int(node.cpu_quota) // count)


def _rank(
    local_rank: int, cores: Cores, domains: tuple[int, ...], *, comm: int, threads: int, memory: MemoryPolicy
) -> RankPlan:
    computing, communicating = cores[: len(cores) - comm], cores[len(cores) - comm :]
    deepest = max(len(core) for core in computing)
    # First threads of all cores, then second ones: that is how threads take CPUs, where they are more than cores.
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
    near = [one for one in node.memory_nodes if one.kind != "far" and set(one.domains) & set(on[local_rank])]
    if not near:
        return MemoryPolicy("local", (), "first touch: its threads stay in their domains")
    sharers = {one.number: sum(bool(set(one.domains) & set(domains)) for domains in on) for one in near}
    part = sum(one.memory_mb // sharers[one.number] for one in near)
    if part < _FAST_ENOUGH_MB:
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
