"""Every rank takes its place: its CPUs, its threads, its memory, before any OpenMP library is loaded.

OMP_PROC_BIND and OMP_PLACES are left alone on purpose. With them GNU's runtime binds the first thread to a single CPU
as it is loaded, and every thread made by it afterwards (decoders, gloo's, oneCCL's) would inherit that one CPU; with
as many CPUs in the process's mask as compute threads, one a core, there is little left for them to decide. Intel's
runtime keeps to the mask as well. Who sets these variables, or KMP_AFFINITY or GOMP_CPU_AFFINITY, is obeyed.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

from knltrain.errors import KnltrainError
from knltrain.launch.world import Ranks, cpus_of_launcher, discover
from knltrain.node.affinity import Plan, RankPlan, plan_node
from knltrain.node.binding import BINDING_VARIABLES, prefer_memory
from knltrain.node.cpulist import format_cpu_list
from knltrain.node.topology import Node, read_node
from knltrain.node.tuned_plan import tuned_threads

_UNPINNED = {
    "hydra": "mpiexec -genv I_MPI_PIN=0 (Intel MPI) or -bind-to none (MPICH)",
    "openmpi": "mpiexec --bind-to none",
    "slurm": "srun --cpu-bind=none, with enough --cpus-per-task",
}


@dataclasses.dataclass(frozen=True)
class RankPlacement:
    """Where this rank runs.

    Attributes:
        node: what this process could use when it started.
        ranks: this process among its peers.
        plan: this rank's part of the node.
        warnings: what a person should know, a sentence each.
    """

    node: Node
    ranks: Ranks
    plan: RankPlan
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The rank's part, as JSON types, for the run's config.json."""
        return dataclasses.asdict(self.plan)


def bind_rank(*, strict: bool = True) -> RankPlacement:
    """Finds this rank's part of the node and moves this process there.

    Call it before torch is imported: OpenMP reads its variables once, and threads inherit the CPUs of the thread that
    makes them.

    Args:
        strict: refuse to run on fewer cores than planned.

    Raises:
        ConfigError: the launcher's variables contradict each other, or ``OMP_NUM_THREADS`` is no positive number.
        KnltrainError: fewer cores are left than planned, and ``strict``.
    """
    place = find_placement(strict=strict)
    plan, warnings = place.plan, list(place.warnings)
    wanted = frozenset(plan.compute)
    try:
        os.sched_setaffinity(0, wanted)
    except OSError as error:
        warnings.append(f"CPUs {format_cpu_list(wanted)} cannot be taken: {error.strerror}; threads run where they are")
    got = frozenset(os.sched_getaffinity(0))
    if len(got & wanted) < len(wanted):
        problem = (
            f"rank {place.ranks.rank} was to compute on CPUs {format_cpu_list(wanted)} and got "
            f"{format_cpu_list(got)}: the control group (cpuset) or another process has taken the rest"
        )
        if strict:
            raise KnltrainError(f"{problem}; --no-strict-affinity runs on what is left")
        warnings.append(problem)
    if plan.memory.mode == "prefer" and (problem := prefer_memory(plan.memory.nodes)):
        warnings.append(f"the kernel does not let memory be placed ({problem}): first touch places it")
    if "torch" not in sys.modules:
        os.environ["OMP_NUM_THREADS"] = str(plan.threads)
    return dataclasses.replace(place, warnings=tuple(warnings))


def find_placement(*, strict: bool = True) -> RankPlacement:
    """Finds this rank's part of the node, and touches nothing. As :func:`bind_rank` otherwise."""
    node, ranks = read_node(), discover()
    whole = before_pinning(ranks, node)
    environ = tuned_threads(whole, ranks.local_size, os.environ)
    return plan_placement(ranks, node, whole, strict=strict, environ=environ)


def before_pinning(ranks: Ranks, node: Node) -> Node:
    """Returns what the ranks of this node have together, before their launcher pins any of them.

    mpiexec hands down the mask that it was started with (taskset, numactl, systemd), which is then no pinning of its
    own. One with fewer cores than ranks was hardly meant for them: a batch system's, of one core for one proxy.

    Args:
        ranks: this process among its peers.
        node: what this process may use.
    """
    allowed = frozenset(node.group_cpus)
    if len(node.cpus) >= len(allowed):
        return node
    inherited = cpus_of_launcher(ranks) & allowed if ranks.launcher in ("hydra", "openmpi") else frozenset()
    if inherited >= frozenset(node.cpus):
        shared = read_node(allowed=inherited)
        if len(shared.cores) >= ranks.local_size:
            return shared
    return read_node(allowed=allowed)


