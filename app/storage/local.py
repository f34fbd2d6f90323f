"""Blobs as plain files in one directory tree.

    blobs/<section>/ab/abcd...      the bytes whose SHA-256 is abcd...
    quarantine/<section>/abcd...    bytes that were found not to be those
    incoming/<random>               bytes on their way in

Plain files and not obstore's local store: that one does not flush files and directories to disk before it renames, nor
hash what it writes, and both are promises here.
"""

import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Self

from app.errors import BlobMissing, StorageCorrupt
from app.storage.base import CHUNK_BYTES, Blob, Section, StoredBlob, check_digest
from app.storage.disk import digest_file, flush_directory, translated, write_all, write_new_file
from app.storage.sections import SECTION
from app.storage.verified import Stamp, VerifiedFiles

SHA256 = re.compile(r"[0-9a-f]{64}")
TIDY_SECONDS = 3600.0
"""A writer has made a younger directory a moment ago, and is about to put a blob there."""


class LocalStorage:
    """A directory that holds blobs."""

    def __init__(self, directory: Path, reserve_bytes: int = 0) -> None:
        self.blobs, self.incoming, self.quarantine = (directory / name for name in ("blobs", "incoming", "quarantine"))
        self.reserve_bytes = reserve_bytes
        self.verified = VerifiedFiles()
        with translated():
            self.blobs.mkdir(parents=True, exist_ok=True)
            self.incoming.mkdir(exist_ok=True)

    def section(self, name: str) -> "LocalSection":
        """Return a section."""
        assert SECTION.fullmatch(name), f"{name!r} is no name of a section"
        return LocalSection(self, name)

    def sections(self) -> Iterator[str]:
        """Yield the names of the sections that hold something."""
        with translated():
            names = sorted(f"{path.parent.name}/{path.name}" for path in self.blobs.glob("*/*/"))
        yield from (name for name in names if SECTION.fullmatch(name))

    def remove_abandoned(self, older_than_seconds: float) -> int:
        """Remove what writers that died left behind; return how many."""
        return _remove_old(self.incoming.iterdir(), older_than_seconds)

    def remove_quarantined(self, older_than_seconds: float) -> int:
        """Remove what was put into quarantine that long ago; return how many."""
        return _remove_old(self.quarantine.glob("*/*/*"), older_than_seconds)

    def ping(self) -> None:
        """Raise StorageFull or Unavailable unless bytes can be written."""
        with self.section("owners/ping").writer() as writer:
            writer.write(b"ping")


