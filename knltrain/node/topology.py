"""What this node has: packages, NUMA domains, cores, caches, memory, and the instruction sets they speak."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from knltrain.errors import one_line
from knltrain.files import open_regular
from knltrain.node.amx import kernel_grants_amx, knows_amx
from knltrain.node.cgroup import read_limits
from knltrain.node.cpulist import as_number, read_cpus, read_number, read_text

Cores = tuple[tuple[int, ...], ...]

# What oneDNN leaves unused under each value of ONEDNN_MAX_CPU_ISA (its documentation, "CPU Dispatcher Control"), by the
# beginnings of /proc/cpuinfo's words. PyTorch multiplies bf16 through oneDNN alone.
_ABOVE_CORE = ("amx_", "avx512_fp16", "avx512_bf16")
_ABOVE_AVX2 = (*_ABOVE_CORE, "avx512_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd")
_ABOVE_AVX = (*_ABOVE_AVX2, "avx_vnni", "avx2")
_HIDDEN_BY_ONEDNN = {
    "SSE41": (*_ABOVE_AVX, "avx"),
    "AVX": _ABOVE_AVX,
    **dict.fromkeys(("AVX2", "AVX2_VNNI", "AVX2_VNNI_2"), _ABOVE_AVX2),
    **dict.fromkeys(("AVX512_CORE", "AVX512_CORE_VNNI"), _ABOVE_CORE),
    # AVX512_FP16, which the first of them hides too, stays: it tells what cores these are.
    **dict.fromkeys(("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512"), ("amx_",)),
}
# No package has had more memory on it: 64 GiB of HBM on Xeon Max, 16 GiB of MCDRAM on Xeon Phi.
_LARGEST_ON_PACKAGE_MB = 64 * 1024
# Of /proc/cpuinfo: characters of a line and lines of a processor are some thousand and some thirty.
_LONGEST_LINE, _MOST_ENTRIES = 1 << 16, 1000


@dataclass(frozen=True)
class Domain:
    """A NUMA (or sub-NUMA) domain with cores that this process may use.

    Attributes:
        number: the kernel's.
        package: which package it is on.
        cores: its cores, one tuple of logical CPUs each; those that share caches are neighbours.
        memory_mb: its own memory, MiB; 0 where it has none, or none that this process may use.
    """

    number: int
    package: int
    cores: Cores
    memory_mb: int = 0


@dataclass(frozen=True)
class MemoryNode:
    """Memory without cores of its own: MCDRAM or HBM in flat mode, or memory on a device.

    Attributes:
        number: the kernel's.
        memory_mb: MiB.
        kind: MCDRAM, HBM, or "far", which is no faster than the domains' own memory.
        domains: the domains that are nearest to it.
    """

    number: int
    memory_mb: int
    kind: str
    domains: tuple[int, ...]


@dataclass(frozen=True)
class Node:
    """The part of a machine that this process may use.

    Attributes:
        cpu_model: the processor's name, for people.
        flags: feature bits as /proc/cpuinfo spells them, without those that the kernel does not let a process use
            and those that ONEDNN_MAX_CPU_ISA keeps oneDNN from. Choices are made by these, never by the vendor's name.
        cpus: logical CPUs this process may run on.
        cores: the same, one tuple of hardware threads per physical core.
        online: logical CPUs of the whole machine.
        domains: the NUMA domains that ``cpus`` are in, never none.
        memory_nodes: memory without cores that this process may use.
        caches: the level of each cache of level 2 or more, and the logical CPUs that share it.
        group_cpus: logical CPUs that the control group leaves; fewer than ``online`` in a container.
        memory_limit_mb: what the control group allows all of its processes together, MiB; None without a limit.
        cpu_quota: CPU seconds a second that the control group allows; None without a limit.
        amx_refused: the processor has AMX, and the kernel does not grant it.
    """

    cpu_model: str
    flags: frozenset[str]
    cpus: tuple[int, ...]
    cores: Cores
    online: int
    domains: tuple[Domain, ...] = ()
    memory_nodes: tuple[MemoryNode, ...] = ()
    caches: tuple[tuple[int, tuple[int, ...]], ...] = ()
    group_cpus: tuple[int, ...] = ()
    memory_limit_mb: float | None = None
    cpu_quota: float | None = None
    amx_refused: bool = False

    def __post_init__(self) -> None:
        if not self.domains:
            object.__setattr__(self, "domains", (Domain(0, 0, self.cores),))
        if not self.group_cpus:
            object.__setattr__(self, "group_cpus", tuple(range(self.online)))

    @property
    def computes_bf16(self) -> bool:
        """Whether the processor multiplies bf16 itself, with AVX512_BF16 or AMX."""
        return bool(self.flags & {"avx512_bf16", "amx_bf16"})

    @property
    def gains_from_bf16(self) -> bool:
        """Whether products of bf16 are faster than fp32's.

        Cores that are made for AMX multiply bf16 without it at half of fp32's rate [perf/results]: those of Sapphire
        Rapids and later, where a hypervisor or the kernel hides AMX. They have AVX512_FP16, which Cooper Lake's, fast
        without AMX, have not. SSE4A tells AMD's from them, whose AVX512_BF16 is fast.
        """
        amx_is_hidden = "avx512_fp16" in self.flags and not self.flags & {"amx_bf16", "sse4a"}
        return self.computes_bf16 and not amx_is_hidden

    @property
    def isa(self) -> str:
        """The widest instruction set that matters here, for people and for result files."""
        for bit in ("amx_bf16", "avx512_bf16", "avx512bw", "avx512f", "avx2"):
            if bit in self.flags:
                return "avx512" if bit == "avx512bw" else bit
        return "baseline"

    @property
    def packages(self) -> int:
        """Packages that ``cpus`` are on."""
        return len({domain.package for domain in self.domains})


def read_node(root: str | Path = "/", allowed: Set[int] | None = None) -> Node:
    """Reads sysfs and procfs. What is missing or damaged there is taken as not there: one domain, one thread a core.

    Nothing but the tree is looked at, except for this machine's own (``/``): there the scheduler says which CPUs
    this process may use, the kernel is asked for AMX, which changes nothing but that it may be used, and
    ONEDNN_MAX_CPU_ISA is read.

    Args:
        root: where ``sys`` and ``proc`` are found; a copy of another node's will do.
        allowed: logical CPUs this process may use; by default what the scheduler says, in a copy what the control
            group leaves.
    """
    root = Path(root)
    live = root == Path("/")
    limits = read_limits(root)
    cpuinfo = _cpuinfo(root)
    online = read_cpus(root / "sys/devices/system/cpu/online") or _numbered(root / "sys/devices/system/cpu", "cpu")
    if allowed is None and live:
        allowed = os.sched_getaffinity(0)
    group = tuple(cpu for cpu in online if limits.cpus is None or cpu in limits.cpus) or online
    cpus = tuple(sorted(allowed)) if allowed is not None else group or (0,)
    flags = frozenset(cpuinfo.get("flags", "").split())
    if live:
        flags = frozenset(flag for flag in flags if not flag.startswith(_hidden_by_onednn()))
    granted = "amx_tile" not in flags or (
        kernel_grants_amx() if live else knows_amx(read_text(root / "proc/sys/kernel/osrelease"))
    )
    caches = _caches(root, cpus)
    cores = _cores(root, cpus)
    domains, memory_nodes = _domains(root, cores, caches, flags, limits.mems)
    return Node(
        cpu_model=one_line(cpuinfo.get("model name", "unknown")),
        flags=flags if granted else frozenset(flag for flag in flags if not flag.startswith("amx_")),
        cpus=cpus,
        cores=cores,
        online=max(len(online), len(cpus)),
        domains=domains,
        memory_nodes=memory_nodes,
        caches=caches,
        group_cpus=group or cpus,
        memory_limit_mb=limits.memory_mb,
        cpu_quota=limits.cpu_quota,
        amx_refused=not granted,
    )


def onednn_restriction(environ: Mapping[str, str] | None = None) -> str:
    """What keeps oneDNN from instructions: ONEDNN_MAX_CPU_ISA or, without it, DNNL_MAX_CPU_ISA, as NAME=VALUE.

    Args:
        environ: the environment, by default this process's.

    Returns:
        Nothing for values that hide nothing, and for those that oneDNN does not know, which it ignores.
    """
    environ = os.environ if environ is None else environ
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        if value := environ.get(name):
            return f"{name}={value}" if value.upper() in _HIDDEN_BY_ONEDNN else ""
    return ""


def _hidden_by_onednn() -> tuple[str, ...]:
    """Beginnings of feature bits."""
    return _HIDDEN_BY_ONEDNN.get(onednn_restriction().partition("=")[2].upper(), ())


def _cpuinfo(root: Path) -> dict[str, str]:
    """The first processor's lines; the kernel takes its time to write those of hundreds."""
    entries: dict[str, str] = {}
    try:
        with open_regular(root / "proc/cpuinfo") as file:
            while line := file.readline(_LONGEST_LINE).decode("utf-8", "replace"):
                if (not line.strip() and entries) or len(entries) > _MOST_ENTRIES:
                    break
                key, _, value = line.partition(":")
                entries.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    return entries


