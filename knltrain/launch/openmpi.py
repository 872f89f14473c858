"""Exchange of addresses between ranks under Open MPI, through MPI itself.

Open MPI's process managers (ORTE, PRRTE) use PMIx, whose structures differ between versions; MPI_Allgather does not. It
runs in a subprocess, which keeps MPI's threads and signal handlers out of the rank.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from knltrain.errors import KnltrainError

# The same for Open MPI 1.10 to 5: MPI's C symbols of versions 4 and 5 all_gather it.
_LIBRARY = "libmpi.so.40"
_MAX_BYTES = 2048


class OpenMpi:
    """MPI_COMM_WORLD of the job that this process's rank belongs to.

    Raises:
        KnltrainError: Open MPI's library is not found, or does not start.
    """

    def __init__(self) -> None:
        self._library = _load()
        if self._library.MPI_Init(None, None):
            raise KnltrainError("Open MPI's MPI_Init failed; export MASTER_ADDR and MASTER_PORT instead")
        count = ctypes.c_int()
        self._library.MPI_Comm_size(self._world, ctypes.byref(count))
        self._size = count.value

    @property
    def _world(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(ctypes.addressof(ctypes.c_char.in_dll(self._library, "ompi_mpi_comm_world")))

    def all_gather(self, rank: int, text: str) -> Callable[[int], str]:
        """Sends a text to all ranks; returns a function from a rank to its text. All ranks call it at once."""
        byte = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.in_dll(self._library, "ompi_mpi_byte")))
        sendbuf = ctypes.create_string_buffer(text.encode()[: _MAX_BYTES - 1], _MAX_BYTES)
        recvbuf = ctypes.create_string_buffer(self._size * _MAX_BYTES)
        if self._library.MPI_Allgather(sendbuf, _MAX_BYTES, byte, recvbuf, _MAX_BYTES, byte, self._world):
            raise KnltrainError("Open MPI's MPI_Allgather failed; export MASTER_ADDR and MASTER_PORT instead")
        raw = recvbuf.raw
        return lambda other: raw[other * _MAX_BYTES : (other + 1) * _MAX_BYTES].split(b"\0")[0].decode()

    def close(self) -> None:
        """Finalizes MPI in this process."""
        self._library.MPI_Finalize()


def _load() -> ctypes.CDLL:
    for path in (_LIBRARY, *_daemon_libraries()):
        try:
            return ctypes.CDLL(path, ctypes.RTLD_GLOBAL)
        except OSError:
            continue
    raise KnltrainError(
        f"Open MPI's {_LIBRARY} is not found; add its folder to LD_LIBRARY_PATH, or export MASTER_ADDR and MASTER_PORT"
    )


def _daemon_libraries() -> Iterator[str]:
    """Yields paths of the library beside those that the daemon which started this rank has loaded."""
    process = os.getppid()
    try:
        # The parent of this process is the rank, and the rank's parent is the daemon.
        status = Path(f"/proc/{process}/status").read_text()
        daemon = int(re.findall(r"^PPid:\s*(\d+)", status, re.MULTILINE)[0])
        maps = Path(f"/proc/{daemon}/maps").read_text()
    except (OSError, IndexError, ValueError):
        return
    folders = {Path(path).parent for path in re.findall(r"(/\S*/lib(?:open-rte|open-pal|prrte|pmix)\S*)", maps)}
    yield from (str(folder / _LIBRARY) for folder in sorted(folders))
