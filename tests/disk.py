"""What a program tells the disk, in its order: what it syncs, names and deletes, and what that holds at the moment."""

import os
from pathlib import Path
from typing import NamedTuple


class Told(NamedTuple):
    """One call.

    Attributes:
        kind: ``sync``, ``name`` or ``delete``.
        path: the file or folder; of ``name`` its new name.
        holds: the bytes of a file, the set of the names in a folder, None of what was deleted.
    """

    kind: str
    path: Path
    holds: bytes | set[str] | None


def record(patch):
    """Records what is told from now on.

    Args:
        patch: pytest's ``monkeypatch``, with which it ends.

    Returns:
        The list that grows with each call that succeeds.
    """
    told = []
    fsync, unlink = os.fsync, os.unlink

    def sync(file):
        fsync(file)
        descriptor = file if isinstance(file, int) else file.fileno()
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        told.append(Told("sync", path, _contents(path)))

    def naming(original):
        def name(source, target, **options):
            original(source, target, **options)
            told.append(Told("name", Path(target), _contents(Path(target))))

        return name

    def delete(path, **options):
        unlink(path, **options)
        if not options:  # otherwise it is a name in a folder that only a descriptor tells
            told.append(Told("delete", Path(path), None))

    patch.setattr(os, "fsync", sync)
    patch.setattr(os, "rename", naming(os.rename))
    patch.setattr(os, "replace", naming(os.replace))
    patch.setattr(os, "unlink", delete)
    # Python 3.10's paths keep the functions that they found in os at first.
    patch.setattr(Path, "rename", lambda path, target: os.rename(path, target) or Path(target))
    patch.setattr(Path, "replace", lambda path, target: os.replace(path, target) or Path(target))
    patch.setattr(Path, "unlink", _unlink)
    return told


def _unlink(path, missing_ok=False):
    try:
        os.unlink(path)
    except FileNotFoundError:
        if not missing_ok:
            raise


def _contents(path):
    return {entry.name for entry in path.iterdir()} if path.is_dir() else path.read_bytes()
