"""CPU contention on the CPUs of a rank: a step waits for its slowest thread, so one busy core delays all.

/proc/stat: https://docs.kernel.org/filesystems/proc.html, "Miscellaneous kernel statistics in /proc/stat".
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from knltrain.files import open_regular
from knltrain.node.cpulist import format_cpu_list, read_text

_CHECK_INTERVAL_S = 30.0
# Warn above these: below are daemons, and errors of the kernel's tick counts, which grow with the CPUs.
_WARN_CPUS, _WARN_FRACTION = 0.25, 0.01


class CpuContention(NamedTuple):
    """CPU time taken by others, in CPUs.

    Attributes:
        other: by other processes, beyond the CPUs that this one can spare.
        steal: by other virtual machines.
    """

    other: float = 0.0
    steal: float = 0.0


class _Sample(NamedTuple):
    """Cumulative times, in seconds.

    Attributes:
        wall: wall-clock time.
        own: CPU time of this process and its children, on any CPU.
        busy: CPU time of all processes on the rank's CPUs.
        stolen: steal time on these CPUs.
    """

    wall: float
    own: float
    busy: float
    stolen: float


class CpuContentionMonitor:
    """Measures the CPU time that others take on a set of CPUs, from its creation.

    Args:
        cpus: logical CPUs of all threads of this process.
        stat: the kernel's CPU times.
        spare: number of them that others may use without delaying a thread.
    """

    def __init__(self, cpus: Collection[int], stat: Path = Path("/proc/stat"), *, spare: int = 0) -> None:
        self._cpus, self._stat, self._spare = frozenset(cpus), stat, spare
        self._first = self._last = self._sample()
        self._warned = False

    def taken(self) -> CpuContention:
        """Returns the mean since creation; zeros if the kernel's times are not available."""
        return self._between(self._first, self._sample())

    def problem(self) -> str:
        """Returns a warning, once, if others took much in the last 30 s; otherwise an empty string."""
        if self._warned or self._last is None or time.monotonic() - self._last.wall < _CHECK_INTERVAL_S:
            return ""
        before, self._last = self._last, self._sample()
        if text := self.describe(self._between(before, self._last)):
            self._warned = True
        return text

    def describe(self, taken: CpuContention) -> str:
        """Describes contention, for people; empty below the warning thresholds."""
        threshold = max(_WARN_CPUS, _WARN_FRACTION * len(self._cpus))
        went = [f"{taken.other:.1f} went to other processes (`top` has their names)"] if taken.other > threshold else []
        if taken.steal > threshold:
            went.append(f"{taken.steal:.1f} went to other machines of the hypervisor")
        if not went:
            return ""
        more = f", beyond the {self._spare} that it has no thread for," if self._spare else ""
        return (
            f"of this rank's {len(self._cpus)} CPUs ({format_cpu_list(self._cpus)}){more} {' and '.join(went)}: every "
            "step waits for its slowest thread"
        )

    def _sample(self) -> _Sample | None:
        busy, stolen, tick, found = 0, 0, os.sysconf("SC_CLK_TCK"), 0
        try:
            with open_regular(self._stat) as file:
                for line in itertools.takewhile(lambda line: line.startswith(b"cpu"), file):
                    name, user, nice, system, _idle, _iowait, _irq, _softirq, steal, *_ = line.split()
                    if name != b"cpu" and int(name[3:]) in self._cpus:
                        busy, stolen = busy + int(user) + int(nice) + int(system), stolen + int(steal)
                        found += 1
        except (OSError, ValueError):
            return None
        if found < len(self._cpus):  # a container that numbers its CPUs from 0
            return None
        reaped = os.times()
        own = time.process_time() + reaped.children_user + reaped.children_system + _child_ticks("self") / tick
        return _Sample(time.monotonic(), own, busy / tick, stolen / tick)

    def _between(self, before: _Sample | None, after: _Sample | None) -> CpuContention:
        if before is None or after is None or after.wall <= before.wall:
            return CpuContention()
        wall, own, busy, stolen = (now - then for now, then in zip(after, before, strict=True))
        return CpuContention(max(0.0, (busy - own) / wall - self._spare), max(0.0, stolen / wall))


def _child_ticks(process: str) -> int:
    """Returns ticks of a process's live descendants, such as torch.compile's, and of those that they have reaped."""
    ticks = 0
    for listed in Path("/proc", process, "task").glob("*/children"):
        for child in read_text(listed).split():
            fields = read_text(Path("/proc", child, "stat")).rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15])) + _child_ticks(child)
    return ticks
