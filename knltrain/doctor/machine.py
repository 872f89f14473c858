"""Checks of a machine without torch: pure functions of a file tree and an environment.

Each takes a :class:`Machine` and returns a :class:`~knltrain.doctor.finding.Finding`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from knltrain.doctor.finding import Finding
from knltrain.errors import ConfigError, KnltrainError
from knltrain.launch.placement import node_before_pinning, plan_placement, unconfined_warning
from knltrain.launch.world import discover
from knltrain.node.affinity import asked_threads, plan_node
from knltrain.node.amx import knows_amx
from knltrain.node.binding import BINDING_VARIABLES
from knltrain.node.cpulist import format_cpu_list, parse_cpu_list, read_number, read_text
from knltrain.node.memory import keep_freed_memory
from knltrain.node.topology import Node, onednn_restriction, read_node

# Peak of ResNet-50 with a local batch of 32, docs/tuning.md; it grows with the batch.
_STEP_MB = {"bf16": 2923, "fp32": 5538}
# Docker's default; oneCCL and Intel MPI need more between ranks of a node.
_MIN_SHARED_MB = 64
_SHARED_MB_PER_RANK = 256
# A few for each of a thousand ranks.
_MIN_OPEN_FILES = 4096
_WARN_SWAP_MB = 256
_MAX_ANCESTORS = 32


@dataclass(frozen=True)
class Machine:
    """Input of the checks.

    Attributes:
        root: the folder of ``sys``, ``proc`` and ``dev``.
        environ: the environment.
        node: the part of the node that this process may use.
        whole: the part that its control group allows.
    """

    root: Path
    environ: Mapping[str, str]
    node: Node
    whole: Node


def read_machine(
    root: Path | str = "/", environ: Mapping[str, str] | None = None, allowed: Set[int] | None = None
) -> Machine:
    """Reads the node once for all checks; ``allowed`` as for :func:`~knltrain.node.topology.read_node`."""
    node = read_node(root, allowed)
    pinned = len(node.cpus) < len(node.group_cpus)
    whole = read_node(root, set(node.group_cpus)) if pinned else node
    return Machine(Path(root), os.environ if environ is None else environ, node, whole)


def isa(machine: Machine) -> Finding:
    """Checks instruction sets, and whether the kernel allows AMX."""
    node, release = machine.node, read_text(machine.root / "proc/sys/kernel/osrelease")
    found = f"{node.cpu_model}: {node.isa}"
    if narrowed := _isa_restrictions(machine.environ):
        return Finding(
            "isa",
            "warning",
            f"{' '.join(narrowed)}: {node.cpu_model} is used as {node.isa}",
            "PyTorch and oneDNN may use narrower instructions than the processor has",
            f"unset {' '.join(pair.split('=')[0] for pair in narrowed)}",
        )
    if node.amx_refused:
        old = not knows_amx(release)
        remedy = "kernel 5.16 or later" if old else "allow arch_prctl in the sandbox, or AMX in the hypervisor"
        return Finding(
            "isa",
            "warning",
            f"{node.cpu_model} has AMX, and kernel {release} does not grant its registers",
            "bf16 is much slower than this processor could be",
            remedy,
        )
    if node.isa == "baseline":
        return Finding(
            "isa",
            "warning",
            f"{node.cpu_model} has no AVX2",
            "training is slow, and runs without knltrain's kernels",
            "another node",
        )
    if node.isa == "avx512f":
        return Finding(
            "isa",
            "note",
            f"{found} without BW, DQ and VL, which PyTorch's own code asks for",
            "PyTorch's own layers run at half the vector width",
            "--engine fused",
        )
    return Finding("isa", "ok", found)


def _isa_restrictions(environ: Mapping[str, str]) -> list[str]:
    """Returns the variables, as NAME=VALUE, that restrict the instruction sets of oneDNN and PyTorch."""
    aten = environ.get("ATEN_CPU_CAPABILITY")
    return [
        *filter(None, [onednn_restriction(environ)]),
        *([f"ATEN_CPU_CAPABILITY={aten}"] if aten in ("default", "avx2") else []),  # case-sensitive
    ]


def bf16(machine: Machine) -> Finding:
    """Checks whether the processor has bf16 instructions."""
    node = machine.node
    if node.computes_bf16:
        bits = " and ".join(bit for bit in ("avx512_bf16", "amx_bf16") if bit in node.flags)
        if not node.gains_from_bf16:
            return Finding(
                "bf16",
                "warning",
                f"{bits}, on cores that are made for AMX, and AMX is hidden",
                "bf16 runs at half of fp32's rate; --precision auto trains in fp32",
                "a virtual machine or container with AMX (amx_tile, amx_bf16), on kernel 5.16 or later",
            )
        return Finding("bf16", "ok", f"in hardware: {bits}")
    restriction = onednn_restriction(machine.environ)
    return Finding(
        "bf16",
        "note",
        f"{node.isa}, neither AVX512_BF16 nor AMX{f' with {restriction}' * bool(restriction)}: bf16 would be emulated",
        "--precision auto trains in fp32, and bf16 is refused",
        "none needed; gradients can still be all-reduced in bf16: --comm.dtype bf16",
    )


def affinity(machine: Machine) -> Finding:
    """Compares the inherited CPU mask with the plan, and finds the process that restricted it."""
    node, whole = machine.node, machine.whole
    try:
        ranks = discover(machine.environ)
    except ConfigError as error:
        return Finding(
            "affinity",
            "error",
            str(error),
            "every process trains a model of its own, or refuses to start",
            "one launcher: torchrun, mpiexec, srun or another of docs/clusters.md",
        )
    try:
        # The mask of a launcher is known only on this machine, not for a copy of another node.
        shared = node_before_pinning(ranks, node) if machine.root == Path("/") else whole
        placement = plan_placement(ranks, node, shared, environ={})
    except KnltrainError as error:
        cause, _, remedy = str(error).partition("; ")
        return Finding("affinity", "error", cause, "training refuses to start on fewer cores than planned", remedy)
    have = f"{len(node.cpus)} of {node.online} CPUs ({format_cpu_list(node.cpus)})"
    if ranks.size == 1 and len(node.cpus) < len(whole.cpus):
        return Finding(
            "affinity",
            "warning",
            f"this process may run on {have}, and the control group leaves {len(whole.cpus)}{_pinned_by(machine)}",
            f"training uses {len(node.cores)} of {len(whole.cores)} cores",
            "start without taskset, numactl -C or the launcher's binding, or ask the batch system for all "
            "of the node (Slurm: --exclusive, srun --cpus-per-task)",
        )
    if ranks.warnings:
        cause, _, remedy = ranks.warnings[0].partition("; ")
        return Finding("affinity", "warning", cause, "not all that the job has trains the same model", remedy)
    if beyond := unconfined_warning(node, machine.environ):
        cause, _, remedy = beyond.partition("; ")
        return Finding("affinity", "warning", cause, "jobs on this node take each other's cores", remedy)
    pinned = [warning for warning in placement.warnings if ranks.launcher in warning]
    if pinned:
        cause, _, remedy = pinned[0].partition("; ")
        return Finding("affinity", "warning", cause, "this rank is slower than the others, which wait for it", remedy)
    limits = "" if len(node.group_cpus) == node.online else " (the control group's)"
    role = f"rank {placement.ranks.local_rank} of {ranks.local_size} here" if ranks.size > 1 else "alone"
    role += f" ({ranks.launcher})" if ranks.launcher != "none" else ""
    return Finding("affinity", "ok", f"{have}{limits}; {role}, computes on {format_cpu_list(placement.plan.compute)}")


def _pinned_by(machine: Machine) -> str:
    """Names the oldest ancestor with this process's mask, and its parent, which has a wider one."""
    mask, pid, oldest = set(machine.node.cpus), "self", ""
    for _ in range(_MAX_ANCESTORS):
        status = dict(re.findall(r"^(\w+):\s*(.+)$", read_text(machine.root / f"proc/{pid}/status"), re.MULTILINE))
        try:
            wider = set(parse_cpu_list(status["Cpus_allowed_list"])) > mask
        except (KeyError, ValueError):
            break
        if wider:
            return (
                f"; restricted since {oldest}, which {status.get('Name', '?')} (process {pid}) started"
                if oldest
                else ""
            )
        oldest = f"{status.get('Name', '?')} ({'this process' if pid == 'self' else f'process {pid}'})"
        pid = status.get("PPid", "0")
    return ""


