"""Reading files that others wrote, writing files that others may be reading, and the folder of what is kept."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO


def open_regular(path: str | Path, buffering: int = -1) -> IO[bytes]:
    """Opens a file to read its bytes. Never waits, as opening a pipe does until somebody writes into it.

    Args:
        path: of the file.
        buffering: as ``open`` has it.

    Raises:
        OSError: it cannot be opened, or is a folder, a pipe, a socket or a device.
    """
    file: IO[bytes] = open(path, "rb", buffering=buffering, opener=_without_waiting)  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a file", str(path))
    return file


def cache_folder() -> Path:
    """Where things made on first use are kept: $KNLTRAIN_CACHE, or knltrain in the user's cache folder."""
    if "KNLTRAIN_CACHE" in os.environ:
        return Path(os.environ["KNLTRAIN_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "knltrain"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file under a name of its own that gets the name ``path`` when it is whole, and is deleted if it never is.

    It may be read by whom the umask lets, unlike those of ``tempfile``.
    """
    aside = path.with_name(f"{path.name}-{secrets.token_hex(8)}.part")
    try:
        with open(aside, "xb") as file:
            yield file
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)
