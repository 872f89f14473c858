"""Kernel support for AMX: a process must request permission to use the tile registers.

https://docs.kernel.org/arch/x86/xstate.html: arch_prctl(ARCH_REQ_XCOMP_PERM, 18). Kernels before 5.16 do not have
the request, and a sandbox may forbid it; tile instructions then kill the process.
"""

from __future__ import annotations

import ctypes
import platform
import re

_SYS_ARCH_PRCTL = 158
_ARCH_REQ_XCOMP_PERM = 0x1023
_XFEATURE_XTILEDATA = 18


def kernel_grants_amx() -> bool:
    """Requests the tile registers as oneDNN does, and returns whether they were granted, for the whole process."""
    if platform.machine() != "x86_64":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, ctypes.c_ulong(_XFEATURE_XTILEDATA)) == 0)


def knows_amx(release: str) -> bool:
    """Whether a kernel of this release has the request: 5.16 and later."""
    found = re.match(r"(\d{1,4})\.(\d{1,4})\b", release)
    return found is not None and (int(found[1]), int(found[2])) >= (5, 16)