def threads(machine: Machine) -> Finding:
    """Compares OMP_NUM_THREADS and variables that bind threads with the plan."""
    planned = plan_node(machine.node, environ={}).ranks[0]
    try:
        asked = asked_threads(machine.environ)
    except ConfigError as error:
        return Finding("threads", "error", str(error), "training refuses to start", "unset OMP_NUM_THREADS")
    if asked is not None and asked != planned.threads:
        few = asked < planned.threads
        cause = f"OMP_NUM_THREADS={asked} in the environment; the plan has {planned.threads} threads a rank"
        symptom = (
            f"{planned.threads - asked} of {planned.threads} cores of a rank are idle"
            if few
            else "threads wait for each other"
        )
        return Finding(
            "threads",
            "warning",
            f"{cause} (container images and modules export it)",
            symptom,
            "unset OMP_NUM_THREADS, unless it was measured to be faster",
        )
    if binding := [f"{name}={machine.environ[name]}" for name in BINDING_VARIABLES if machine.environ.get(name)]:
        return Finding(
            "threads",
            "note",
            f"{' '.join(binding)} in the environment: OpenMP binds the threads itself",
            "knltrain does not notice if threads leave their cores",
            f"unset {' '.join(pair.split('=')[0] for pair in binding)}, unless this is intended",
        )
    return Finding(
        "threads",
        "ok",
        f"the plan has {planned.threads} a rank, and one rank in each of {len(machine.node.domains)} domains",
    )


