"""Formats of a plan: a picture of the node, JSON, shell, mpiexec and Slurm."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator
from typing import Any

from knltrain.node.affinity import Plan, RankPlan, comm_cores
from knltrain.node.cpulist import format_cpu_list
from knltrain.node.topology import Cores, Node

_WIDTH = 80
# Cores per line, beside the number of the first CPU; a Xeon Phi's 68 fit on one line.
_COLUMNS = 68
COMPUTE, COMM, DECODE, BOTH, IDLE = "#=d%."
_KINDS = {"far": "slower memory", "unknown": "memory of unknown speed"}
_LEGEND = f"{COMPUTE} computes  {COMM} communicates  {DECODE} decodes  {BOTH} computes and decodes  {IDLE} idle"


def as_text(node: Node, plan: Plan) -> str:
    """Draws the node, 80 columns wide, with a column for each core and a line for each hardware thread."""
    lines = list(_header(node))
    for domain in node.domains:
        memory = f", {domain.memory_mb:,} MiB" if domain.memory_mb else ""
        fast = "".join(
            f" + {one.memory_mb:,} MiB of {_KINDS.get(one.kind, one.kind)} (node {one.number})"
            for one in node.memory_nodes
            if domain.number in one.domains
        )
        lines += ["", f"domain {domain.number}, package {domain.package}: {len(domain.cores)} cores{memory}{fast}"]
        lines += _draw(domain.cores, plan)
    lines += [
        "",
        f"{COMPUTE} computes  {COMM} communicates  {DECODE} decodes  {BOTH} computes and decodes  {IDLE} idle",
        "",
    ]
    for rank in plan.ranks:
        lines += _wrapped(f"rank {rank.local_rank}: {_describe(rank)}")
    unpinned = sum(rank.num_unpinned_cpus for rank in plan.ranks)
    which = f" (CPUs {_cpus(plan.idle)})" if plan.idle else " (whichever the kernel leaves)" if unpinned else ""
    lines += [f"cores left idle: {len(plan.idle) + unpinned}{which}"]
    several = comm_cores(plan.ranks[0].cores, world_size=2)
    if len(plan.ranks) == 1 and several:
        lines += _wrapped(f"note: as one of several nodes, {several} of its cores communicate instead of computing")
    lines += _wrapped(f"from: {plan.origin}")
    for note in plan.notes:
        lines += _wrapped(f"note: {note}")
    return "\n".join(lines)


def as_dict(node: Node, plan: Plan) -> dict[str, Any]:
    """Returns the plan and the topology that it is based on, as JSON types."""
    return {
        "cpu": node.cpu_model,
        "isa": node.isa,
        "amx_refused": node.amx_refused,
        "packages": node.packages,
        "domains": [dataclasses.asdict(domain) for domain in node.domains],
        "memory_nodes": [dataclasses.asdict(one) for one in node.memory_nodes],
        "online": node.online,
        "cpus": node.cpus,
        "memory_limit_mb": node.memory_limit_mb,
        "cpu_quota": node.cpu_quota,
        **dataclasses.asdict(plan),
    }


def as_env(plan: Plan) -> str:
    """Returns shell lines that export the plan to libraries of other programs.

    Ranks of knltrain bind themselves. OMP_NUM_THREADS is not exported if it differs from rank to rank.
    """
    lines = [f"export {name}={value}" for name, value in communication(plan).items()]
    threads = {rank.threads for rank in plan.ranks}
    if len(threads) == 1:
        lines.insert(0, f"export OMP_NUM_THREADS={threads.pop()}")
    else:
        lines.insert(0, "# OMP_NUM_THREADS: ranks have different numbers of cores, and each takes its own")
    return "\n".join(lines)


def communication(plan: Plan) -> dict[str, str]:
    """Returns oneCCL's variables: the number of workers of a rank, and the CPUs of all workers, rank by rank."""
    workers = len(plan.ranks[0].comm)
    if not workers:
        return {}
    cpus = ",".join(str(cpu) for rank in plan.ranks for cpu in rank.comm)
    return {"CCL_WORKER_COUNT": str(workers), "CCL_WORKER_AFFINITY": cpus}


