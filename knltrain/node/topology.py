"""What this node has: cores that may be used, and the instruction sets they speak."""

from __future__ import annotations

import os
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Node:
    """The part of a machine that this process may use.

    Attributes:
        cpu_model: the processor's name, for people.
        flags: feature bits as /proc/cpuinfo spells them. Choices are made by these, never by the vendor's name.
        cpus: logical CPUs this process may run on.
        cores: the same, one tuple of hardware threads per physical core.
        online: logical CPUs of the whole machine.
    """

    cpu_model: str
    flags: frozenset[str]
    cpus: tuple[int, ...]
    cores: tuple[tuple[int, ...], ...]
    online: int

    @property
    def computes_bf16(self) -> bool:
        """Whether the processor multiplies bf16 itself, with AVX512_BF16 or AMX."""
        return bool(self.flags & {"avx512_bf16", "amx_bf16"})

    @property
    def isa(self) -> str:
        """The widest instruction set that matters here, for people and for result files."""
        for bit in ("amx_bf16", "avx512_bf16", "avx512bw", "avx512f", "avx2"):
            if bit in self.flags:
                return "avx512" if bit == "avx512bw" else bit
        return "baseline"


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """Turns the kernel's "0-3,8,10-11" into numbers."""
    cpus: list[int] = []
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            cpus.extend(range(int(first), int(last or first) + 1))
    return tuple(cpus)


def read_node(root: str | Path = "/", allowed: Set[int] | None = None) -> Node:
    """Reads sysfs and procfs.

    Args:
        root: where ``sys`` and ``proc`` are found; tests give a tree of their own.
        allowed: logical CPUs this process may use; by default what the scheduler says.
    """
    root = Path(root)
    cpuinfo = (root / "proc/cpuinfo").read_text()
    entries: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        entries.setdefault(key.strip(), value.strip())
    cpus = tuple(sorted(os.sched_getaffinity(0) if allowed is None else allowed))
    # Core identity comes from the sibling lists: on cloud machines the threads of a core are neighbours, elsewhere
    # they are half the machine apart, and no arithmetic on CPU numbers is right on both.
    cores: dict[str, list[int]] = {}
    for cpu in cpus:
        siblings = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        cores.setdefault(siblings.read_text().strip() if siblings.exists() else str(cpu), []).append(cpu)
    online = root / "sys/devices/system/cpu/online"
    return Node(
        cpu_model=entries.get("model name", "unknown"),
        flags=frozenset(entries.get("flags", "").split()),
        cpus=cpus,
        cores=tuple(tuple(core) for core in cores.values()),
        online=len(parse_cpu_list(online.read_text())) if online.exists() else len(cpus),
    )