def _numbered(folder: Path, name: str) -> tuple[int, ...]:
    """The numbers N of the files ``nameN`` in a folder."""
    try:
        found = [re.fullmatch(name + r"(\d{1,5})", entry.name) for entry in folder.iterdir()]
    except OSError:
        return ()
    return tuple(sorted(int(match[1]) for match in found if match))


def _cpu_folder(root: Path, cpu: int) -> Path:
    return root / f"sys/devices/system/cpu/cpu{cpu}"


def _cores(root: Path, cpus: Collection[int]) -> Cores:
    # Core identity comes from the sibling lists: on cloud machines the threads of a core are neighbours, elsewhere
    # they are half the machine apart, and no arithmetic on CPU numbers is right on both.
    cores: list[tuple[int, ...]] = []
    left = set(cpus)
    for cpu in cpus:
        if cpu in left:
            siblings = left & {*read_cpus(_cpu_folder(root, cpu) / "topology/thread_siblings_list"), cpu}
            cores.append(tuple(sorted(siblings)))
            left -= siblings
    return tuple(cores)


def _caches(root: Path, cpus: Iterable[int]) -> tuple[tuple[int, tuple[int, ...]], ...]:
    found: set[tuple[int, tuple[int, ...]]] = set()
    known: set[tuple[int, int]] = set()  # (index, CPU) of caches that another CPU's files have told of
    for cpu in cpus:
        for index in range(2, 5):  # 0 and 1 are the first level's
            if (index, cpu) in known:
                continue
            folder = _cpu_folder(root, cpu) / f"cache/index{index}"
            level, sharers = read_number(folder / "level"), read_cpus(folder / "shared_cpu_list")
            if level is not None and level >= 2 and sharers:
                found.add((level, sharers))
                known.update((index, sharer) for sharer in sharers)
    return tuple(sorted(found))


