"""``knltrain doctor``: checks of a machine, first those without torch, then those with it.

Checks with torch run in a child process (``child.py``), because loading or using torch may crash or hang.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

from knltrain.doctor import network
from knltrain.doctor.child import run_torch_checks
from knltrain.doctor.finding import Finding, run_check
from knltrain.doctor.machine import CHECKS, read_machine

# Each check reads a few small files, or resolves this host's name.
_TIMEOUT_S = 5.0
_TORCH_CHECKS = ("kernels", "engines", "openmp", "all-reduce", "oneccl")


def examine(data: Path | None = None) -> list[Finding]:
    """Runs all checks. No check raises, and each has a time-out.

    Args:
        data: a data folder to check as well.
    """
    machine = read_machine()
    checks = {**CHECKS, "interface": network.interface, "libfabric": network.libfabric}
    findings = [run_check(name, functools.partial(check, machine), _TIMEOUT_S) for name, check in checks.items()]
    tried = (*_TORCH_CHECKS, "data") if data else _TORCH_CHECKS
    if importlib.util.find_spec("torch") is None:
        without = Finding(
            "torch",
            "warning",
            f"torch is not installed in this environment: {', '.join(tried)} were skipped",
            "nothing can be trained here; as it should be on a login node",
            "on a node that trains: pip install 'torch>=2.8'",
        )
        return [*findings, without]
    return [*findings, *run_torch_checks(tried, data)]