class LocalSection(Section):
    """The blobs of one section."""

    def __init__(self, storage: LocalStorage, name: str) -> None:
        self._name = name
        self._storage = storage
        self._directory = storage.blobs / name

    @property
    def name(self) -> str:
        """The section's name."""
        return self._name

    def writer(self) -> "LocalBlobWriter":
        """Start a new blob."""
        with translated():
            path = self._storage.incoming / secrets.token_hex(16)
            return LocalBlobWriter(path, self._place, self._storage.reserve_bytes)

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

    def read(self, sha256: str, size_bytes: int) -> Iterator[bytes]:
        """Yield all the bytes, the last chunk only when all were right; then remember that the file is."""
        began, stamp, note = time.monotonic(), self._stamp(sha256), None
        if stamp is not None:
            # That of before: whatever happens to the file while it is read gives it another.
            note = partial(self._storage.verified.note, self._place(sha256), stamp, began)
        return self._read_verified(self.open(sha256), sha256, size_bytes, note)

    def locate(self, sha256: str, size_bytes: int, *, verified: bool) -> str | None:
        """Return the path of the blob's file below the directory of all blobs."""
        stamp, place = self._stamp(sha256), self._place(sha256)
        if stamp is None or stamp.size_bytes != size_bytes:
            return None
        if verified and not self._storage.verified.holds(place, stamp):
            return None
        return str(place.relative_to(self._storage.blobs))

    def download(self, sha256: str, size_bytes: int, path: Path) -> None:
        """Copy to a new file, verified."""
        write_new_file(path, self.read(sha256, size_bytes))

    def find(self, sha256: str) -> StoredBlob | None:
        """Return the blob, None where there is none."""
        stamp = self._stamp(sha256)
        if stamp is None:
            return None
        return StoredBlob(sha256, stamp.size_bytes, time.time() - stamp.modified_ns / 1e9)

    def blobs(self) -> Iterator[StoredBlob]:
        """Yield every blob."""
        with translated():
            names = sorted(path.name for path in self._directory.glob("??/*"))
        for name in names:
            if SHA256.fullmatch(name) and (blob := self.find(name)) is not None:
                yield blob

    def delete(self, sha256: str) -> None:
        """Remove the blob; does nothing where there is none."""
        with translated():
            self._place(sha256).unlink(missing_ok=True)

    def quarantine(self, sha256: str) -> bool:
        """Put a blob aside unless its bytes are right."""
        place, aside = self._place(sha256), self._storage.quarantine / self._name / sha256
        with translated():
            aside.parent.mkdir(parents=True, exist_ok=True)
            # Moved before it is read again: whoever stores the right bytes meanwhile replaces nothing that is moved.
            try:
                place.replace(aside)
            except FileNotFoundError:
                return False
            if digest_file(aside) == sha256:
                aside.replace(place)
                return False
            os.utime(aside)
        return True

    def clear(self) -> None:
        """Remove every blob of this section, for good."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def tidy(self) -> None:
        """Remove directories that have been empty for a while."""
        oldest = time.time() - TIDY_SECONDS
        for directory in (*self._directory.glob("??"), self._directory):
            with suppress(OSError):  # it is not empty, or it is gone
                if directory.stat().st_mtime < oldest:
                    directory.rmdir()

    def _place(self, sha256: str) -> Path:
        assert SHA256.fullmatch(sha256), f"{sha256!r} is no SHA-256"
        return self._directory / sha256[:2] / sha256

    def _stamp(self, sha256: str) -> Stamp | None:
        with translated():
            try:
                return Stamp.of(self._place(sha256).stat())
            except FileNotFoundError:
                return None

    def _read(self, sha256: str, start: int, end: int | None) -> Iterator[bytes]:
        with translated():
            try:
                file = self._place(sha256).open("rb", buffering=0)
            except FileNotFoundError as error:
                if (self._storage.quarantine / self._name / sha256).exists():
                    raise StorageCorrupt(f"blob {sha256} was found damaged and is in quarantine") from error
                raise BlobMissing(f"blob {sha256} is not in storage") from error
        with file:
            yield b""
            file.seek(start)
            remaining = end - start if end is not None else None
            while remaining is None or remaining > 0:
                with translated():
                    chunk = file.read(CHUNK_BYTES if remaining is None else min(CHUNK_BYTES, remaining))
                if not chunk:
                    return
                if remaining is not None:
                    remaining -= len(chunk)
                yield chunk


class LocalBlobWriter:
    """A blob on its way in."""

    def __init__(self, path: Path, place: Callable[[str], Path], reserve_bytes: int = 0) -> None:
        self._path = path
        self._place = place
        self._reserve_bytes = reserve_bytes
        self._file = path.open("xb", buffering=0)
        self._digest = hashlib.sha256()
        self._size_bytes = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append; raises StorageFull where there is no space."""
        with translated():
            write_all(self._file, data, self._reserve_bytes)
        self._digest.update(data)
        self._size_bytes += len(data)

    def commit(self, sha256: str | None = None) -> Blob:
        """Make the bytes durable and visible, all or nothing."""
        blob = Blob(self._digest.hexdigest(), self._size_bytes)
        check_digest(blob, sha256)
        target = self._place(blob.sha256)
        with translated():
            os.fsync(self._file.fileno())
            self._file.close()
            target.parent.mkdir(parents=True, exist_ok=True)
            # Section and shard: even if another writer just made them, they may not be on disk yet.
            for directory in (target.parents[3], target.parents[2], target.parents[1]):
                flush_directory(directory)
            # Replacing a blob with the same bytes keeps one copy, and heals one that has rotted.
            self._path.replace(target)
            flush_directory(target.parent)
        return blob

    def abort(self) -> None:
        """Forget the bytes; does nothing after commit."""
        self._file.close()
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()


def _remove_old(paths: Iterator[Path], older_than_seconds: float) -> int:
    oldest = time.time() - older_than_seconds
    num_removed = 0
    with translated():
        for path in paths:
            with suppress(FileNotFoundError):  # its writer finished just now
                if path.stat().st_mtime < oldest:
                    path.unlink()
                    num_removed += 1
    return num_removed
