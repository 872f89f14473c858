"""What Intel's launcher puts into the environment of a training process.

``ipexrun`` and ``python -m torch.backends.xeon.run_cpu --enable-tcmalloc`` (torch 2.8, run_cpu.py, lines 369-424 and
568-620) preload tcmalloc and Intel's OpenMP, name its affinity and block time, give it one thread per physical core,
and bind the process to those cores. They look for the libraries in fewer folders than :func:`find_library` does.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from knltrain.errors import KnltrainError
from knltrain.node.topology import Node

_HINTS = {
    "libtcmalloc": "install Debian's and Ubuntu's libtcmalloc-minimal4, or gperftools from conda-forge",
    "libiomp5": "pip install intel-openmp",
}


def find_library(name: str) -> Path:
    """Finds a shared library in the Python environment, the user's and the system's folders.

    Raises:
        KnltrainError: it is nowhere; says what to install.
    """
    roots = [sys.prefix, os.environ.get("CONDA_PREFIX"), os.environ.get("VIRTUAL_ENV"), os.path.expanduser("~/.local")]
    folders = [Path(root) / "lib" for root in roots if root]
    for system in (Path("/usr/local"), Path("/usr")):
        folders += [system / "lib", system / "lib64", *sorted(system.glob("lib/*-linux-gnu"))]
    for pattern in (f"{name}.so*", f"{name}_minimal.so*"):
        for folder in folders:
            found = sorted(path for path in folder.glob(pattern) if "debug" not in path.name)
            if found:
                return found[0]
    raise KnltrainError(f"no {name}.so: {_HINTS[name]}")


def clean_environment() -> dict[str, str]:
    """The environment without what would change allocator or threads, so that all contestants start from the same."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OMP_", "KMP_", "GOMP_", "MALLOC_", "TCMALLOC_"))
        and name not in ("LD_PRELOAD", "GLIBC_TUNABLES")
    }


def launcher_environment(node: Node) -> dict[str, str]:
    """The variables that the launcher adds.

    Raises:
        KnltrainError: a library that it preloads is not installed.
    """
    return {
        "LD_PRELOAD": f"{find_library('libiomp5')}:{find_library('libtcmalloc')}",
        "OMP_NUM_THREADS": str(len(node.cores)),
        "KMP_AFFINITY": "granularity=fine,compact,1,0",
        "KMP_BLOCKTIME": "1",
    }
