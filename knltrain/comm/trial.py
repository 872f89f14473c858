"""A start of oneCCL in a process of its own: where libfabric ends that process, a rank is spared."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping

from knltrain.comm import oneccl
from knltrain.comm.segments import remove_segments_of

# An idle machine takes less than a second.
_TIMEOUT_S = 60.0


def try_oneccl(settings: oneccl.Settings) -> None:
    """Starts oneCCL as this rank would, alone, with the settings in the environment.

    Not over MPI: a process that mpiexec has not started cannot initialize it.

    Args:
        settings: as :func:`oneccl.configure` has found them.

    Raises:
        UnavailableError: it does not start; has its first error, and the user's variables that it reads.
    """
    if settings.transport == "mpi":
        return
    with subprocess.Popen(
        [sys.executable, "-m", "knltrain.comm.trial"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
    ) as process:  # fmt: skip
        try:
            _, errors = process.communicate(timeout=_TIMEOUT_S)
            ended = process.returncode
        except subprocess.TimeoutExpired:
            errors, ended = f"no answer in {_TIMEOUT_S:g} s", 1
        finally:
            process.kill()
    remove_segments_of(process.pid)
    if ended:
        reason = f"oneCCL does not start here ({_reason(errors, ended)})"
        raise oneccl.UnavailableError(f"{reason}{_exported(settings.kept)}")


def _reason(errors: str, ended: int) -> str:
    logged = re.findall(r"\|CCL_ERROR\|\s*(.*)", errors)
    lines = logged[:1] or errors.strip().splitlines()[-1:]
    by = f"ended by {signal.Signals(-ended).name}" if ended < 0 else ""
    return "; ".join(filter(None, [*lines, by]))


def _exported(kept: Mapping[str, str]) -> str:
    found = " ".join(f"{name}={value}" for name, value in kept.items())
    return f" with {found}; correct or unset these" if found else ""


def _main() -> None:
    shim = oneccl.load()
    shim.connect(1, 0, shim.open_meeting_point())
    os._exit(0)  # it has started; its end may hang where there is no hardware


if __name__ == "__main__":
    _main()