def cpu_limit(machine: Machine) -> Finding:
    """Checks the CPU quota of the control group."""
    quota, cores = machine.node.cpu_quota, len(machine.node.cores)
    if quota is None or quota >= cores:
        return Finding(
            "cpu-limit", "ok", "no CPU quota" if quota is None else f"{quota:g} CPUs' time for {cores} cores"
        )
    return Finding(
        "cpu-limit",
        "warning",
        f"the control group allows {quota:g} CPUs' time on {cores} cores",
        f"training computes with {max(1, int(quota))} threads, which the kernel moves about on {cores} cores; "
        "decoders put them to sleep in every period",
        "whole CPUs for the container: docker --cpuset-cpus in place of --cpus, Kubernetes' static CPU manager",
    )


def memory(machine: Machine) -> Finding:
    """Compares free and allowed memory with the needs of a training step of ResNet-50."""
    node = machine.node
    free = _meminfo_mb(machine.root, "MemAvailable")
    known = [part for part in (free, node.memory_limit_mb) if part is not None]
    if not known:
        return Finding(
            "memory", "note", "/proc/meminfo does not say what is free", "memory was not examined", "none needed"
        )
    ranks, precision = len(node.domains), "bf16" if node.gains_from_bf16 else "fp32"
    available, need = min(known), _STEP_MB[precision]
    limit = f", the control group's limit {node.memory_limit_mb:,.0f}" if node.memory_limit_mb else ""
    cause = (
        f"{available:,.0f} MiB available (free: {'unknown' if free is None else f'{free:,.0f}'}{limit}); ResNet-50 at "
        f"local batch 32 takes {need:,} a rank in {precision}"
    )
    if available >= need * ranks:
        return Finding("memory", "ok", cause)
    remedy = "a smaller --local-batch: the rest of the batch is accumulated"
    if ranks > 1:
        remedy += f"; fewer ranks than {ranks} a node"
    return Finding(
        "memory",
        "error" if available < need else "warning",
        cause,
        "ranks are killed (exit code 137) at the first steps",
        remedy,
    )


def _meminfo_mb(root: Path, name: str) -> float | None:
    match = re.search(rf"^{name}:\s*(\d+) kB", read_text(root / "proc/meminfo"), re.MULTILINE)
    return int(match[1]) / 1024 if match else None


