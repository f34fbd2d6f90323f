"""What Pare asks of storage: immutable blobs under the SHA-256 of their bytes."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

CHUNK_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Blob:
    """Bytes that storage holds safely."""

    sha256: str
    size_bytes: int


class BlobWriter(Protocol):
    """Bytes on their way in: hashed as they come, invisible until `commit`. Leaving a `with` without it aborts."""

    def write(self, data: bytes | memoryview) -> None:
        """Append; raises StorageFull where there is no space."""

    def commit(self) -> Blob:
        """Make the bytes durable and visible, all or nothing. The same bytes are kept once."""

    def abort(self) -> None:
        """Forget the bytes; does nothing after commit."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class Storage(Protocol):
    """A store of blobs. Safe to use from many threads and processes."""

    def writer(self) -> BlobWriter:
        """Start a new blob."""

    def put_file(self, path: Path) -> Blob:
        """Store a file's bytes."""

    def open(self, sha256: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Yield the bytes [start, end) in chunks of at most 1 MiB; a missing blob raises BlobMissing at once."""

    def download(self, sha256: str, size_bytes: int, path: Path) -> None:
        """Copy to a new file, verified; raises StorageCorrupt and leaves no file where the bytes are not those."""

    def exists(self, sha256: str) -> bool:
        """Whether the blob is here."""

    def delete(self, sha256: str) -> None:
        """Remove the blob; does nothing where there is none."""

    def section(self, name: str) -> "Storage":
        """Return a store of its own within this one: what is deleted there is deleted nowhere else. Names: a-z/_0-9."""

    def clear(self) -> None:
        """Remove every blob of this section, for good; for a section alone."""

    def remove_abandoned(self, older_than_seconds: float) -> int:
        """Remove what writers that died left behind; return how many."""

    def ping(self) -> None:
        """Raise StorageFull or Unavailable unless bytes can be written."""
