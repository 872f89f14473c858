"""The launcher's process on this node, among the ancestors of this one."""

from __future__ import annotations

import os
from collections.abc import Mapping

from knltrain.errors import ConfigError
from knltrain.launch.environment import given
from knltrain.launch.launchers import LAUNCHERS


def launcher_cpus(rank: int, size: int) -> frozenset[int]:
    """Returns the CPU mask of the launcher's process on this node, which ranks inherit; empty if it is not visible."""
    try:
        return frozenset(os.sched_getaffinity(_launcher_process(rank, size)))
    except OSError:
        return frozenset()


def launcher_id(launcher: str, rank: int, size: int) -> str:
    """Returns an id that the ranks of a launcher on this node share, and no other launcher has, concurrent or earlier.

    Raises:
        ConfigError: the launcher's process is not visible.
    """
    try:
        process = _launcher_process(rank, size)
        # The start time tells it from an earlier process with the same id.
        return f"{process}-{_fields_of(process)[19]}"
    except OSError:
        raise ConfigError(
            f"rank {rank} of {size} cannot see the process of {launcher} that started it, as in a container of its "
            "own; export MASTER_ADDR=127.0.0.1 and MASTER_PORT, a free port, for all ranks"
        ) from None


def has_rank_variables(environ: Mapping[str, str], rank: int, size: int, *launchers: str) -> bool:
    """Whether variables of one of these launchers, by default of any, have this rank and size."""
    return any(
        (environ.get(one.rank), environ.get(one.size)) == (str(rank), str(size))
        for one in LAUNCHERS
        if not launchers or one.name in launchers
    )


def _launcher_process(rank: int, size: int) -> int:
    """Returns the id of the launcher's process on this node; for mpiexec, of its proxy.

    It is the first ancestor without this rank's variables: a shell, numactl or a container runtime in between has them.

    Raises:
        OSError: it is not visible from here.
    """
    process = os.getppid()
    while has_rank_variables(_environment_of(process), rank, size):
        process = int(_fields_of(process)[1])
    return process


def _environment_of(process: int) -> dict[str, str]:
    """Returns the environment that a process was started with."""
    with open(f"/proc/{process}/environ", encoding="utf-8", errors="replace") as file:
        entries = (entry.partition("=") for entry in file.read().split("\0"))
        return given({name: value for name, _, value in entries})


def _fields_of(process: int) -> list[str]:
    """Returns the fields of /proc/PID/stat after the name, which may contain anything: state, parent, and so on."""
    with open(f"/proc/{process}/stat") as stat:
        return stat.read().rpartition(")")[2].split()
