"""Where oneCCL is on this machine, and what it is told about it. Imports no torch."""

from __future__ import annotations

import contextlib
import ctypes.util
import functools
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knltrain.errors import ConfigError
from knltrain.launch.world import Ranks

TRANSPORTS = ("ofi", "mpi")
_LIBRARY = "libccl.so.1"
_LOG_LEVEL = "error"


class UnavailableError(Exception):
    """OneCCL cannot be used here; the message says why, and what would help."""


@functools.cache
def find_library() -> Path:
    """Returns the CPU library: of the oneAPI that CCL_ROOT names, of the package oneccl-devel, or on the search path.

    The package also holds a library for GPUs under the same name, which does not load without Intel's SYCL runtime.

    Raises:
        UnavailableError: there is none.
    """
    root = os.environ.get("CCL_ROOT")
    if root:
        for folder in ("lib/ccl/cpu/lib", "lib/cpu", "lib"):
            if (path := Path(root, folder, _LIBRARY)).exists():
                return path
        raise UnavailableError(f"CCL_ROOT={root} holds no {_LIBRARY}; unset it or correct it")
    packaged = _of_package("oneccl-devel", f"/ccl/cpu/lib/{_LIBRARY}")
    if packaged:
        return packaged
    if ctypes.util.find_library("ccl"):
        return Path(_LIBRARY)
    raise UnavailableError("oneCCL is not installed; pip install 'oneccl-devel==2021.13.1' 'impi-rt>=2021.13,<2022'")


def _of_package(name: str, ending: str) -> Path | None:
    """The first file of an installed package whose path ends so."""
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = (Path(os.path.normpath(file.locate())) for file in files if str(file).endswith(ending))
    return next((path for path in paths if path.exists()), None)


@functools.cache
def load() -> Any:
    """Opens oneCCL and returns the module that calls it. Its settings have to be in the environment before.

    Raises:
        UnavailableError: oneCCL or the compiled part of this package is missing or does not load.
    """
    try:
        shim = importlib.import_module("knltrain._kernels").ccl
    except ImportError as error:
        raise UnavailableError(
            f"knltrain was installed without its compiled part ({error}); install g++, then install knltrain again"
        ) from None
    path = find_library()
    try:
        shim.load(str(path))
    except RuntimeError as error:
        raise UnavailableError(f"{path} does not load: {error}") from None
    return shim


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps oneCCL's remarks on its settings off stdout, where results go, while it starts; errors are raised anyway.

    Not where the user has asked for them with ``CCL_LOG_LEVEL``, which is then not ours.
    """
    if os.environ.get("CCL_LOG_LEVEL") != _LOG_LEVEL:
        yield
        return
    sys.stdout.flush()
    stdout = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(nowhere)


@dataclass(frozen=True)
class Settings:
    """What oneCCL was told, for people and for result files.

    Attributes:
        transport: ofi (libfabric) or mpi.
        set: variables that knltrain set.
        kept: variables that were there already and stay as they are.
    """

    transport: str
    set: dict[str, str]
    kept: dict[str, str]


def exported_workers(environ: Mapping[str, str] | None = None) -> str:
    """How many threads of its own the user has told oneCCL to start; empty where it was told nothing."""
    environ = os.environ if environ is None else environ
    return environ.get("CCL_WORKER_COUNT") or ("1" if "CCL_WORKER_AFFINITY" in environ else "")


def configure(
    ranks: Ranks,
    cpus: Sequence[int] = (),
    environ: MutableMapping[str, str] | None = None,
    *,
    told: Mapping[str, str] | None = None,
) -> Settings:
    """Sets the variables that oneCCL and libfabric read when they start. What the user has exported stays.

    Where no cores are kept for them, oneCCL starts no threads of its own: they would take the cores that the ranks
    compute on. The thread that waits does the work.

    Args:
        ranks: this process among its peers.
        cpus: logical CPUs that are kept for this rank's workers, one each.
        environ: the environment, by default this process's.
        told: what knltrain has set there already: the interface.

    Raises:
        ConfigError: ``CCL_ATL_TRANSPORT`` names no transport, or mpi where no mpiexec is.
        UnavailableError: the library of the transport is missing.
    """
    environ = os.environ if environ is None else environ
    transport = environ.get("CCL_ATL_TRANSPORT", "ofi")
    if transport not in TRANSPORTS:
        raise ConfigError(f"CCL_ATL_TRANSPORT={transport}: oneCCL has {' and '.join(TRANSPORTS)}; unset it or name one")
    if transport == "mpi" and ranks.launcher != "hydra":
        raise ConfigError(
            f"CCL_ATL_TRANSPORT=mpi needs ranks that Intel MPI's mpiexec has started, not {ranks.launcher}; unset it"
        )
    workers: dict[str, str] = {}
    has_workers = bool(exported_workers(environ))
    if cpus and not has_workers:
        has_workers = True
        # oneCCL expects the CPUs of all workers of the node, rank by rank, and takes its own from their place in it.
        all_cpus = ",".join(map(str, [*cpus] * ranks.local_size))
        workers = {"CCL_WORKER_COUNT": str(len(cpus)), "CCL_WORKER_AFFINITY": all_cpus}
    wanted = {
        **workers,
        "CCL_ATL_TRANSPORT": transport,
        # Each setting of ours would be a warning.
        "CCL_LOG_LEVEL": _LOG_LEVEL,
        "CCL_WORKER_OFFLOAD": str(int(has_workers)),
        **_libraries(transport, environ),
    }
    if transport == "ofi":
        # Ranks of one node go through shared memory. Told by us, so that it does not matter who started them.
        wanted |= {"CCL_ATL_SHM": "1", "CCL_PROCESS_LAUNCHER": "none",
                   "CCL_LOCAL_RANK": str(ranks.local_rank), "CCL_LOCAL_SIZE": str(ranks.local_size)}  # fmt: skip
    of_ccl = {name: value for name, value in environ.items() if name.startswith(("CCL_", "FI_"))}
    ours = {name: value for name, value in of_ccl.items() if name in (told or {})}
    kept = {name: value for name, value in of_ccl.items() if name not in ours}
    missing = {name: value for name, value in wanted.items() if name not in environ}
    environ.update(missing)
    return Settings(transport, missing | ours, kept)


def _libraries(transport: str, environ: MutableMapping[str, str]) -> dict[str, str]:
    """Where libfabric, its providers and MPI are; an oneAPI that the user has set up (I_MPI_ROOT) finds its own."""
    if "I_MPI_ROOT" in environ:
        return {}
    found: dict[str, str] = {}
    if fabric := _of_package("impi-rt", "/libfabric.so.1"):
        found["CCL_OFI_LIBRARY_PATH"] = str(fabric)
        if provider := _of_package("impi-rt", "/libtcp-fi.so"):
            found["FI_PROVIDER_PATH"] = str(provider.parent)
    elif not ctypes.util.find_library("fabric"):
        raise UnavailableError("libfabric is not installed, without which oneCCL has no transport; pip install impi-rt")
    if mpi := _of_package("impi-rt", "/libmpi.so.12"):
        found |= {"CCL_MPI_LIBRARY_PATH": str(mpi), "I_MPI_ROOT": str(mpi.parent.parent)}
    elif transport == "mpi" and not ctypes.util.find_library("mpi"):
        raise UnavailableError("CCL_ATL_TRANSPORT=mpi needs Intel MPI; pip install impi-rt, or unset CCL_ATL_TRANSPORT")
    return found