def plan_placement(
    ranks: Ranks, node: Node, whole: Node, *, strict: bool = True, environ: Mapping[str, str] | None = None
) -> RankPlacement:
    """Chooses a rank's part of its node.

    A rank that its launcher pinned keeps to what it was given. The others divide what the launcher had; a process that
    is alone, and ranks under torchrun, which pins nothing, what they may run on.

    Args:
        ranks: the process among its peers.
        node: what the process may use.
        whole: what the ranks of the node have together, of :func:`before_pinning`.
        strict: refuse fewer cores than planned.
        environ: the environment, by default this process's.

    Raises:
        ConfigError: ``OMP_NUM_THREADS`` is no positive number.
        KnltrainError: the launcher left the rank fewer cores than its share, and ``strict``.
    """
    environ = os.environ if environ is None else environ
    if ranks.launcher not in _UNPINNED or node.cpus == whole.cpus:
        plan = plan_node(node, ranks.local_size, world_size=ranks.size, environ=environ)
        beyond = beyond_allocation(node, environ)
        warnings = (*_worth_a_warning(plan), *([beyond] if beyond else []))
        return RankPlacement(node, ranks, plan.ranks[ranks.local_rank], warnings)
    planned = plan_node(whole, ranks.local_size, world_size=ranks.size, environ=environ)
    share = planned.ranks[ranks.local_rank]
    # Of a part of a node, the control group may well have the whole.
    of_job = min(_cpus_of_job(environ), default=len(whole.cpus))
    its_part = ranks.launcher == "slurm" and len(node.cpus) >= max(1, of_job // ranks.local_size)
    together = len(node.cpus) * ranks.local_size > len(whole.cpus) and len(node.cores) > share.cores
    if together and share.cpus <= set(node.cpus):
        # Pinned with others, to a package perhaps, which holds what the plan has for this rank.
        return RankPlacement(node, ranks, share, _worth_a_warning(planned))
    given = (
        f"{ranks.launcher} pinned rank {ranks.rank} to {_cores(len(node.cores))} (CPUs {format_cpu_list(node.cpus)})"
    )
    problem = ""
    if together:
        problem = f"{given} together with other ranks, and its share of this node is {format_cpu_list(share.compute)}"
    elif len(node.cores) < share.cores and not its_part:
        problem = f"{given}, and its share of this node is {_cores(share.cores)}"
    enough = not together and len(node.cores) >= min(rank.cores for rank in planned.ranks)
    remedy = f"start with {_UNPINNED[ranks.launcher]}, so that ranks place themselves"
    if problem and strict and not enough:
        raise KnltrainError(f"{problem}; {remedy}, or keep to these cores with --no-strict-affinity")
    own = plan_node(node, 1, world_size=ranks.size, environ=environ).ranks[0]
    own = dataclasses.replace(own, local_rank=ranks.local_rank)
    return RankPlacement(node, ranks, own, (f"{problem}; {remedy}",) if problem else ())


def beyond_allocation(node: Node, environ: Mapping[str, str]) -> str:
    """Says that Slurm does not confine a job to its part of the node, with a remedy; empty where that is not so.

    Slurm counts cores or hardware threads, and the nodes of a job may differ: only what is too little by any count is
    taken for a part.
    """
    given = max(_cpus_of_job(environ), default=len(node.cores))
    if given >= len(node.cores):
        return ""
    return (
        f"Slurm gave this job {given} CPUs of this node and does not confine it to them: it takes all "
        f"{_cores(len(node.cores))}, those of other jobs too; ask for the whole node (sbatch --exclusive), or have "
        "srun bind ranks (--cpu-bind=cores, with enough --cpus-per-task)"
    )


def _cpus_of_job(environ: Mapping[str, str]) -> list[int]:
    """How many CPUs a job of Slurm's has on its nodes, those of equal nodes once; nothing where that is not said."""
    numbers = re.sub(r"\(x\d+\)", "", environ.get("SLURM_JOB_CPUS_PER_NODE", "")).split(",")
    return [int(number) for number in numbers] if all(map(str.isdecimal, numbers)) else []


def _worth_a_warning(plan: Plan) -> tuple[str, ...]:
    return tuple(note for note in plan.notes if "control group" in note or "this process may" in note or "slow" in note)


def _cores(count: int) -> str:
    return f"{count} core{'' if count == 1 else 's'}"


def drift(place: RankPlacement) -> str:
    """Says where the compute threads are if that is not where they were put; empty as long as all is well.

    Libraries change what they find: an OpenMP runtime that binds its first thread, a package that sets its own mask.
    """
    wanted, got = set(place.plan.compute), os.sched_getaffinity(0)
    if wanted <= got or any(name in os.environ for name in BINDING_VARIABLES):
        return ""
    return f"rank {place.ranks.rank} was put on CPUs {format_cpu_list(wanted)} and is on {format_cpu_list(got)} now"
