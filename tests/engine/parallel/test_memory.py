"""Freed memory: what leaves the process, and what the allocator keeps."""

import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, os, sys
from worker.engine.parallel.memory import USUAL_BYTES, give_back_from

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def take(size):
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    return block

def kept():
    before = resident()
    blocks = [(take(2 * 2**20), take(2**17)) for _ in range(64)]
    for block, _ in blocks:
        libc.free(block)
    return resident() - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

libc.free(take(USUAL_BYTES - 2**20))
for limit in sys.argv[1:]:
    give_back_from(int(limit))
print(kept() // 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_memory_between_what_stays_is_given_back() -> None:
    assert _kept() > 100  # glibc's own way: the test would otherwise show nothing
    assert _kept(2**20) < 20
    assert _kept(2**20, 32 * 2**20) > 100


def _kept(*limits: int) -> int:
    command = [sys.executable, "-c", SCRIPT, *map(str, limits)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
