"""Topology of this node: packages, NUMA domains, cores, caches, memory, and instruction sets."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from knltrain.errors import ConfigError, one_line
from knltrain.files import open_regular
from knltrain.node.amx import kernel_grants_amx, knows_amx
from knltrain.node.cgroup import read_limits
from knltrain.node.cpulist import as_number, read_cpu_mask, read_cpus, read_number, read_text

Cores = tuple[tuple[int, ...], ...]

# Prefixes of the /proc/cpuinfo flags that oneDNN does not use under each value of ONEDNN_MAX_CPU_ISA (its
# documentation, "CPU Dispatcher Control"). PyTorch multiplies bf16 with oneDNN only.
_ABOVE_CORE = ("amx_", "avx512_fp16", "avx512_bf16")
_ABOVE_AVX2 = (*_ABOVE_CORE, "avx512_vnni", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512cd")
_ABOVE_AVX = (*_ABOVE_AVX2, "avx_vnni", "avx2")
_HIDDEN_BY_ONEDNN = {
    "SSE41": (*_ABOVE_AVX, "avx"),
    "AVX": _ABOVE_AVX,
    **dict.fromkeys(("AVX2", "AVX2_VNNI", "AVX2_VNNI_2"), _ABOVE_AVX2),
    **dict.fromkeys(("AVX512_CORE", "AVX512_CORE_VNNI"), _ABOVE_CORE),
    # AVX512_FP16, which the first of them hides too, is kept: it identifies the cores.
    **dict.fromkeys(("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512"), ("amx_",)),
}
# Names of a CPU's siblings in its core, as a list or a mask: the first of each pair since Linux 2.6, where lists came
# later than masks, the second since 5.3.
_SIBLING_LISTS = ("thread_siblings_list", "core_cpus_list")
_SIBLING_MASKS = ("thread_siblings", "core_cpus")
# Models of family 6 that are Xeon Phi: Knights Landing and Knights Mill.
_XEON_PHI_MODELS = ("87", "133")
# Limits for /proc/cpuinfo, whose lines have some thousand characters and processors some thirty lines.
_MAX_LINE, _MAX_ENTRIES = 1 << 16, 1000


@dataclass(frozen=True)
class Domain:
    """A NUMA (or sub-NUMA) domain with cores that this process may use.

    Attributes:
        number: the kernel's node number.
        package: number of its package.
        cores: one tuple of logical CPUs per core; cores that share caches are side by side.
        memory_mb: its own memory, MiB; 0 if it has none, or none that this process may use.
    """

    number: int
    package: int
    cores: Cores
    memory_mb: int = 0


@dataclass(frozen=True)
class MemoryNode:
    """Memory without cores of its own: MCDRAM or HBM in flat mode, or memory on a device.

    Attributes:
        number: the kernel's node number.
        memory_mb: size, MiB.
        kind: MCDRAM, HBM, "far", which is no faster than the domains' own memory, or "unknown".
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
        flags: feature flags as in /proc/cpuinfo, without those that the kernel does not allow and those that
            ONEDNN_MAX_CPU_ISA hides from oneDNN. Choices depend on these, never on the vendor's name.
        cpus: logical CPUs this process may run on.
        cores: the same CPUs, one tuple of hardware threads per physical core.
        online: logical CPUs of the whole machine.
        domains: the NUMA domains of ``cpus``, at least one.
        memory_nodes: memory without cores that this process may use.
        caches: level and sharing logical CPUs of each cache of level 2 or higher.
        group_cpus: logical CPUs that the control group allows; fewer than ``online`` in a container.
        memory_limit_mb: the control group's limit for all of its processes, MiB; None without a limit.
        cpu_quota: the control group's CPU seconds per second; None without a limit.
        amx_refused: the processor has AMX, and the kernel does not grant it.
        packages: number of packages of ``cpus``; 0 for those of the domains.
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
    packages: int = 0

    def __post_init__(self) -> None:
        if not self.domains:
            object.__setattr__(self, "domains", (Domain(0, 0, self.cores),))
        if not self.group_cpus:
            object.__setattr__(self, "group_cpus", tuple(range(self.online)))
        if not self.packages:
            object.__setattr__(self, "packages", len({domain.package for domain in self.domains}))

    @property
    def computes_bf16(self) -> bool:
        """Whether the processor has bf16 instructions, AVX512_BF16 or AMX."""
        return bool(self.flags & {"avx512_bf16", "amx_bf16"})

    @property
    def gains_from_bf16(self) -> bool:
        """Whether bf16 products are faster than fp32 products.

        Sapphire Rapids and later without AMX, hidden by a hypervisor or the kernel, multiply bf16 at half of the fp32
        rate [perf/results]. They have AVX512_FP16, which Cooper Lake, fast without AMX, has not. AMD's processors,
        whose AVX512_BF16 is fast, have SSE4A.
        """
        amx_is_hidden = "avx512_fp16" in self.flags and not self.flags & {"amx_bf16", "sse4a"}
        return self.computes_bf16 and not amx_is_hidden

    @property
    def isa(self) -> str:
        """The widest instruction set that knltrain uses, for people and for result files."""
        for bit in ("amx_bf16", "avx512_bf16", "avx512bw", "avx512f", "avx2"):
            if bit in self.flags:
                return "avx512" if bit == "avx512bw" else bit
        return "baseline"


