"""What else runs on the CPUs of a rank: all its threads wait for the one that is kept from its core.

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

_LOOK_S = 30.0
# What daemons take now and then, and what the kernel miscounts of many CPUs, by ticks, is not worth a warning.
_LITTLE_CPUS, _LITTLE_SHARE = 0.25, 0.01


class CpuContention(NamedTuple):
    """CPUs' worth of time that this process did not have, though it was spent.

    Attributes:
        other: on other processes, beyond what this one has to spare.
        steal: on other virtual machines, by the hypervisor.
    """

    other: float = 0.0
    steal: float = 0.0


class _Sample(NamedTuple):
    """Seconds until now.

    Attributes:
        wall: by the clock.
        own: of this process and its children, on any CPU.
        busy: of all processes on its CPUs.
        stolen: of other machines there.
    """

    wall: float
    own: float
    busy: float
    stolen: float


class CpuContentionMonitor:
    """Watches what others take of some CPUs, from when it is made.

    Args:
        cpus: logical CPUs, of all threads of this process.
        stat: the kernel's count of what each CPU did.
        spare: how many of them others may take without a thread having to wait.
    """

    def __init__(self, cpus: Collection[int], stat: Path = Path("/proc/stat"), *, spare: int = 0) -> None:
        self._cpus, self._stat, self._spare = frozenset(cpus), stat, spare
        self._first = self._last = self._sample()
        self._said = False

    def taken(self) -> CpuContention:
        """The mean since this was made; zeros where the kernel does not say it."""
        return self._between(self._first, self._sample())

    def problem(self) -> str:
        """Looks every half a minute, and says, once, what others took in it; empty as long as that is little."""
        if self._said or self._last is None or time.monotonic() - self._last.wall < _LOOK_S:
            return ""
        before, self._last = self._last, self._sample()
        if text := self.describe(self._between(before, self._last)):
            self._said = True
        return text

    def describe(self, taken: CpuContention) -> str:
        """What was taken, for people; empty where that is little."""
        much = max(_LITTLE_CPUS, _LITTLE_SHARE * len(self._cpus))
        went = [f"{taken.other:.1f} went to other processes (`top` has their names)"] if taken.other > much else []
        if taken.steal > much:
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
        if found < len(self._cpus):  # a container whose own CPUs are counted from 0
            return None
        reaped = os.times()
        own = time.process_time() + reaped.children_user + reaped.children_system + _of_children("self") / tick
        return _Sample(time.monotonic(), own, busy / tick, stolen / tick)

    def _between(self, before: _Sample | None, after: _Sample | None) -> CpuContention:
        if before is None or after is None or after.wall <= before.wall:
            return CpuContention()
        wall, own, busy, stolen = (now - then for now, then in zip(after, before, strict=True))
        return CpuContention(max(0.0, (busy - own) / wall - self._spare), max(0.0, stolen / wall))


def _of_children(process: str) -> int:
    """Ticks of a process's living children, such as torch.compile's compilers, of theirs, and of theirs that ended."""
    ticks = 0
    for listed in Path("/proc", process, "task").glob("*/children"):
        for child in read_text(listed).split():
            fields = read_text(Path("/proc", child, "stat")).rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15])) + _of_children(child)
    return ticks
