"""Finding, configuring and loading oneCCL. Imports no torch."""

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
from knltrain.launch.rendezvous import unknown_interface
from knltrain.launch.world import Ranks

TRANSPORTS = ("ofi", "mpi")
_LIBRARY = "libccl.so.1"
_LOG_LEVEL = "error"


class UnavailableError(Exception):
    """OneCCL cannot be used here; the message says why, and what to do."""


@functools.cache
def find_library() -> Path:
    """Returns the CPU library: from the oneAPI at CCL_ROOT, the package oneccl-devel, or the search path.

    The package also holds a library for GPUs under the same name, which does not load without Intel's SYCL runtime.

    Raises:
        UnavailableError: it is not installed.
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
    """Returns the first file of an installed package whose path has this ending."""
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = (Path(os.path.normpath(file.locate())) for file in files if str(file).endswith(ending))
    return next((path for path in paths if path.exists()), None)


@functools.cache
def load() -> Any:
    """Loads oneCCL and returns the extension module that calls it. Its settings must be in the environment before.

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
    """Keeps oneCCL's messages about its settings off stdout, where results go, while it starts; errors are raised.

    Does nothing if the user has set ``CCL_LOG_LEVEL``.
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
    """OneCCL's settings, for people and for result files.

    Attributes:
        transport: ofi (libfabric) or mpi.
        set: variables that knltrain set.
        kept: variables that the user had set; unchanged.
    """

    transport: str
    set: dict[str, str]
    kept: dict[str, str]


def exported_workers(environ: Mapping[str, str] | None = None) -> str:
    """Returns the number of worker threads that the user has exported for oneCCL; empty if none."""
    environ = os.environ if environ is None else environ
    return environ.get("CCL_WORKER_COUNT") or ("1" if environ.get("CCL_WORKER_AFFINITY") else "")


def configure(
    ranks: Ranks,
    cpus: Sequence[int] = (),
    environ: MutableMapping[str, str] | None = None,
    *,
    already_set: Mapping[str, str] | None = None,
) -> Settings:
    """Sets the variables that oneCCL and libfabric read when they start. User settings take precedence.

    If no cores are reserved for them, oneCCL starts no worker threads, which would take the compute cores of the ranks:
    the thread that waits for a collective drives it.

    Args:
        ranks: this process among its peers.
        cpus: logical CPUs reserved for this rank's workers, one each.
        environ: the environment, by default this process's.
        already_set: variables that knltrain, not the user, has set: the interface.

    Raises:
        ConfigError: ``CCL_ATL_TRANSPORT`` names no transport, or mpi without mpiexec.
        UnavailableError: the transport's library is missing, or an exported interface does not exist.
    """
    environ = os.environ if environ is None else environ
    transport = environ.get("CCL_ATL_TRANSPORT") or "ofi"
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
        # oneCCL expects the CPUs of all workers of the node, rank by rank; each rank indexes it by its local rank.
        all_cpus = ",".join(map(str, [*cpus] * ranks.local_size))
        workers = {"CCL_WORKER_COUNT": str(len(cpus)), "CCL_WORKER_AFFINITY": all_cpus}
    wanted = {
        **workers,
        "CCL_ATL_TRANSPORT": transport,
        # oneCCL logs a warning for each variable set here.
        "CCL_LOG_LEVEL": _LOG_LEVEL,
        "CCL_WORKER_OFFLOAD": str(int(has_workers)),
        **_libraries(transport, environ),
    }
    if transport == "ofi":
        for variable in ("CCL_KVS_IFACE", "FI_TCP_IFACE"):
            if variable not in (already_set or {}) and (problem := unknown_interface(variable, environ)):
                raise UnavailableError(problem)
        # Ranks of one node communicate through shared memory. Set here, so that any launcher will do.
        wanted |= {"CCL_ATL_SHM": "1", "CCL_PROCESS_LAUNCHER": "none",
                   "CCL_LOCAL_RANK": str(ranks.local_rank), "CCL_LOCAL_SIZE": str(ranks.local_size)}  # fmt: skip
    of_ccl = {name: value for name, value in environ.items() if name.startswith(("CCL_", "FI_")) and value}
    set_before = {name: value for name, value in of_ccl.items() if name in (already_set or {})}
    kept = {name: value for name, value in of_ccl.items() if name not in set_before}
    missing = {name: value for name, value in wanted.items() if not environ.get(name)}
    environ.update(missing)
    return Settings(transport, missing | set_before, kept)


def _libraries(transport: str, environ: MutableMapping[str, str]) -> dict[str, str]:
    """Returns the paths of libfabric, its providers and MPI; none if a oneAPI environment (I_MPI_ROOT) sets them."""
    if root := environ.get("I_MPI_ROOT"):
        if not Path(root).is_dir():
            raise UnavailableError(f"I_MPI_ROOT={root} is not a folder; correct or unset it")
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
