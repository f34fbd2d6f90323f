"""What a rank's allocator keeps: memory that shards free must leave the process, or sharding saves nothing."""

import ctypes
import sys

_M_MMAP_THRESHOLD = -3
"""malloc.h of glibc; mallopt(3)."""
USUAL_BYTES = 32 * 1024 * 1024
"""Where glibc's own limit ends up in a process that has freed large blocks, on 64-bit systems."""


def give_back_from(num_bytes: int) -> None:
    """Make blocks of at least this many bytes mappings of their own, which end with their last use.

    glibc raises that limit by itself, up to 32 MiB, each time such a block is freed. The gathered weights of a unit
    then come from the heap and tear holes into it, and a rank keeps more than it would without shards.
    Does nothing where the C library has no such setting (musl, macOS).
    """
    if sys.platform == "linux":
        set_option = getattr(ctypes.CDLL(None), "mallopt", None)
        if set_option is not None:
            set_option(_M_MMAP_THRESHOLD, num_bytes)
