"""The file system of a path."""

from __future__ import annotations

import re
from pathlib import Path

from knltrain.node.cpulist import read_text

# Names as in /proc/self/mountinfo; FUSE has "fuse.NAME", which in most cases uses a server too.
_NETWORK = {
    "nfs",
    "nfs4",
    "lustre",
    "gpfs",
    "beegfs",
    "ceph",
    "cifs",
    "smb3",
    "panfs",
    "orangefs",
    "pvfs2",
    "afs",
    "wekafs",
    "glusterfs",
    "9p",
    "virtiofs",
    "dvs",
    "daos",
}


def file_system(path: Path, root: Path = Path("/")) -> str:
    """Returns the kernel's name for the file system of an absolute path without links; empty if unknown.

    Args:
        path: need not exist. Only the list of mounts is read, so that a dead server does not block.
        root: the folder of ``proc``.
    """
    found, longest = "", -1
    for line in read_text(root / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        fields, names = left.split(), right.split()
        if len(fields) < 5 or not names:
            continue
        # Spaces in names are octal escapes.
        point = Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4]))
        # A later mount at the same path hides the earlier one.
        if (path == point or point in path.parents) and len(point.parts) >= longest:
            found, longest = names[0], len(point.parts)
    return found


def is_network(system: str) -> bool:
    """Whether this file system is on another machine."""
    return system in _NETWORK or system.startswith("fuse.")
