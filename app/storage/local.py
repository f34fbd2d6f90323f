"""Blobs as plain files in one directory tree.

    blobs/ab/abcd...     the bytes whose SHA-256 is abcd...
    incoming/<random>    bytes on their way in
    sections/<name>/...  the same again, apart from all else

Plain files and not obstore's local store: that one does not flush files and directories to disk before it renames, nor
hash what it writes, and both are promises here.
"""

import errno
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Self

from app.errors import BlobMissing, StorageCorrupt, StorageFull, Unavailable
from app.storage.base import CHUNK_BYTES, Blob

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
SHA256 = re.compile(r"[0-9a-f]{64}")
SECTION = re.compile(r"[a-z0-9_]+(/[a-z0-9_]+)*")


class LocalStorage:
    """A directory that holds blobs."""

    def __init__(self, directory: Path, *, is_section: bool = False) -> None:
        self._directory, self._is_section = directory, is_section
        self._blobs = directory / "blobs"
        self._incoming = directory / "incoming"
        with _translated():
            self._blobs.mkdir(parents=True, exist_ok=True)
            self._incoming.mkdir(exist_ok=True)

    def writer(self) -> "LocalBlobWriter":
        """Start a new blob."""
        with _translated():
            return LocalBlobWriter(self._incoming / secrets.token_hex(16), self._place)

    def put_file(self, path: Path) -> Blob:
        """Store a file's bytes."""
        with path.open("rb", buffering=0) as source, self.writer() as writer:
            while chunk := source.read(CHUNK_BYTES):
                writer.write(chunk)
            return writer.commit()

    def open(self, sha256: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Yield the bytes [start, end) in chunks of at most 1 MiB."""
        chunks = self._read(sha256, start, end)
        next(chunks)  # opens the file now, so that a missing blob is known before an answer begins
        return chunks

    def download(self, sha256: str, size_bytes: int, path: Path) -> None:
        """Copy to a new file, verified."""
        digest = hashlib.sha256()
        num_bytes = 0
        chunks = self.open(sha256)
        with _translated(), path.open("xb", buffering=0) as target:
            try:
                for chunk in chunks:
                    digest.update(chunk)
                    num_bytes += len(chunk)
                    _write_all(target, chunk)
                if num_bytes != size_bytes or digest.hexdigest() != sha256:
                    raise StorageCorrupt(
                        f"blob {sha256} of {size_bytes} bytes holds {num_bytes} bytes with digest {digest.hexdigest()}"
                    )
            except BaseException:
                path.unlink()
                raise

    def exists(self, sha256: str) -> bool:
        """Whether the blob is here."""
        return self._place(sha256).exists()

    def delete(self, sha256: str) -> None:
        """Remove the blob; does nothing where there is none."""
        self._place(sha256).unlink(missing_ok=True)

    def section(self, name: str) -> "LocalStorage":
        """Return a store of its own within this one."""
        assert SECTION.fullmatch(name), f"{name!r} is no name of a section"
        return LocalStorage(self._directory / "sections" / name, is_section=True)

    def clear(self) -> None:
        """Remove every blob of this section, for good."""
        assert self._is_section, "the whole store is never cleared"
        shutil.rmtree(self._directory, ignore_errors=True)

    def remove_abandoned(self, older_than_seconds: float) -> int:
        """Remove what writers that died left behind; return how many."""
        oldest = time.time() - older_than_seconds
        num_removed = 0
        for path in self._incoming.iterdir():
            with suppress(FileNotFoundError):  # its writer finished just now
                if path.stat().st_mtime < oldest:
                    path.unlink()
                    num_removed += 1
        return num_removed

    def ping(self) -> None:
        """Raise StorageFull or Unavailable unless bytes can be written."""
        with self.writer() as writer:
            writer.write(b"ping")

    def _place(self, sha256: str) -> Path:
        assert SHA256.fullmatch(sha256), f"{sha256!r} is no SHA-256"
        return self._blobs / sha256[:2] / sha256

    def _read(self, sha256: str, start: int, end: int | None) -> Iterator[bytes]:
        try:
            file = self._place(sha256).open("rb", buffering=0)
        except FileNotFoundError as error:
            raise BlobMissing(f"blob {sha256} is not in storage") from error
        with file:
            yield b""
            file.seek(start)
            remaining = end - start if end is not None else None
            while remaining is None or remaining > 0:
                chunk = file.read(CHUNK_BYTES if remaining is None else min(CHUNK_BYTES, remaining))
                if not chunk:
                    return
                if remaining is not None:
                    remaining -= len(chunk)
                yield chunk


class LocalBlobWriter:
    """A blob on its way in."""

    def __init__(self, path: Path, place: Callable[[str], Path]) -> None:
        self._path = path
        self._place = place
        self._file = path.open("xb", buffering=0)
        self._digest = hashlib.sha256()
        self._size_bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append; raises StorageFull where there is no space."""
        with _translated():
            _write_all(self._file, data)
        self._digest.update(data)
        self._size_bytes += len(data)

    def commit(self) -> Blob:
        """Make the bytes durable and visible, all or nothing."""
        blob = Blob(self._digest.hexdigest(), self._size_bytes)
        target = self._place(blob.sha256)
        with _translated():
            os.fsync(self._file.fileno())
            self._file.close()
            target.parent.mkdir(exist_ok=True)
            _flush_directory(target.parent.parent)  # even if another writer just made it, it may not be on disk yet
            # Replacing a blob with the same bytes keeps one copy, and heals one that has rotted.
            self._path.replace(target)
            _flush_directory(target.parent)
        return blob

    def abort(self) -> None:
        """Forget the bytes; does nothing after commit."""
        self._file.close()
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()


def _write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _flush_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise  # the caller named a file that is there: its mistake
    except OSError as error:
        if error.errno in NO_SPACE:
            raise StorageFull(f"no space left in storage ({error.strerror})") from error
        raise Unavailable(f"storage does not work ({error.strerror})") from error