def read_node(root: str | Path = "/", allowed: Set[int] | None = None) -> Node:
    """Reads sysfs and procfs. Missing or damaged files are ignored; the default is one domain, one thread per core.

    For this machine (``/``), the CPU mask comes from the scheduler, AMX permission is requested from the kernel, and
    ONEDNN_MAX_CPU_ISA is read. For any other root, only files under it are read.

    Args:
        root: the folder of ``sys`` and ``proc``, which may be a copy from another node.
        allowed: logical CPUs that this process may use; by default the scheduler's mask, in a copy those that the
            control group allows.
    """
    root = Path(root)
    live = root == Path("/")
    limits = read_limits(root)
    cpuinfo = _cpuinfo(root)
    online = read_cpus(root / "sys/devices/system/cpu/online") or _online(root)
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
    domains, memory_nodes = _domains(root, cores, caches, _is_xeon_phi(cpuinfo), limits.mems)
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
        packages=len({_package(root, core[0]) for core in cores}),
    )


def refuse_incomplete(root: Path, node: Node) -> None:
    """Refuses a copy of a node's files without those that tell its cores and domains; they would be guessed.

    Args:
        root: the folder of the copy.
        node: what was read there.

    Raises:
        ConfigError: which files are missing, of which CPU or domain.
    """
    for cpu in node.group_cpus:
        folder = _cpu_folder(root, cpu) / "topology"
        if cpu not in _siblings(folder):
            raise ConfigError(_INCOMPLETE.format(folder, "thread_siblings_list nor thread_siblings", f"CPU {cpu}"))
    nodes = root / "sys/devices/system/node"
    for number in _numbered(nodes, "node"):
        folder = nodes / f"node{number}"
        if not (folder / "cpulist").exists() and not read_text(folder / "cpumap"):
            raise ConfigError(_INCOMPLETE.format(folder, "cpulist nor cpumap", f"NUMA domain {number}"))


_INCOMPLETE = "{}: neither {} of {}, which would be guessed; docs/clusters.md says how to copy the files of a node"


def onednn_restriction(environ: Mapping[str, str] | None = None) -> str:
    """Returns the variable that restricts oneDNN, ONEDNN_MAX_CPU_ISA or else DNNL_MAX_CPU_ISA, as NAME=VALUE.

    Args:
        environ: the environment, by default this process's.

    Returns:
        NAME=VALUE; empty for values that hide nothing, and for unknown ones, which oneDNN ignores.
    """
    environ = os.environ if environ is None else environ
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        if value := environ.get(name):
            return f"{name}={value}" if value.upper() in _HIDDEN_BY_ONEDNN else ""
    return ""


