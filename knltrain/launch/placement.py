"""Placement and binding of a rank: its CPUs, threads and memory, before any OpenMP runtime is loaded.

OMP_PROC_BIND and OMP_PLACES are not set, on purpose. With them GNU's runtime binds the first thread to a single CPU
when it is loaded, and every thread that it creates afterwards (decoders, gloo's, oneCCL's) would inherit that one CPU.
With as many CPUs in the process's mask as compute threads, one a core, they would change little. Intel's runtime
respects the mask as well. If the user sets these variables, or KMP_AFFINITY or GOMP_CPU_AFFINITY, they take precedence.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

from knltrain.errors import KnltrainError
from knltrain.launch.launchers import LAUNCHERS
from knltrain.launch.processes import launcher_cpus
from knltrain.launch.world import Ranks, discover
from knltrain.node.affinity import Plan, RankPlan, plan_node
from knltrain.node.binding import BINDING_VARIABLES, prefer_memory
from knltrain.node.cpulist import format_cpu_list
from knltrain.node.topology import Node, read_node
from knltrain.node.tuned_plan import tuned_threads

_UNPINNED = {launcher.name: launcher.unpinned for launcher in LAUNCHERS if launcher.unpinned}
_PASS_ON_MASK = frozenset(launcher.name for launcher in LAUNCHERS if launcher.passes_on_mask)


@dataclasses.dataclass(frozen=True)
class RankPlacement:
    """Where this rank runs.

    Attributes:
        node: the CPUs and memory that this process could use when it started.
        ranks: this process among its peers.
        plan: this rank's part of the node.
        warnings: for the user, one sentence each.
    """

    node: Node
    ranks: Ranks
    plan: RankPlan
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Returns the rank's plan as JSON types, for the run's config.json."""
        return dataclasses.asdict(self.plan)


def bind_rank(*, strict: bool = True) -> RankPlacement:
    """Finds this rank's part of the node and binds this process to it.

    Call it before torch is imported: OpenMP reads its variables once, and threads inherit the CPU mask of the thread
    that creates them.

    Args:
        strict: refuse to run on fewer cores than planned.

    Raises:
        ConfigError: the launcher's variables contradict each other, or ``OMP_NUM_THREADS`` is not a positive number.
        KnltrainError: fewer cores than planned are available, and ``strict``.
    """
    placement = find_placement(strict=strict)
    plan, warnings = placement.plan, list(placement.warnings)
    wanted = frozenset(plan.compute)
    try:
        os.sched_setaffinity(0, wanted)
    except OSError as error:
        warnings.append(
            f"cannot bind to CPUs {format_cpu_list(wanted)}: {error.strerror}; threads stay on the CPUs that they have"
        )
    got = frozenset(os.sched_getaffinity(0))
    if len(got & wanted) < len(wanted):
        problem = (
            f"rank {placement.ranks.rank} should compute on CPUs {format_cpu_list(wanted)} and got "
            f"{format_cpu_list(got)}: the control group (cpuset) or another process has taken the rest"
        )
        if strict:
            raise KnltrainError(f"{problem}; --no-strict-affinity runs on what is left")
        warnings.append(problem)
    if plan.memory.mode == "prefer" and (problem := prefer_memory(plan.memory.nodes)):
        warnings.append(f"the kernel does not allow a memory policy ({problem}): first touch decides where memory is")
    if "torch" not in sys.modules:
        os.environ["OMP_NUM_THREADS"] = str(plan.threads)
    return dataclasses.replace(placement, warnings=tuple(warnings))


def find_placement(*, strict: bool = True) -> RankPlacement:
    """Finds this rank's part of the node as :func:`bind_rank` does, without binding the process."""
    node, ranks = read_node(), discover()
    whole = node_before_pinning(ranks, node)
    environ = tuned_threads(whole, ranks.local_size, os.environ)
    placement = plan_placement(ranks, node, whole, strict=strict, environ=environ)
    return dataclasses.replace(placement, warnings=(*ranks.warnings, *placement.warnings))


def node_before_pinning(ranks: Ranks, node: Node) -> Node:
    """Returns the part of the node that its ranks share, before the launcher pins any of them.

    mpiexec passes on the mask that it was started with (taskset, numactl, systemd), which is not a pinning of its own.
    A mask with fewer cores than ranks was not meant for them: batch systems start the proxy on a single core.

    Args:
        ranks: this process among its peers.
        node: the part of the node that this process may use.
    """
    allowed = frozenset(node.group_cpus)
    if len(node.cpus) >= len(allowed):
        return node
    inherited = launcher_cpus(ranks.rank, ranks.size) & allowed if ranks.launcher in _PASS_ON_MASK else frozenset()
    if inherited >= frozenset(node.cpus):
        shared = read_node(allowed=inherited)
        if len(shared.cores) >= ranks.local_size:
            return shared
    return read_node(allowed=allowed)


