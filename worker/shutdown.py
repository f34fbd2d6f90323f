"""That this worker was told to stop: written by the parent in its signal handler, seen by the children it forked."""

import mmap

_told = mmap.mmap(-1, 1)  # shared with processes that are forked later


def begin() -> None:
    """Note that the worker takes no more jobs; takes no lock, so that a signal handler may do it."""
    _told[0] = 1


def has_begun() -> bool:
    """Return whether the worker was told to stop."""
    return _told[0] == 1
