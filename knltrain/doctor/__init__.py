"""What is wrong with a machine: first what can be seen without torch, then what has to be tried with it.

Torch is tried in a process of its own (``computing.py``): what it dies of here is what the doctor was called for.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

from knltrain.doctor import network
from knltrain.doctor.child import try_out
from knltrain.doctor.finding import Finding, run_check
from knltrain.doctor.machine import CHECKS, read_machine

# Each reads a few small files, or asks the resolver for this host's name.
_LIMIT_S = 5.0
_TRIED = ("kernels", "engines", "openmp", "all-reduce", "oneccl")


def examine(data: Path | None = None) -> list[Finding]:
    """Runs all checks; none of them raises, and none waits for ever.

    Args:
        data: a data folder to be tried as well.
    """
    machine = read_machine()
    checks = {**CHECKS, "interface": network.interface, "libfabric": network.libfabric}
    findings = [run_check(name, functools.partial(check, machine), _LIMIT_S) for name, check in checks.items()]
    tried = (*_TRIED, "data") if data else _TRIED
    if importlib.util.find_spec("torch") is None:
        without = Finding(
            "torch",
            "warning",
            f"torch is not installed in this environment: {', '.join(tried)} were left out",
            "nothing can be trained here; as it should be on a login node",
            "on a node that trains: pip install 'torch>=2.8'",
        )
        return [*findings, without]
    return [*findings, *try_out(tried, data)]
