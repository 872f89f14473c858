"""Files in /dev/shm through which libfabric connects the ranks of a node, and what becomes of them.

Its provider shm makes one of 64 MiB for each process, named PID:DOMAIN:ENDPOINT, and removes it when it is closed. A
rank that is killed, or that leaves without the library's clean-up, does not get so far.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from knltrain.launch.rendezvous import START_TIMEOUT_S

SHARED_MEMORY = Path("/dev/shm")
_NAME = re.compile(r"([1-9][0-9]*):[0-9]+:[0-9]+", re.ASCII)


def remove_own_segments() -> None:
    """Removes the names of this process's; whoever has one open keeps it."""
    for process, path in _segments():
        if process == os.getpid():
            _remove(path)


def remove_dead_segments() -> None:
    """Removes what this user's processes that are no more have left.

    A container that shares /dev/shm and not the process ids has files of processes that are not seen from here. Other
    ranks look for them by name while they start; of what is older, only the name goes, and the mapping stays.
    """
    started = time.time() - START_TIMEOUT_S
    for process, path in _segments():
        with contextlib.suppress(OSError, OverflowError):
            found = path.lstat()
            if found.st_uid == os.geteuid() and found.st_mtime < started and not _is_there(process):
                _remove(path)


def _segments() -> Iterator[tuple[int, Path]]:
    """Process ids and files, where there is a /dev/shm that may be listed."""
    with contextlib.suppress(OSError):
        for name in os.listdir(SHARED_MEMORY):
            if match := _NAME.fullmatch(name):
                yield int(match[1]), SHARED_MEMORY / name


def _is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's, which took the number after
        pass
    return True


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # another rank was faster, or it is a folder
        path.unlink()