def _hidden_by_onednn() -> tuple[str, ...]:
    """Returns prefixes of the flags that oneDNN may not use."""
    return _HIDDEN_BY_ONEDNN.get(onednn_restriction().partition("=")[2].upper(), ())


def _cpuinfo(root: Path) -> dict[str, str]:
    """Returns the first processor's fields; reading those of hundreds of processors is slow."""
    entries: dict[str, str] = {}
    try:
        with open_regular(root / "proc/cpuinfo") as file:
            while line := file.readline(_MAX_LINE).decode("utf-8", "replace"):
                if (not line.strip() and entries) or len(entries) > _MAX_ENTRIES:
                    break
                key, _, value = line.partition(":")
                entries.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    return entries


def _numbered(folder: Path, name: str) -> tuple[int, ...]:
    """Returns the numbers N of the files ``nameN`` in a folder."""
    try:
        found = [re.fullmatch(name + r"(\d{1,5})", entry.name) for entry in folder.iterdir()]
    except OSError:
        return ()
    return tuple(sorted(int(match[1]) for match in found if match))


def _online(root: Path) -> tuple[int, ...]:
    """Returns the CPUs that are online where the kernel, or a copy, has no list of them."""
    numbered = _numbered(root / "sys/devices/system/cpu", "cpu")
    with_topology = tuple(cpu for cpu in numbered if (_cpu_folder(root, cpu) / "topology").is_dir())
    return tuple(cpu for cpu in with_topology or numbered if read_text(_cpu_folder(root, cpu) / "online") != "0")


def _read_set(folder: Path, lists: Iterable[str], masks: Iterable[str]) -> tuple[int, ...]:
    """Returns the CPUs in the first of these files that has any; kernels before 2.6.25 have masks alone."""
    found = (read(folder / name) for read, names in ((read_cpus, lists), (read_cpu_mask, masks)) for name in names)
    return next((cpus for cpus in found if cpus), ())


def _siblings(topology: Path) -> tuple[int, ...]:
    return _read_set(topology, _SIBLING_LISTS, _SIBLING_MASKS)


def _package(root: Path, cpu: int) -> int:
    return max(0, read_number(_cpu_folder(root, cpu) / "topology/physical_package_id") or 0)


def _is_xeon_phi(cpuinfo: Mapping[str, str]) -> bool:
    """Whether the cores are Knights Landing's or Knights Mill's; the flags may be hidden, or missing in a copy."""
    family, model = (cpuinfo.get(name, "") for name in ("cpu family", "model"))
    return "avx512er" in cpuinfo.get("flags", "").split() or (family == "6" and model in _XEON_PHI_MODELS)


def _cpu_folder(root: Path, cpu: int) -> Path:
    return root / f"sys/devices/system/cpu/cpu{cpu}"


def _cores(root: Path, cpus: Collection[int]) -> Cores:
    # Cores come from the sibling lists: on cloud machines the threads of a core have adjacent numbers, elsewhere they
    # are half the machine apart, so arithmetic on CPU numbers would be wrong on one of them.
    cores: list[tuple[int, ...]] = []
    left = set(cpus)
    for cpu in cpus:
        if cpu in left:
            siblings = left & {*_siblings(_cpu_folder(root, cpu) / "topology"), cpu}
            cores.append(tuple(sorted(siblings)))
            left -= siblings
    return tuple(cores)


def _caches(root: Path, cpus: Iterable[int]) -> tuple[tuple[int, tuple[int, ...]], ...]:
    found: set[tuple[int, tuple[int, ...]]] = set()
    known: set[tuple[int, int]] = set()  # (index, CPU) of caches already found through another CPU
    for cpu in cpus:
        for index in range(2, 5):  # 0 and 1 are the first level's
            if (index, cpu) in known:
                continue
            folder = _cpu_folder(root, cpu) / f"cache/index{index}"
            level, sharers = read_number(folder / "level"), _read_set(folder, ["shared_cpu_list"], ["shared_cpu_map"])
            if level is not None and level >= 2 and sharers:
                found.add((level, sharers))
                known.update((index, sharer) for sharer in sharers)
    return tuple(sorted(found))


