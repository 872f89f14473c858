import ctypes
import os
import subprocess
import sys

import pytest

from knltrain.node.memory import keep_freed_memory, peak_resident_mb, resident_mb


def test_another_allocator_or_a_tuned_glibc_is_left_alone():
    assert keep_freed_memory({"LD_PRELOAD": "/usr/lib/libtcmalloc.so.4"}) == {
        "allocator": "tcmalloc",
        "set_by": "LD_PRELOAD",
    }
    assert keep_freed_memory({"GLIBC_TUNABLES": "glibc.malloc.top_pad=1"})["set_by"] == "GLIBC_TUNABLES"


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="not glibc")
def test_large_blocks_are_kept():
    """Memory of a block that was freed is still the process's; without the setting it goes back at once."""
    code = """
import ctypes, sys
from knltrain.node.memory import keep_freed_memory, resident_mb
if sys.argv[1] == "keep":
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
block = libc.malloc(100 << 20)
ctypes.memset(block, 1, 100 << 20)
libc.free(block)
print(resident_mb())
"""
    kept, returned = (
        float(subprocess.run([sys.executable, "-c", code, mode], capture_output=True, text=True, check=True).stdout)
        for mode in ("keep", "return")
    )
    assert kept > returned + 90


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="not glibc")
def test_what_was_kept_can_be_released():
    code = """
import ctypes
from knltrain.node.memory import keep_freed_memory, release_freed_memory, resident_mb
keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
block, after = libc.malloc(100 << 20), libc.malloc(1 << 10)
ctypes.memset(block, 1, 100 << 20)
libc.free(block)
before = resident_mb()
release_freed_memory()
print(before - resident_mb())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(result.stdout) > 90


def test_memory_figures():
    assert 1 < resident_mb() <= peak_resident_mb() * 1.01
    assert os.path.exists("/proc/self/statm")
