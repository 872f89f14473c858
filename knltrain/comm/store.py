"""The torch.distributed store of a run: a TCP port of rank 0, or a file if all ranks are on one node."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous as torch_rendezvous

from knltrain.errors import KnltrainError
from knltrain.files import open_regular
from knltrain.launch.rendezvous import START_TIMEOUT_S, Rendezvous
from knltrain.launch.world import Ranks

_TIMEOUT = timedelta(seconds=START_TIMEOUT_S)
_POLL_INTERVAL_S = 0.05


def open_store(rendezvous: Rendezvous, ranks: Ranks) -> Any:
    """Opens the store. All ranks call it at once.

    Raises:
        KnltrainError: the port or file cannot be used, or rank 0 does not create it in time.
        RuntimeError: torch's, if another rank does not connect in time.
    """
    if rendezvous.init_method.startswith("file://"):
        pointer = Path(rendezvous.init_method.removeprefix("file://"))
        try:
            return _join_file_store(pointer, ranks) if ranks.rank else _create_file_store(pointer, ranks)
        except OSError as error:
            raise KnltrainError(
                f"rank {ranks.rank} of {ranks.size} ({ranks.launcher}) cannot use {pointer.parent} (TMPDIR) for "
                f"the rendezvous of the ranks of a node: {error.strerror}"
            ) from None
    if ranks.rank or rendezvous.listen is None:
        return next(torch_rendezvous(rendezvous.init_method, ranks.rank, ranks.size, timeout=_TIMEOUT))[0]
    # By default, torch listens on every interface of rank 0's node.
    address, port = rendezvous.listen
    try:
        listener = socket.create_server(rendezvous.listen, backlog=ranks.size)
    except OSError as error:
        raise KnltrainError(
            f"rank 0 cannot listen at {address}:{port}, where the other ranks connect: {error.strerror}; "
            "export another MASTER_PORT"
        ) from None
    # The store closes it.
    return dist.TCPStore(  # type: ignore[attr-defined]
        address, port, ranks.size, is_master=True, timeout=_TIMEOUT, master_listen_fd=listener.detach()
    )


# A script that restarts knltrain after a failure does so under the same launcher process, or in the same Slurm step: a
# run that was killed there has left its file at the path that all ranks know. So each run has a store file of its own,
# and the pointer file at the known path is valid only while rank 0 holds a lock on it.


def _create_file_store(pointer: Path, ranks: Ranks) -> Any:
    """Creates a store file, and keeps its name in the file ``pointer`` until all ranks have opened it."""
    descriptor, store_path = tempfile.mkstemp(prefix=f"{pointer.name}-", dir=pointer.parent)
    os.close(descriptor)
    descriptor, aside = tempfile.mkstemp(prefix=f"{pointer.name}-", dir=pointer.parent)
    with open(descriptor, "w") as file:
        file.write(store_path)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        os.replace(aside, pointer)
        try:
            store = dist.FileStore(store_path, ranks.size)  # type: ignore[attr-defined]
            store.wait([f"joined{rank}" for rank in range(1, ranks.size)], _TIMEOUT)
        finally:
            os.unlink(pointer)
    return store


def _join_file_store(pointer: Path, ranks: Ranks) -> Any:
    """Opens the store that rank 0 has created."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not (store_path := _read_store_path(pointer)):
        if time.monotonic() > deadline:
            raise KnltrainError(
                f"rank {ranks.rank} of {ranks.size} ({ranks.launcher}) has waited for rank 0 at {pointer} for "
                f"{START_TIMEOUT_S:.0f} s: it has not started, or has another TMPDIR"
            )
        time.sleep(_POLL_INTERVAL_S)
    store = dist.FileStore(store_path, ranks.size)  # type: ignore[attr-defined]
    store.set(f"joined{ranks.rank}", "")
    return store


def _read_store_path(pointer: Path) -> str:
    """Returns the path of the store; empty if there is no pointer file, or its rank 0 has ended."""
    with contextlib.suppress(FileNotFoundError), open_regular(pointer) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return os.fsdecode(file.read())
    return ""