def as_mpiexec(plan: Plan) -> str:
    """Returns arguments for Hydra's mpiexec: ranks per node, and for Intel MPI a CPU mask for each rank."""
    masks = ",".join(hex(sum(1 << cpu for cpu in rank.cpus)) for rank in plan.ranks)
    return f"-ppn {len(plan.ranks)} -genv I_MPI_PIN_DOMAIN [{masks}]"


def as_slurm(node: Node, plan: Plan) -> str:
    """Returns lines of a batch script; each rank binds itself within the job's allocation."""
    share = len(node.cpus) // len(plan.ranks)
    return (
        f"#SBATCH --ntasks-per-node={len(plan.ranks)}\n"
        f"#SBATCH --cpus-per-task={max(1, share)}\n"
        "#SBATCH --exclusive\n"
        "# Since Slurm 22.05 srun does not inherit --cpus-per-task from sbatch.\n"
        f"srun --cpus-per-task={max(1, share)} --cpu-bind=none knltrain train"
    )


def _header(node: Node) -> Iterator[str]:
    threads = {len(core) for core in node.cores}
    per_core = f"{min(threads)}-{max(threads)}" if len(threads) > 1 else str(max(threads))
    yield node.cpu_model
    limits = f", {node.memory_limit_mb:,.0f} MiB allowed by the control group" if node.memory_limit_mb else ""
    amx = ", AMX refused by the kernel" if node.amx_refused else ""
    yield f"packages {node.packages}, NUMA domains {len(node.domains)}, cores {len(node.cores)} x {per_core} threads"
    yield f"{node.isa}{amx}{limits}"


def _draw(cores: Cores, plan: Plan) -> Iterator[str]:
    owner: dict[int, list[int]] = {}
    for rank in plan.ranks:
        for cpu in rank.cpus:
            owner.setdefault(cpu, []).append(rank.local_rank)
    lines = -(-len(cores) // _COLUMNS)
    per_line = -(-len(cores) // lines)
    width = max(len(str(cpu)) for core in cores for cpu in core)
    for first in range(0, len(cores), per_line):
        row = cores[first : first + per_line]
        yield f"{'rank':>{width + 4}} {_ruler([owner.get(core[0], []) for core in row])}".rstrip()
        for depth in range(max(len(core) for core in row)):
            label = next(core[depth] for core in row if depth < len(core))
            marks = "".join(_mark(core[depth], plan) if depth < len(core) else " " for core in row)
            yield f"cpu {label:>{width}} {marks}".rstrip()


def _ruler(owners: list[list[int]]) -> str:
    """Labels the first core of each rank with its number, the others with -; + marks a core that ranks share."""
    text = ""
    for column, ranks in enumerate(owners):
        if len(ranks) != 1:
            text = text[:column].ljust(column) + ("+" if ranks else " ")
        elif column == 0 or owners[column - 1] != ranks:
            text = text[:column].ljust(column) + str(ranks[0])
        elif len(text) <= column:
            text += "-"
    return text[: len(owners)]


def _mark(cpu: int, plan: Plan) -> str:
    computes = any(cpu in rank.compute for rank in plan.ranks)
    decodes = any(cpu in rank.decode for rank in plan.ranks)
    if any(cpu in rank.comm for rank in plan.ranks):
        return COMM
    return BOTH if computes and decodes else COMPUTE if computes else DECODE if decodes else IDLE


def _describe(rank: RankPlan) -> str:
    comm = f", communication on {format_cpu_list(rank.comm)}" if rank.comm else ""
    where = "the same" if set(rank.decode) == set(rank.compute) else format_cpu_list(rank.decode)
    on = "on any of" if rank.num_unpinned_cpus else "on"
    threads = f"{rank.threads} thread{'s' if rank.threads > 1 else ''} {on} {format_cpu_list(rank.compute)}"
    return f"{threads}{comm}, decoders on {where}; memory: {rank.memory.reason}"


def _cpus(cores: Cores) -> str:
    return format_cpu_list(cpu for core in cores for cpu in core)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, subsequent_indent="  ", break_long_words=True, break_on_hyphens=False)
