"""Allocator settings, so that malloc keeps the memory that every step needs again, and memory usage."""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Mapping

# <malloc.h>: parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_SETTINGS = {
    "mmap_threshold": (_M_MMAP_THRESHOLD, 1 << 30),
    "trim_threshold": (_M_TRIM_THRESHOLD, (1 << 31) - 1),
    "top_pad": (_M_TOP_PAD, 64 << 20),
}


def keep_freed_memory(environ: Mapping[str, str] | None = None) -> dict[str, object]:
    """Raises glibc's thresholds so that large activations are not unmapped and faulted in again at every step.

    Must run before the first tensor is allocated. Does nothing if another allocator is preloaded or the user has tuned
    glibc.

    Returns:
        The settings, or who has set others, for the run's config.json.
    """
    environ = os.environ if environ is None else environ
    preloaded = environ.get("LD_PRELOAD", "")
    for name in ("tcmalloc", "jemalloc", "mimalloc"):
        if name in preloaded:
            return {"allocator": name, "set_by": "LD_PRELOAD"}
    if "glibc.malloc" in environ.get("GLIBC_TUNABLES", ""):
        return {"allocator": "glibc", "set_by": "GLIBC_TUNABLES"}
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or not hasattr(libc, "gnu_get_libc_version"):
        return {"allocator": "not glibc", "set_by": "nobody"}
    accepted = {name: value for name, (key, value) in _SETTINGS.items() if libc.mallopt(key, value) == 1}
    return {"allocator": "glibc", "set_by": "knltrain", **accepted}


def release_freed_memory() -> None:
    """Returns free heap memory to the system; does nothing unless malloc is glibc's."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def resident_mb() -> float:
    """Returns the resident memory of this process, in MiB."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize() / 2**20


def peak_resident_mb() -> float:
    """Returns the peak resident memory of this process, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
