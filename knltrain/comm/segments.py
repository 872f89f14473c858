"""Removal of libfabric's shared-memory files in /dev/shm, which connect the ranks of a node.

libfabric's provider shm creates a file of 64 MiB for each process, named PID:DOMAIN:ENDPOINT, and removes it on close.
A rank that is killed, or that exits without the library's clean-up, leaves its file behind.
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
_SEGMENT_BYTES = 64 << 20
_SEGMENT_NAME = re.compile(r"([1-9][0-9]*):[0-9]+:[0-9]+", re.ASCII)


def remove_own_segments() -> None:
    """Unlinks the files of this process; peers that have one mapped keep the mapping."""
    remove_segments_of(os.getpid())


def remove_segments_of(process_id: int) -> None:
    """Unlinks the files of a process: this one, or a child that has ended."""
    for process, path in _segments():
        if process == process_id:
            _remove(path)


def small_shared_memory(ranks: int) -> str:
    """Returns a warning if /dev/shm has no room for the files of so many ranks; otherwise an empty string."""
    try:
        disk = os.statvfs(SHARED_MEMORY)
    except OSError:
        return f"{SHARED_MEMORY} cannot be used: ranks of a node communicate over TCP, which is slower"
    free = disk.f_bavail * disk.f_frsize
    if free >= ranks * _SEGMENT_BYTES:
        return ""
    return (
        f"{SHARED_MEMORY} has {free >> 20:,} MiB free, and {ranks} ranks on a node need "
        f"{ranks * _SEGMENT_BYTES >> 20:,}: they communicate over TCP, which is slower; make it larger "
        "(docker --shm-size, mount -o remount,size=)"
    )


def remove_dead_segments() -> None:
    """Unlinks the files that ended processes of this user have left.

    A container that shares /dev/shm but not the process ids has files of processes that are not visible from here. Its
    ranks open them by name only while they start, so files younger than the start time-out are kept; an older file is
    unlinked, and mappings of it stay valid.
    """
    started = time.time() - START_TIMEOUT_S
    for process, path in _segments():
        with contextlib.suppress(OSError, OverflowError):
            found = path.lstat()
            if found.st_uid == os.geteuid() and found.st_mtime < started and not _is_alive(process):
                _remove(path)


def _segments() -> Iterator[tuple[int, Path]]:
    """Yields process ids and files; nothing if /dev/shm cannot be listed."""
    with contextlib.suppress(OSError):
        for name in os.listdir(SHARED_MEMORY):
            if match := _SEGMENT_NAME.fullmatch(name):
                yield int(match[1]), SHARED_MEMORY / name


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's process, which has the id now
        pass
    return True


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # another rank was faster, or it is a folder
        path.unlink()
