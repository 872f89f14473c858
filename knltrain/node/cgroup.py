"""Limits of a process's control groups, in version 1, version 2 and hybrid hierarchies.

cgroup v2: https://docs.kernel.org/admin-guide/cgroup-v2.html; v1: https://docs.kernel.org/admin-guide/cgroup-v1/.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from knltrain.node.cpulist import as_number, read_cpus, read_number, read_text

# Version 1 writes "no limit" as the largest number of whole pages.
_NO_LIMIT = 1 << 60
_MAX_PATH = 4096  # PATH_MAX of <linux/limits.h>


@dataclass(frozen=True)
class Limits:
    """The tightest limits of all groups that a process is in; None means no limit.

    Attributes:
        cpus: logical CPUs of the cpuset.
        mems: NUMA domains whose memory may be used.
        memory_mb: memory of all processes of the group, MiB.
        cpu_quota: CPU seconds per second.
    """

    cpus: frozenset[int] | None = None
    mems: frozenset[int] | None = None
    memory_mb: float | None = None
    cpu_quota: float | None = None


def read_limits(root: Path) -> Limits:
    """Reads the limits of the process whose /proc/self is under ``root``.

    Limits of parent groups count as well. A container may see the host's path of its group, while the group itself is
    the root of the container's mount: then the root's files are read.
    """
    cpus: frozenset[int] | None = None
    mems: frozenset[int] | None = None
    memory: list[int] = []
    quotas: list[float] = []
    for folder in _groups(root, "cpuset"):
        cpus = _intersect(cpus, _read_cpuset(folder, "cpus"))
        mems = _intersect(mems, _read_cpuset(folder, "mems"))
    for folder in _groups(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limit = read_number(folder / name)
            if limit is not None and 0 < limit < _NO_LIMIT:
                memory.append(limit)
    for folder in _groups(root, "cpu"):
        quota, period = [*read_text(folder / "cpu.max").split(), "", ""][:2]
        for numerator, denominator in (
            (quota, period),
            (read_text(folder / "cpu.cfs_quota_us"), read_text(folder / "cpu.cfs_period_us")),
        ):
            share, whole = as_number(numerator), as_number(denominator)
            if share is not None and share >= 0 and whole is not None and whole > 0:
                quotas.append(share / whole)
    return Limits(cpus, mems, min(memory) / 2**20 if memory else None, min(quotas) if quotas else None)


def _read_cpuset(folder: Path, name: str) -> tuple[int, ...]:
    # The effective set includes the parents' limits; version 1 without it has only the configured set.
    files = (f"cpuset.{name}.effective", f"cpuset.effective_{name}", f"cpuset.{name}")
    return next((found for file in files if (found := read_cpus(folder / file))), ())


def _intersect(set_so_far: frozenset[int] | None, found: tuple[int, ...]) -> frozenset[int] | None:
    """Returns the intersection; a set that is empty, or disjoint from the others, is ignored."""
    if not found:
        return set_so_far
    return (frozenset(found) if set_so_far is None else set_so_far & set(found)) or set_so_far


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yields the folders of the group and its parents, innermost first, in each hierarchy with the controller."""
    base = root / "sys/fs/cgroup"
    paths = {"": "/", controller: "/"}
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, names, path = [*line.split(":", 2), "", ""][:3]
        # A path outside the cgroup namespace starts with /.. .
        inside = "/" if ".." in PurePosixPath(path).parts or len(path) > _MAX_PATH else path
        for name in names.split(","):
            paths[name] = inside
    try:
        mounted = sorted(folder for folder in base.iterdir() if controller in folder.name.split(","))
    except OSError:
        mounted = []
    for top, path in [(base, paths[""]), (base / "unified", paths[""]), *((one, paths[controller]) for one in mounted)]:
        relative = PurePosixPath(path.lstrip("/"))
        for part in (relative, *relative.parents):
            yield top / part
