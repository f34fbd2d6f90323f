"""Giving memory that Python and torch have freed back to the system."""

import ctypes
from collections.abc import Callable


def _find_trim() -> Callable[[int], int] | None:
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        # Not the GNU C library: another allocator, which has other habits.
        return None
    return trim


_TRIM = _find_trim()


def release_freed_memory() -> None:
    """Return free pages to the system.

    The C library keeps the space of freed tensors below 32 MiB. Where small results that stay are made between large
    temporaries, layer after layer, that can grow to the size of the model.
    """
    if _TRIM is not None:
        _TRIM(0)
