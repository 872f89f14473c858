"""The store over which the ranks of a run first hear of each other: a port of the first one, or a file on one node."""

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
from torch.distributed.rendezvous import rendezvous

from knltrain.errors import KnltrainError
from knltrain.files import open_regular
from knltrain.launch.rendezvous import START_TIMEOUT_S, Meeting
from knltrain.launch.world import Ranks

_TIMEOUT = timedelta(seconds=START_TIMEOUT_S)
_LOOK_S = 0.05


def open_store(meeting: Meeting, ranks: Ranks) -> Any:
    """Where this run's ranks meet; all of them call it.

    Raises:
        KnltrainError: the place cannot be had, or the first rank does not come to it.
        RuntimeError: torch's, where another rank does not come.
    """
    if meeting.init_method.startswith("file://"):
        place = Path(meeting.init_method.removeprefix("file://"))
        try:
            return _found(place, ranks) if ranks.rank else _laid_out(place, ranks)
        except OSError as error:
            raise KnltrainError(
                f"rank {ranks.rank} of {ranks.size} ({ranks.launcher}) cannot use {place.parent} (TMPDIR), where the "
                f"ranks of a node meet: {error.strerror}"
            ) from None
    if ranks.rank or meeting.listen is None:
        return next(rendezvous(meeting.init_method, ranks.rank, ranks.size, timeout=_TIMEOUT))[0]
    # Left to itself, torch listens on every interface of the first rank's node.
    address, port = meeting.listen
    try:
        listener = socket.create_server(meeting.listen, backlog=ranks.size)
    except OSError as error:
        raise KnltrainError(
            f"rank 0 cannot listen at {address}:{port}, where the others look for it: {error.strerror}; another "
            "MASTER_PORT may be free"
        ) from None
    # The store closes it.
    return dist.TCPStore(  # type: ignore[attr-defined]
        address, port, ranks.size, is_master=True, timeout=_TIMEOUT, master_listen_fd=listener.detach()
    )


# A script that starts knltrain again after a failure does so under the same launcher's process, or in the same step of
# Slurm: a run that was killed there has left its own file at the place that all know. So each run has a store of its
# own, and what is at the place names it only as long as the first rank holds a lock on that.


def _laid_out(place: Path, ranks: Ranks) -> Any:
    """A new store, whose name the first rank leaves at ``place`` until all have come."""
    descriptor, store_path = tempfile.mkstemp(prefix=f"{place.name}-", dir=place.parent)
    os.close(descriptor)
    descriptor, sign = tempfile.mkstemp(prefix=f"{place.name}-", dir=place.parent)
    with open(descriptor, "w") as file:
        file.write(store_path)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        os.replace(sign, place)
        try:
            store = dist.FileStore(store_path, ranks.size)  # type: ignore[attr-defined]
            store.wait([f"came{rank}" for rank in range(1, ranks.size)], _TIMEOUT)
        finally:
            os.unlink(place)
    return store


def _found(place: Path, ranks: Ranks) -> Any:
    """The store that the first rank has laid out."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not (store_path := _named_at(place)):
        if time.monotonic() > deadline:
            raise KnltrainError(
                f"rank {ranks.rank} of {ranks.size} ({ranks.launcher}) has looked for rank 0 at {place} for "
                f"{START_TIMEOUT_S:.0f} s: it has not started, or has another TMPDIR"
            )
        time.sleep(_LOOK_S)
    store = dist.FileStore(store_path, ranks.size)  # type: ignore[attr-defined]
    store.set(f"came{ranks.rank}", "")
    return store


def _named_at(place: Path) -> str:
    """The store that a first rank names there; empty where there is none, or it has ended."""
    with contextlib.suppress(FileNotFoundError), open_regular(place) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return os.fsdecode(file.read())
    return ""
