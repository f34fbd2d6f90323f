"""Which files were read lately and found right: whoever sends a file without looking at its bytes asks here first."""

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

KEEP_SECONDS = 3600.0
"""For how long a file that nobody has touched passes for right: bits that rot meanwhile are found after that."""
MAX_FILES = 4096
"""That are remembered; the one whose check is the oldest is forgotten first."""


@dataclass(frozen=True)
class Stamp:
    """The state of a file: whatever is written to it or put in its place has another one."""

    device: int
    inode: int
    size_bytes: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> "Stamp":
        """Return the stamp that a look at a file gives."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class VerifiedFiles:
    """The memory of one process. Safe to use from many threads."""

    def __init__(self) -> None:
        self._found: dict[Path, tuple[Stamp, float]] = {}
        self._lock = threading.Lock()

    def note(self, path: Path, stamp: Stamp, began: float) -> None:
        """Remember that a file was right; `began` is when its reading did, by the monotonic clock."""
        with self._lock:
            self._found.pop(path, None)
            self._found[path] = (stamp, began)
            if len(self._found) > MAX_FILES:
                del self._found[next(iter(self._found))]

    def holds(self, path: Path, stamp: Stamp) -> bool:
        """Whether the file, as it is now, was found right lately."""
        with self._lock:
            seen, began = self._found.get(path, (None, 0.0))
        return seen == stamp and time.monotonic() - began < KEEP_SECONDS