def swap(machine: Machine) -> Finding:
    """Checks swap in use."""
    total, left = _meminfo_mb(machine.root, "SwapTotal") or 0.0, _meminfo_mb(machine.root, "SwapFree") or 0.0
    used = total - left
    if used <= _WARN_SWAP_MB:
        return Finding("swap", "ok", f"{used:,.0f} of {total:,.0f} MiB in use" if total else "none")
    return Finding(
        "swap",
        "warning",
        f"{used:,.0f} of {total:,.0f} MiB of swap are in use",
        "single steps take many times as long as others",
        "end other processes here, or: swapoff -a",
    )


def numa_balancing(machine: Machine) -> Finding:
    """Checks automatic NUMA balancing, which moves pages and threads between domains."""
    on, domains = read_number(machine.root / "proc/sys/kernel/numa_balancing"), len(machine.whole.domains)
    if not on or domains == 1:
        return Finding("numa-balancing", "ok", "off" if not on else "one NUMA domain: nothing to balance")
    return Finding(
        "numa-balancing",
        "note",
        f"kernel.numa_balancing={on} over {domains} domains: it unmaps pages to "
        "trace accesses, although the plan has placed threads and memory",
        "step times vary more than they need",
        "sysctl kernel.numa_balancing=0",
    )


def huge_pages(machine: Machine) -> Finding:
    """Checks transparent huge pages."""
    folder = machine.root / "sys/kernel/mm/transparent_hugepage"
    enabled, defrag = (_bracketed(read_text(folder / name)) for name in ("enabled", "defrag"))
    if enabled == "always" and defrag == "always":
        return Finding(
            "huge-pages",
            "note",
            "transparent huge pages: enabled always, defrag always",
            "steps in which the kernel compacts memory take longer; resident memory grows",
            f"echo madvise > /{(folder / 'defrag').relative_to(machine.root)}",
        )
    return Finding("huge-pages", "ok", f"transparent huge pages: {enabled or 'unknown to this kernel'}")


def _bracketed(text: str) -> str:
    """Returns the word in brackets, sysfs's format of a choice."""
    match = re.search(r"\[(\S+)\]", text)
    return match[1] if match else text


def malloc(machine: Machine) -> Finding:
    """Checks the allocator and its settings."""
    missing = [
        path
        for path in re.split(r"[: ]+", machine.environ.get("LD_PRELOAD", ""))
        if path.startswith("/") and not (machine.root / path.lstrip("/")).exists()
    ]
    if missing:
        return Finding(
            "malloc",
            "warning",
            f"LD_PRELOAD names {', '.join(missing)}, which does not exist",
            "every program complains, and the allocator meant is not in use",
            "correct LD_PRELOAD or unset it",
        )
    found = keep_freed_memory(machine.environ)
    allocator, by = found["allocator"], found["set_by"]
    if by == "GLIBC_TUNABLES":
        return Finding(
            "malloc",
            "note",
            f"GLIBC_TUNABLES={machine.environ['GLIBC_TUNABLES']}: knltrain does not tune malloc",
            "a third of the speed is lost if it returns memory to the system after each step",
            "unset GLIBC_TUNABLES, unless it was measured to be faster",
        )
    if by == "nobody":
        return Finding(
            "malloc",
            "warning",
            "the C library is not glibc, whose malloc can be set to keep memory",
            "memory is unmapped and faulted in again at every step",
            "LD_PRELOAD=/path/to/libtcmalloc.so.4",
        )
    mapped = read_text(machine.root / "proc/self/maps")
    if by == "LD_PRELOAD" and mapped and str(allocator) not in mapped:
        return Finding(
            "malloc",
            "warning",
            f"LD_PRELOAD names {allocator}, and it is not in this process",
            "the allocator meant is not in use",
            "give its full path in LD_PRELOAD",
        )
    return Finding("malloc", "ok", f"{allocator}, {'preloaded' if by == 'LD_PRELOAD' else 'set to keep its memory'}")


