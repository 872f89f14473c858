"""Reading files that somebody else has put there, whatever they are."""

from __future__ import annotations

import errno
import os
import stat
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


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)
