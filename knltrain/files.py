"""Opening untrusted files, replacing files atomically, and the cache folder."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from knltrain.errors import ConfigError

# What an error says of a name: that there is nothing, or no file. Others say that it cannot be read now.
_ABSENT = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ELOOP, errno.ENXIO, errno.ENAMETOOLONG}
)


def open_regular(path: str | Path, buffering: int = -1) -> IO[bytes]:
    """Opens a regular file for reading, in binary mode. Does not block on a pipe that nobody writes to.

    Args:
        path: the file.
        buffering: as for ``open``.

    Raises:
        OSError: it cannot be opened, or is a folder, a pipe, a socket or a device.
    """
    file: IO[bytes] = open(path, "rb", buffering=buffering, opener=_open_nonblocking)  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a file", str(path))
    return file


def says_absent(error: OSError) -> bool:
    """Whether an error says that a file is missing or no file, and not that it cannot be read now.

    A file that cannot be read (permission, a stale NFS handle, an I/O error) may be whole: it must not be taken for
    damaged, passed over or replaced.
    """
    return error.errno in _ABSENT


@contextlib.contextmanager
def naming(path: str | Path, *, needed: int | None = None) -> Iterator[None]:
    """Has errors of the block name the file, as those of ``open`` do: ``read`` and ``write`` do not.

    Args:
        path: the file.
        needed: its size in bytes where it is known, for the message of a disk that is full.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        if is_full(error) and needed is not None:
            error.strerror = f"{error.strerror} for {needed / 2**20:,.1f} MiB"
        raise


def is_full(error: OSError) -> bool:
    """Whether an error says that a disk, or what of it the user may have, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def free_space(folder: str | Path) -> str:
    """Returns the free space, for a message; empty if unknown. The folder may not exist: then that above it counts."""
    folder = Path(folder).absolute()
    try:
        free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    except OSError:
        return ""
    return f" ({free / 2**20:,.0f} MiB free)"


def resolved(path: str | Path) -> Path:
    """Returns the one path of a file or folder: absolute, with ``~`` and symbolic links followed; it may not exist."""
    return Path(os.path.realpath(os.path.expanduser(path)))


def cache_folder() -> Path:
    """Returns $KNLTRAIN_CACHE, or ``knltrain`` in the user's cache folder; it may not exist yet.

    Raises:
        ConfigError: any account could have put something there; what is in it decides labels, and how a run computes.
    """
    configured = os.environ.get("KNLTRAIN_CACHE")
    folder = Path(configured or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "knltrain")
    with contextlib.suppress(OSError):  # it does not exist yet
        found, parent = folder.stat(), folder.resolve().parent.stat()
        foreign = found.st_uid not in (os.geteuid(), 0) and parent.st_mode & stat.S_IWOTH
        if foreign or found.st_mode & stat.S_IWOTH:
            raise ConfigError(
                f"{folder}, the cache, can have been filled by any account of this machine (owner {found.st_uid}, mode "
                f"{stat.filemode(found.st_mode)}); set KNLTRAIN_CACHE to a folder of your own"
            )
    return folder


@contextlib.contextmanager
def replacing(path: Path, *, aside: Path | None = None, sync: bool = True) -> Iterator[IO[bytes]]:
    """Yields a new file that takes the name ``path`` at the end of the block; after an error it is deleted.

    A reader, or this program after a crash, finds the old content or the new one, never a part. The umask decides who
    may read the file, unlike those of ``tempfile``.

    Args:
        path: the final name.
        aside: the name until then, in the same folder; written over if a killed process has left it. By default one
            that no other process takes.
        sync: whether file and folder are on the disk when the block has ended.

    Raises:
        OSError: the file cannot be written. What ``path`` held before is untouched.
    """
    with replacing_path(path, aside=aside, sync=sync) as name, naming(path), open(name, "wb") as file:
        yield file


@contextlib.contextmanager
def replacing_path(path: Path, *, aside: Path | None = None, sync: bool = True) -> Iterator[Path]:
    """As :func:`replacing`, where somebody else writes the file: yields the name to write it under."""
    aside = aside or path.with_name(f"{path.name}-{secrets.token_hex(8)}.part")
    try:
        yield aside
        if sync:
            _sync(aside, os.O_RDONLY)
        os.replace(aside, path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(aside):
            error.filename = str(path)  # the name that was asked for
        raise
    if sync:
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Writes the names in a folder to the disk: without it, a crash may undo a rename."""
    try:
        _sync(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that does not sync folders
            raise


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open_nonblocking(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)
