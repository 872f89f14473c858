"""CPU affinity and memory policy of this process: system calls."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

# Variables that bind OpenMP's threads.
BINDING_VARIABLES = ("OMP_PROC_BIND", "OMP_PLACES", "KMP_AFFINITY", "GOMP_CPU_AFFINITY")

# set_mempolicy(2), <linux/mempolicy.h>.
_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}
_DEFAULT, _PREFERRED, _PREFERRED_MANY = 0, 1, 5
_MAX_NODES = 1024


@contextmanager
def running_on(cpus: tuple[int, ...]) -> Iterator[None]:
    """Binds this thread to CPUs inside the block, for threads created there to inherit; does nothing without CPUs."""
    before = os.sched_getaffinity(0)
    try:
        if cpus:
            os.sched_setaffinity(0, cpus)
        yield
    finally:
        os.sched_setaffinity(0, before)


def prefer_memory(nodes: tuple[int, ...]) -> str:
    """Makes the calling thread, and threads it creates, prefer memory of these nodes; without nodes, local memory.

    Returns:
        Why the kernel refused; empty if it did not.
    """
    number = _SET_MEMPOLICY.get(platform.machine())
    if number is None:
        return f"unknown on {platform.machine()}"
    libc = ctypes.CDLL(None, use_errno=True)

    def call(mode: int, mask: int) -> int:
        words = (ctypes.c_ulong * (_MAX_NODES // 64))(*(mask >> 64 * i & 2**64 - 1 for i in range(_MAX_NODES // 64)))
        failed = libc.syscall(number, mode, words if mask else None, ctypes.c_ulong(_MAX_NODES if mask else 0))
        return ctypes.get_errno() if failed else 0

    mask = sum(1 << node for node in nodes)
    error = call(_PREFERRED_MANY if len(nodes) > 1 else _PREFERRED if nodes else _DEFAULT, mask)
    if error and len(nodes) > 1:  # several nodes need Linux 5.15
        error = call(_PREFERRED, 1 << nodes[0])
    return os.strerror(error) if error else ""
