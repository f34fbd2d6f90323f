"""What Pare asks of storage: immutable blobs under the SHA-256 of their bytes, in sections that share nothing.

Each owner's files are a section of their own (app/storage/sections.py): the same bytes of two owners are two blobs, so
that nothing about storing, deleting or collecting one owner's tells of another's.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from app.errors import BlobMissing, ChecksumMismatch, PareError, StorageCorrupt

CHUNK_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Blob:
    """Bytes that storage holds safely."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class StoredBlob(Blob):
    """A blob as it lies in storage; whether its bytes are those of its name is not said."""

    age_seconds: float
    """Since it was written last."""


class BlobWriter(Protocol):
    """Bytes on their way in: hashed as they come, invisible until `commit`. Leaving a `with` without it aborts."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append; raises StorageFull where there is no space."""

    def commit(self, sha256: str | None = None) -> Blob:
        """Make the bytes durable and visible, all or nothing. The same bytes are kept once.

        Raises ChecksumMismatch, and keeps nothing, where their digest is not the one that is expected.
        """

    def abort(self) -> None:
        """Forget the bytes; does nothing after commit."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class Section(Protocol):
    """Blobs that belong together. Safe to use from many threads and processes."""

    @property
    def name(self) -> str:
        """The section's name, for example owners/local."""

    def writer(self) -> BlobWriter:
        """Start a new blob."""

    def put_file(self, path: Path) -> Blob:
        """Store a file's bytes."""

    def open(self, sha256: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Yield the bytes [start, end) in chunks of at most 1 MiB; a missing blob raises BlobMissing at once."""

    def find(self, sha256: str) -> StoredBlob | None:
        """Return the blob, None where there is none."""

    def blobs(self) -> Iterator[StoredBlob]:
        """Yield every blob; one that is written or deleted meanwhile may be left out."""

    def delete(self, sha256: str) -> None:
        """Remove the blob; does nothing where there is none."""

    def quarantine(self, sha256: str) -> bool:
        """Put a blob aside, out of reach of readers, unless its bytes turn out right; return whether it was."""

    def clear(self) -> None:
        """Remove every blob of this section, for good."""

    def tidy(self) -> None:
        """Remove what an empty section leaves behind."""

    def link(self, sha256: str, seconds: int) -> str | None:  # noqa: ARG002
        """Return a URL at which anybody can read the blob for a while; None where the store has none to give."""
        return None

    def locate(self, sha256: str, size_bytes: int, *, verified: bool) -> str | None:  # noqa: ARG002
        """Return the path, below the directory of all blobs, of the file that is the blob, for who sends it unseen.

        None where the store has no files, where there is none of this size, or where one that has to be `verified` was
        not read whole and found right within the last hour, as it is now.
        """
        return None

    def exists(self, sha256: str) -> bool:
        """Whether the blob is here."""
        return self.find(sha256) is not None

    def read(self, sha256: str, size_bytes: int) -> Iterator[bytes]:
        """Yield all the bytes, the last chunk only when all were right; wrong ones raise StorageCorrupt.

        A blob that is found damaged is put into quarantine. A missing one raises BlobMissing at once.
        """
        return self._read_verified(self.open(sha256), sha256, size_bytes)

    def download(self, sha256: str, size_bytes: int, path: Path) -> None:
        """Copy to a new file, verified; raises StorageCorrupt and leaves no file where the bytes are not those."""

    def _read_verified(
        self, chunks: Iterable[bytes], sha256: str, size_bytes: int, on_right: Callable[[], None] | None = None
    ) -> Iterator[bytes]:
        try:
            yield from verify(chunks, sha256, size_bytes, on_right)
        except BlobMissing:
            raise
        except StorageCorrupt:
            with suppress(PareError):  # it stays where it is: nobody gets to read it whole anyway
                self.quarantine(sha256)
            raise


class Storage(Protocol):
    """A store: sections of blobs. Safe to use from many threads and processes."""

    def section(self, name: str) -> Section:
        """Return a section: kind/name, of a-z, 0-9, _ and -."""

    def sections(self) -> Iterator[str]:
        """Yield the names of the sections that hold something."""

    def remove_abandoned(self, older_than_seconds: float) -> int:
        """Remove what writers that died left behind; return how many."""

    def remove_quarantined(self, older_than_seconds: float) -> int:
        """Remove what was put into quarantine that long ago; return how many."""

    def ping(self) -> None:
        """Raise StorageFull or Unavailable unless bytes can be written."""


def check_digest(blob: Blob, sha256: str | None) -> None:
    """Raise ChecksumMismatch where bytes on their way in are not the expected ones."""
    if sha256 is not None and blob.sha256 != sha256:
        raise ChecksumMismatch(f"the {blob.size_bytes} bytes have the SHA-256 {blob.sha256}, not {sha256}")


def verify(
    chunks: Iterable[bytes], sha256: str, size_bytes: int, on_right: Callable[[], None] | None = None
) -> Iterator[bytes]:
    """Pass the bytes on, the last of them only when all were right: rotten bytes never look like a complete file.

    `on_right` is called before the last of right ones is passed on.
    """
    digest = hashlib.sha256()
    num_bytes = 0
    held = b""
    for chunk in chunks:
        if held:
            yield held
        digest.update(chunk)
        num_bytes += len(chunk)
        held = chunk
    if num_bytes != size_bytes or digest.hexdigest() != sha256:
        raise StorageCorrupt(
            f"blob {sha256} of {size_bytes} bytes holds {num_bytes} bytes with digest {digest.hexdigest()}"
        )
    if on_right is not None:
        on_right()
    if held:
        yield held