def shared_memory(machine: Machine) -> Finding:
    """Checks /dev/shm, through which ranks of one node communicate."""
    folder, ranks = machine.root / "dev/shm", max(2, len(machine.node.domains))
    remedy = "a larger /dev/shm: mount -o remount,size=8G /dev/shm; docker --shm-size=8g or --ipc=host"
    symptom = "ranks on this node communicate over TCP, which is slower; an MPI library may end with SIGBUS"
    try:
        disk = os.statvfs(folder)
    except OSError as error:
        return Finding("shared-memory", "warning", f"/dev/shm: {error.strerror}", symptom, remedy)
    total, free = (blocks * disk.f_frsize / 2**20 for blocks in (disk.f_blocks, disk.f_bavail))
    cause = f"/dev/shm: {free:,.0f} of {total:,.0f} MiB free"
    if not os.access(folder, os.W_OK):
        return Finding("shared-memory", "warning", "/dev/shm cannot be written", symptom, "chmod 1777 /dev/shm")
    if total <= _MIN_SHARED_MB:
        return Finding("shared-memory", "warning", cause, symptom, remedy)
    if free < _SHARED_MB_PER_RANK * ranks:
        return Finding(
            "shared-memory",
            "warning",
            f"{cause}, for {ranks} ranks",
            symptom,
            f"remove files that jobs have left (ls -l /dev/shm); or {remedy}",
        )
    return Finding("shared-memory", "ok", cause)


def open_files(machine: Machine) -> Finding:
    """Checks the limit of open files: each rank has a connection to each other one, and rank 0 has two."""
    match = re.search(r"^Max open files +\S+ +(\d+)", read_text(machine.root / "proc/self/limits"), re.MULTILINE)
    if match and int(match[1]) < _MIN_OPEN_FILES:
        return Finding(
            "open-files",
            "warning",
            f"a process may have {int(match[1]):,} files open (hard limit)",
            "runs of several hundred ranks do not start: too many open files",
            "a higher nofile in /etc/security/limits.conf, LimitNOFILE= of slurmd, docker --ulimit nofile=65536",
        )
    return Finding("open-files", "ok", f"at most {int(match[1]):,} a process" if match else "no limit is known")


def clock(machine: Machine) -> Finding:
    """Checks the processors' frequency settings."""
    governors: dict[str, int] = {}
    for cpu in machine.node.cpus:
        if governor := read_text(machine.root / f"sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_governor"):
            governors[governor] = governors.get(governor, 0) + 1
    if not governors:
        return Finding("clock", "ok", "the frequency is not shown here, as in most virtual machines")
    folder = machine.root / f"sys/devices/system/cpu/cpu{machine.node.cpus[0]}/cpufreq"
    driver = read_text(folder / "scaling_driver")
    most, allowed = read_number(folder / "cpuinfo_max_freq"), read_number(folder / "scaling_max_freq")
    shown = ", ".join(f"{name} on {count} CPUs" for name, count in sorted(governors.items()))
    if most and allowed and allowed < most:
        return Finding(
            "clock",
            "warning",
            f"{allowed / 1e6:.1f} GHz allowed of {most / 1e6:.1f}; governor {shown}",
            "everything is slower in proportion",
            f"cpupower frequency-set --max {most}",
        )
    # With drivers that leave the choice to the processor, powersave runs at full speed under load too.
    hardware_managed = driver in ("intel_pstate", "amd-pstate-epp")
    if "powersave" in governors and not hardware_managed:
        return Finding(
            "clock",
            "warning",
            f"governor {shown}, driver {driver or 'unknown'}",
            "cores stay at their lowest frequency",
            "cpupower frequency-set --governor performance",
        )
    return Finding("clock", "ok", f"governor {shown}")


CHECKS: dict[str, Callable[[Machine], Finding]] = {
    "isa": isa,
    "bf16": bf16,
    "affinity": affinity,
    "threads": threads,
    "cpu-limit": cpu_limit,
    "memory": memory,
    "swap": swap,
    "numa-balancing": numa_balancing,
    "huge-pages": huge_pages,
    "malloc": malloc,
    "shared-memory": shared_memory,
    "open-files": open_files,
    "clock": clock,
}
