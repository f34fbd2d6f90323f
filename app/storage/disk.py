"""Files on a disk that may be full, read-only or failing: its errors as ours, and writes that keep a reserve."""

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from app.errors import StorageFull, Unavailable

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def translated() -> Iterator[None]:
    """Turn errors of the file system into StorageFull and Unavailable."""
    try:
        yield
    except FileExistsError:
        raise  # the caller named a file that is there: its mistake
    except OSError as error:
        if error.errno in NO_SPACE:
            raise StorageFull(f"no space left in storage ({error.strerror})") from error
        raise Unavailable(f"storage does not work ({error.strerror})") from error


def write_all(file: BinaryIO, data: bytes | bytearray | memoryview, reserve_bytes: int = 0) -> None:
    """Write all of it, unless less than the reserve would stay free: the disk is full before it is full to the brim.

    What may go on with the reserve: the database in which deletes and cancels are written.
    """
    view = memoryview(data)
    if reserve_bytes:
        disk = os.fstatvfs(file.fileno())
        free_bytes = disk.f_bavail * disk.f_frsize
        if free_bytes - len(view) < reserve_bytes:
            raise StorageFull(f"storage has {free_bytes} bytes left, of which {reserve_bytes} are kept in reserve")
    while view:
        view = view[file.write(view) :]


def write_new_file(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file that must not be there; leaves none where the chunks or the disk fail."""
    with translated(), path.open("xb", buffering=0) as target:
        try:
            for chunk in chunks:
                write_all(target, chunk)
        except BaseException:
            path.unlink()
            raise


def flush_directory(directory: Path) -> None:
    """Bring the names in a directory to disk."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