def _domains(
    root: Path,
    cores: Cores,
    caches: Iterable[tuple[int, tuple[int, ...]]],
    is_xeon_phi: bool,
    mems: Set[int] | None,
) -> tuple[tuple[Domain, ...], tuple[MemoryNode, ...]]:
    folder = root / "sys/devices/system/node"
    numbers = _numbered(folder, "node")
    listed = {number: set(_read_set(folder / f"node{number}", ["cpulist"], ["cpumap"])) for number in numbers}
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
            _package(root, members[0][0]),
            tuple(sorted(members, key=lambda core: _cache_order(core, shared))),
            usable.get(number, 0),
        )
        for number, members in of_domain.items()
    )
    domains = tuple(sorted(domains, key=lambda domain: (domain.package, domain.number)))
    with_cpus = [number for number in numbers if listed[number]]
    near = {
        number: tuple(one for one in _nearest(folder, number, numbers, with_cpus) if one in of_domain)
        for number in numbers
        if not listed[number] and usable[number] > 0
    }
    return domains, tuple(
        MemoryNode(number, usable[number], "MCDRAM" if is_xeon_phi else _kind(folder, number, nearest), nearest)
        for number, nearest in near.items()
        if nearest
    )


def _cache_order(core: tuple[int, ...], caches: Iterable[tuple[int, tuple[int, ...]]]) -> tuple[int, ...]:
    """Returns a sort key that puts cores with a common cache side by side: first CPU of each cache, outermost first."""
    return (*(cpus[0] for _, cpus in caches if core[0] in cpus), core[0])


def _memory_mb(meminfo: Path) -> int:
    match = re.search(r"MemTotal:\s*(\d{1,18}) kB", read_text(meminfo))
    return int(match[1]) // 1024 if match else 0


def _nearest(folder: Path, number: int, numbers: tuple[int, ...], domains: list[int]) -> tuple[int, ...]:
    """Returns the domains that firmware says are nearest, or else those at the smallest distance, or else all."""
    for initiators in _initiators(folder, number):
        if named := tuple(one for one in _numbered(initiators, "node") if one in domains):
            return named
    distances = read_text(folder / f"node{number}/distance").split()
    known = [one for one in map(as_number, distances) if one is not None]
    if not len(known) == len(distances) == len(numbers):
        return tuple(domains)
    away = {domain: known[numbers.index(domain)] for domain in domains}
    return tuple(domain for domain in domains if away[domain] == min(away.values()))


def _kind(folder: Path, number: int, nearest: Iterable[int]) -> str:
    """Returns the kind of a memory node: HBM, far or unknown, by its bandwidth against that of the nearest domains.

    Firmware reports bandwidths (ACPI HMAT). Without them persistent memory, memory behind CXL and HBM look alike.
    """
    own, others = _bandwidth(folder, number), [_bandwidth(folder, domain) for domain in nearest]
    if not own or not all(others):
        return "unknown"
    return "HBM" if own > max(others) else "far"


def _bandwidth(folder: Path, number: int) -> int:
    """Returns the bandwidth of a domain's memory to the CPUs nearest to it, in MB/s; 0 if the kernel does not know."""
    known = (read_number(initiators / "read_bandwidth") for initiators in _initiators(folder, number))
    return next((value for value in known if value), 0)


def _initiators(folder: Path, number: int) -> list[Path]:
    """Returns the folders about what reaches a domain's memory best (ACPI HMAT, Linux 5.2)."""
    # Class 1 is of CPUs alone, class 0 may be that of a device that has the memory.
    return [folder / f"node{number}/access{access}/initiators" for access in (1, 0)]