def plan_placement(
    ranks: Ranks, node: Node, whole: Node, *, strict: bool = True, environ: Mapping[str, str] | None = None
) -> RankPlacement:
    """Chooses a rank's part of its node.

    A rank that its launcher pinned keeps its mask. Other ranks divide the launcher's mask between them; a single
    process, and ranks under torchrun, which does not pin, divide their own mask.

    Args:
        ranks: the process among its peers.
        node: the part of the node that the process may use.
        whole: the part that the ranks of the node share, from :func:`node_before_pinning`.
        strict: refuse fewer cores than planned.
        environ: the environment, by default this process's.

    Raises:
        ConfigError: ``OMP_NUM_THREADS`` is not a positive number.
        KnltrainError: the launcher pinned the rank to fewer cores than planned, and ``strict``.
    """
    environ = os.environ if environ is None else environ
    if ranks.launcher not in _UNPINNED or node.cpus == whole.cpus:
        plan = plan_node(node, ranks.local_size, world_size=ranks.size, environ=environ)
        beyond = unconfined_warning(node, environ)
        warnings = (*_warnings(plan), *([beyond] if beyond else []))
        return RankPlacement(node, ranks, plan.ranks[ranks.local_rank], warnings)
    planned = plan_node(whole, ranks.local_size, world_size=ranks.size, environ=environ)
    planned_rank = planned.ranks[ranks.local_rank]
    # For a job on a part of a node, the control group may still have the whole node.
    job_cpus = min(_slurm_job_cpus(environ), default=len(whole.cpus))
    is_its_part = ranks.launcher == "slurm" and len(node.cpus) >= max(1, job_cpus // ranks.local_size)
    shared_mask = len(node.cpus) * ranks.local_size > len(whole.cpus) and len(node.cores) > planned_rank.cores
    if shared_mask and planned_rank.cpus <= set(node.cpus):
        # Pinned together with others, to a socket perhaps, which contains this rank's CPUs in the plan.
        return RankPlacement(node, ranks, planned_rank, _warnings(planned))
    given = (
        f"{ranks.launcher} pinned rank {ranks.rank} to {_cores(len(node.cores))} (CPUs {format_cpu_list(node.cpus)})"
    )
    problem = ""
    if shared_mask:
        problem = (
            f"{given} together with other ranks, and its share of this node is {format_cpu_list(planned_rank.compute)}"
        )
    elif len(node.cores) < planned_rank.cores and not is_its_part:
        problem = f"{given}, and its share of this node is {_cores(planned_rank.cores)}"
    enough = not shared_mask and len(node.cores) >= min(rank.cores for rank in planned.ranks)
    remedy = f"start with {_UNPINNED[ranks.launcher]}, so that ranks bind themselves"
    if problem and strict and not enough:
        raise KnltrainError(f"{problem}; {remedy}, or use these cores with --no-strict-affinity")
    own = plan_node(node, 1, world_size=ranks.size, environ=environ).ranks[0]
    own = dataclasses.replace(own, local_rank=ranks.local_rank)
    return RankPlacement(node, ranks, own, (f"{problem}; {remedy}",) if problem else ())


def unconfined_warning(node: Node, environ: Mapping[str, str]) -> str:
    """Returns a warning if Slurm does not confine a job to its part of the node; otherwise an empty string.

    Slurm counts cores or hardware threads, and the nodes of a job may differ: the job has a part of this node only if
    its CPUs are too few by either count and on every node.
    """
    given = max(_slurm_job_cpus(environ), default=len(node.cores))
    if given >= len(node.cores):
        return ""
    return (
        f"Slurm gave this job {given} CPUs of this node and does not confine it to them: it takes all "
        f"{_cores(len(node.cores))}, those of other jobs too; ask for the whole node (sbatch --exclusive), or have "
        "srun bind ranks (--cpu-bind=cores, with enough --cpus-per-task)"
    )


def _slurm_job_cpus(environ: Mapping[str, str]) -> list[int]:
    """Returns the CPUs that a Slurm job has on each kind of its nodes; empty if the variable is not set."""
    numbers = re.sub(r"\(x\d+\)", "", environ.get("SLURM_JOB_CPUS_PER_NODE", "")).split(",")
    return [int(number) for number in numbers] if all(map(str.isdecimal, numbers)) else []


def _warnings(plan: Plan) -> tuple[str, ...]:
    return tuple(note for note in plan.notes if "control group" in note or "this process may" in note or "slow" in note)


def _cores(count: int) -> str:
    return f"{count} core{'' if count == 1 else 's'}"


def binding_drift(placement: RankPlacement) -> str:
    """Returns a warning if compute threads are no longer bound to their CPUs; otherwise an empty string.

    Libraries change the mask: an OpenMP runtime that binds its first thread, a package that sets its own.
    """
    wanted, got = set(placement.plan.compute), os.sched_getaffinity(0)
    if wanted <= got or any(os.environ.get(name) for name in BINDING_VARIABLES):
        return ""
    return (
        f"rank {placement.ranks.rank} was bound to CPUs {format_cpu_list(wanted)} and is on {format_cpu_list(got)} now"
    )
