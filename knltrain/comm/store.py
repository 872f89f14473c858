"""The torch.distributed store of a run: a TCP port of rank 0, or a file if all ranks are on one node."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch.distributed as dist

from knltrain.errors import ConfigError, KnltrainError
from knltrain.files import open_regular
from knltrain.launch.rendezvous import Rendezvous
from knltrain.launch.world import Ranks

_POLL_INTERVAL_S = 0.05


def open_store(rendezvous: Rendezvous, ranks: Ranks, start_timeout_s: float) -> Any:
    """Opens the store. All ranks call it at once; it need not wait for all of them.

    Args:
        rendezvous: where rank 0 is.
        ranks: this process among its peers.
        start_timeout_s: how long rank 0 may take to create it, in seconds.

    Raises:
        ConfigError: the folder of the file belongs to another account.
        KnltrainError: the port or file cannot be used, or rank 0 does not create it in time.
    """
    if rendezvous.init_method.startswith("file://"):
        pointer = Path(rendezvous.init_method.removeprefix("file://"))
        try:
            _make_private(pointer.parent)
            if ranks.rank:
                return _join_file_store(pointer, ranks, start_timeout_s)
            return _create_file_store(pointer, ranks, start_timeout_s)
        except OSError as error:
            raise KnltrainError(
                f"rank {ranks.rank} of {ranks.size} ({ranks.launcher}) cannot use {pointer.parent} (TMPDIR) for "
                f"the rendezvous of the ranks of a node: {error.strerror}"
            ) from None
    return _open_tcp_store(rendezvous, ranks, timedelta(seconds=start_timeout_s))


def _open_tcp_store(rendezvous: Rendezvous, ranks: Ranks, timeout: timedelta) -> Any:
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and rendezvous.init_method == "env://"
    options: dict[str, Any] = {"timeout": timeout, "wait_for_workers": False}
    if rendezvous.init_method == "env://":
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    else:
        url = urlsplit(rendezvous.init_method)
        address, port = str(url.hostname), int(url.port or 0)
    is_first = ranks.rank == 0 and not of_agent
    if is_first and rendezvous.listen is not None:
        # By default, torch listens on every interface of rank 0's node.
        address, port = rendezvous.listen
        try:
            listener = socket.create_server(rendezvous.listen, backlog=ranks.size)
        except OSError as error:
            raise _cannot_listen(address, port, str(error.strerror)) from None
        options["master_listen_fd"] = listener.detach()  # the store closes it
    try:
        return dist.TCPStore(address, port, ranks.size, is_master=is_first, **options)  # type: ignore[attr-defined]
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        if is_first:
            raise _cannot_listen(address, port, reason) from None
        raise KnltrainError(
            f"rank {ranks.rank} of {ranks.size} ({ranks.launcher}) on {socket.gethostname()} could not connect to rank "
            f"0 at {address}:{port} within {timeout.total_seconds():g} s: it has not started, or a firewall is between "
            f"them ({reason})"
        ) from None


def _cannot_listen(address: str, port: int, reason: str) -> KnltrainError:
    return KnltrainError(
        f"rank 0 cannot listen at {address}:{port}, where the other ranks connect: {reason}; export another MASTER_PORT"
    )


def _make_private(folder: Path) -> None:
    """Makes the folder of the file store, or sees that nobody else can have put something there.

    Its name is known to other accounts of the node: one of them could have made it.

    Raises:
        ConfigError: it is not a folder of this user alone.
    """
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise ConfigError(
            f"{folder}, where the ranks of this node connect, is not a folder that this account alone can write "
            f"(owner {found.st_uid}, mode {stat.filemode(found.st_mode)}): remove it, or set TMPDIR to a folder of "
            "your own on all ranks"
        )


# A script that restarts knltrain after a failure does so under the same launcher process, or in the same Slurm step: a
# run that was killed there has left its file at the path that all ranks know. So each run has a store file of its own,
# and the pointer file at the known path is valid only while rank 0 holds a lock on it.


def _create_file_store(pointer: Path, ranks: Ranks, start_timeout_s: float) -> Any:
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
            with contextlib.suppress(RuntimeError):  # the first exchange names who has not come
                store.wait([f"joined{rank}" for rank in range(1, ranks.size)], timedelta(seconds=start_timeout_s))
        finally:
            os.unlink(pointer)
    return store


def _join_file_store(pointer: Path, ranks: Ranks, start_timeout_s: float) -> Any:
    """Opens the store that rank 0 has created."""
    deadline = time.monotonic() + start_timeout_s
    while not (store_path := _read_store_path(pointer)):
        if time.monotonic() > deadline:
            raise KnltrainError(
                f"rank {ranks.rank} of {ranks.size} ({ranks.launcher}) has waited for rank 0 at {pointer} for "
                f"{start_timeout_s:g} s: it has not started, or has another TMPDIR"
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
