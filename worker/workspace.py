"""Where one worker process keeps its engines' directories, and the removal of those of dead workers."""

import contextlib
import fcntl
import os
import shutil
import time
from pathlib import Path

from app.settings import MIB
from worker.sandbox.launch import remove_directory

_OLD_SECONDS = 3600.0


class Workspace:
    """A private directory; a lock on it says that its worker lives, however that worker ends."""

    def __init__(self, root: Path, worker_id: str) -> None:
        self._path = root / worker_id
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        _remove_stale(root)
        self._path.mkdir(mode=0o700)
        self._handle = os.open(self._path / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)

    @property
    def path(self) -> Path:
        """Where the engines' directories go."""
        return self._path

    def find_shortage(self, min_bytes: int) -> str | None:
        """Return what is missing where the disk has less than so many bytes left."""
        free = shutil.disk_usage(self._path.parent).free  # which outlives this directory
        return f"its disk has {free / MIB:.0f} MiB left, of {min_bytes / MIB:.0f}" if free < min_bytes else None

    def remove(self) -> None:
        """Remove it with all that is in it."""
        os.close(self._handle)
        remove_directory(self._path)


def _remove_stale(root: Path) -> None:
    for directory in root.iterdir():
        try:
            handle = os.open(directory / "lock", os.O_RDWR | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            if _is_old(directory):  # whoever removed it was killed meanwhile, after the lock was gone
                remove_directory(directory)
            continue  # one that is just being made, or removed; or no directory of ours
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_directory(directory)
        os.close(handle)


def _is_old(directory: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return directory.is_dir() and time.time() - directory.stat().st_mtime > _OLD_SECONDS
    return False
