"""torch.compile's cache on disk, in which a run that is killed can leave a library that is cut short.

torch takes what has the right name as it is: every later start would end with "file too short", or, where the library
was the one that tells which vector instructions there are, compile without them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from pathlib import Path

# An ELF file for 64 bits (System V ABI, object files) has a header of 64 bytes, and a linker writes the section
# headers last, whose place, size and number it has at 40, 58 and 60.
_HEADER_BYTES = 64


def remove_cut_libraries() -> list[Path]:
    """Removes libraries that are not whole, so that they are built anew; those that are being built are left alone.

    Returns:
        What was removed.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder, removed = Path(cache_dir()), []
    for path in folder.glob("*/*.so"):
        with contextlib.suppress(OSError):  # another rank was faster, or somebody builds it
            if not _is_whole(path):
                with (folder / "locks" / f"{path.name.split('.')[0]}.lock").open("a") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if not _is_whole(path):
                        path.unlink()
                        removed.append(path)
    return removed


def _is_whole(path: Path) -> bool:
    with path.open("rb") as file:
        header = file.read(_HEADER_BYTES)
        if len(header) < _HEADER_BYTES or not header.startswith(b"\x7fELF"):
            return False
        (sections,) = struct.unpack_from("=Q", header, 40)
        size, number = struct.unpack_from("=HH", header, 58)
        return bool(sections) and sections + size * number <= os.fstat(file.fileno()).st_size