def _domains(
    root: Path,
    cores: Cores,
    caches: Iterable[tuple[int, tuple[int, ...]]],
    flags: Set[str],
    mems: Set[int] | None,
) -> tuple[tuple[Domain, ...], tuple[MemoryNode, ...]]:
    folder = root / "sys/devices/system/node"
    numbers = _numbered(folder, "node")
    listed = {number: set(read_cpus(folder / f"node{number}/cpulist")) for number in numbers}
    memory = {number: _memory_mb(folder / f"node{number}/meminfo") for number in numbers}
    usable = {number: memory[number] if mems is None or number in mems else 0 for number in numbers}
    of_domain: dict[int, list[tuple[int, ...]]] = {}
    first = next((number for number in numbers if listed[number]), 0)
    for core in cores:
        home = next((number for number in numbers if core[0] in listed[number]), first)
        of_domain.setdefault(home, []).append(core)
    shared = sorted(caches, reverse=True)  # the last level first
    domains = tuple(
        Domain(
            number,
            max(0, read_number(_cpu_folder(root, members[0][0]) / "topology/physical_package_id") or 0),
            tuple(sorted(members, key=lambda core: _place(core, shared))),
            usable.get(number, 0),
        )
        for number, members in of_domain.items()
    )
    domains = tuple(sorted(domains, key=lambda domain: (domain.package, domain.number)))
    packages = len({domain.package for domain in domains})
    with_cpus = [number for number in numbers if listed[number]]
    near = {
        number: tuple(one for one in _nearest(folder, number, numbers, with_cpus) if one in of_domain)
        for number in numbers
        if not listed[number] and usable[number] > 0
    }
    mine = [number for number, nearest in near.items() if nearest]
    on_package = sum(usable[number] for number in mine) <= packages * _LARGEST_ON_PACKAGE_MB
    return domains, tuple(
        MemoryNode(number, usable[number], _kind(folder, number, with_cpus, flags, on_package=on_package), near[number])
        for number in mine
    )


def _place(core: tuple[int, ...], caches: Iterable[tuple[int, tuple[int, ...]]]) -> tuple[int, ...]:
    """Sorts cores that share a cache beside each other: the first CPU of each of its caches, outermost first."""
    return (*(cpus[0] for _, cpus in caches if core[0] in cpus), core[0])


def _memory_mb(meminfo: Path) -> int:
    match = re.search(r"MemTotal:\s*(\d{1,18}) kB", read_text(meminfo))
    return int(match[1]) // 1024 if match else 0


def _nearest(folder: Path, number: int, numbers: tuple[int, ...], domains: list[int]) -> tuple[int, ...]:
    """The domains at the smallest distance; all of them where the kernel gives no distances."""
    distances = read_text(folder / f"node{number}/distance").split()
    known = [one for one in map(as_number, distances) if one is not None]
    if not len(known) == len(distances) == len(numbers):
        return tuple(domains)
    away = {domain: known[numbers.index(domain)] for domain in domains}
    return tuple(domain for domain in domains if away[domain] == min(away.values()))


def _kind(folder: Path, number: int, domains: list[int], flags: Set[str], *, on_package: bool) -> str:
    """MCDRAM, HBM or far.

    By the bandwidth that firmware tells the kernel (ACPI HMAT), where it does; else by the instruction set that only
    Xeon Phi has, or by the size, since no package has had more than 64 GiB on it and memory on devices comes larger.
    """
    if "avx512er" in flags:
        return "MCDRAM"
    own = read_number(folder / f"node{number}/access0/initiators/read_bandwidth")
    others = [read_number(folder / f"node{other}/access0/initiators/read_bandwidth") for other in domains]
    known = [bandwidth for bandwidth in others if bandwidth]
    if own and known:
        return "HBM" if own > max(known) else "far"
    return "HBM" if on_package else "far"
