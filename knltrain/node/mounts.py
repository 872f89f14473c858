"""Which file system a path is on."""

from __future__ import annotations

import re
from pathlib import Path

from knltrain.node.cpulist import read_text

# As /proc/self/mountinfo names them; FUSE has "fuse.NAME", in most cases a server too.
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
    """The kernel's name for the file system of an absolute path without links; empty where it is unknown.

    Args:
        path: need not exist; nothing but the list of mounts is looked at, so that a dead server is none of ours.
        root: where ``proc`` is.
    """
    found, longest = "", -1
    for line in read_text(root / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        fields, names = left.split(), right.split()
        if len(fields) < 5 or not names:
            continue
        # Spaces in names are written as octal numbers.
        point = Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4]))
        # What is mounted later on the same place hides what was there.
        if (path == point or point in path.parents) and len(point.parts) >= longest:
            found, longest = names[0], len(point.parts)
    return found


def is_network(system: str) -> bool:
    """Whether files of this system are on another machine."""
    return system in _NETWORK or system.startswith("fuse.")
