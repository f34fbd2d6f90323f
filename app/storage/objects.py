"""Blobs as objects of an S3 bucket, through obstore.

    blobs/<section>/<sha256>         the bytes whose SHA-256 that is
    quarantine/<section>/<sha256>    bytes that were found not to be those

An object gets its name when it is written, and the name is known when all bytes have come. So they wait in a nameless
temporary file (TMPDIR), which ends with its process, however that ends. A multipart upload that was cut off is
invisible; let a lifecycle rule of the bucket abort it.
"""

import hashlib
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self
from urllib.parse import parse_qsl, unquote, urlsplit

import obstore
import structlog
from obstore.exceptions import BaseError, NotFoundError
from obstore.store import S3Store

from app.errors import BlobMissing, ConfigurationError, StorageCorrupt, Unavailable
from app.storage.base import CHUNK_BYTES, Blob, Section, StoredBlob, check_digest
from app.storage.disk import translated, write_all, write_new_file
from app.storage.sections import SECTION

SHA256 = re.compile(r"[0-9a-f]{64}")
MISSING = (NotFoundError, FileNotFoundError)
"""What the library raises for an object that is not there; for a bucket too."""
OPTIONS = frozenset({"endpoint", "public_endpoint", "region"})
_REQUEST_TIMEOUT = "3600s"
"""Of one request with its body; a file may be large."""
log = structlog.get_logger(__name__)


def open_objects(url: str, reserve_bytes: int = 0) -> "ObjectStorage":
    """Open s3://bucket/prefix?endpoint=&public_endpoint=&region=; the credentials come from the environment (AWS_...).

    `public_endpoint` is where clients reach the store, if elsewhere than the service does.
    """
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query))
    unknown = sorted(set(options) - OPTIONS)
    if unknown or not parts.hostname or parts.username or parts.port:
        problem = f"has unknown options: {', '.join(unknown)}" if unknown else "does not name a bucket alone"
        raise ConfigurationError(
            f"storage_url s3://{parts.hostname or ''} {problem}; write s3://bucket/prefix?endpoint=URL&region=NAME",
            fix="Credentials come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or what else AWS clients read.",
        )
    place = (parts.hostname, unquote(parts.path).strip("/"), options.get("region"))
    store = _connect(*place, options.get("endpoint"))
    public = _connect(*place, options["public_endpoint"]) if "public_endpoint" in options else store
    return ObjectStorage(store, public, reserve_bytes)


def _connect(bucket: str, prefix: str, region: str | None, endpoint: str | None) -> S3Store:
    try:
        return S3Store(
            bucket,
            prefix=prefix or None,
            config={
                **({"endpoint": endpoint} if endpoint else {}),
                **({"region": region} if region else {}),
            },
            client_options={
                "timeout": _REQUEST_TIMEOUT,
                "connect_timeout": "5s",
                "allow_http": bool(endpoint and endpoint.startswith("http://")),
            },
            retry_config={"max_retries": 4, "retry_timeout": timedelta(seconds=20)},
        )
    except (BaseError, ValueError) as error:
        raise ConfigurationError(f"storage_url s3://{bucket} cannot be used: {type(error).__name__}") from error


class ObjectStorage:
    """A bucket, or a prefix in one, that holds blobs."""

    def __init__(self, store: S3Store, public: S3Store, reserve_bytes: int) -> None:
        self.store, self.public, self.reserve_bytes = store, public, reserve_bytes

    def section(self, name: str) -> "ObjectSection":
        """Return a section."""
        assert SECTION.fullmatch(name), f"{name!r} is no name of a section"
        return ObjectSection(self, name)

    def sections(self) -> Iterator[str]:
        """Yield the names of the sections that hold something."""
        with _answers():
            kinds = obstore.list_with_delimiter(self.store, "blobs")["common_prefixes"]
            names = [
                str(name).removeprefix("blobs/")
                for kind in kinds
                for name in obstore.list_with_delimiter(self.store, str(kind))["common_prefixes"]
            ]
        yield from (name for name in names if SECTION.fullmatch(name))

    def remove_abandoned(self, older_than_seconds: float) -> int:  # noqa: ARG002 - a cut-off upload leaves no object
        """Remove nothing: what writers that died left is invisible."""
        return 0

    def remove_quarantined(self, older_than_seconds: float) -> int:
        """Remove what was put into quarantine that long ago; return how many."""
        oldest = datetime.now(UTC) - timedelta(seconds=older_than_seconds)
        with _answers():
            listed = [each for batch in obstore.list(self.store, "quarantine") for each in batch]
            old = [each["path"] for each in listed if each["last_modified"] < oldest]
            if old:
                obstore.delete(self.store, old)
        return len(old)

    def ping(self) -> None:
        """Raise Unavailable unless bytes can be written."""
        with _answers():
            obstore.put(self.store, "ping", b"ping")


class ObjectSection(Section):
    """The blobs of one section."""

    def __init__(self, storage: ObjectStorage, name: str) -> None:
        self._name = name
        self._storage, self._store = storage, storage.store

    @property
    def name(self) -> str:
        """The section's name."""
        return self._name

    def writer(self) -> "ObjectWriter":
        """Start a new blob."""
        return ObjectWriter(self, self._storage.reserve_bytes)

    def put_file(self, path: Path) -> Blob:
        """Store a file's bytes."""
        with path.open("rb") as source:
            digest = hashlib.file_digest(source, "sha256").hexdigest()
            blob = Blob(digest, source.tell())
            source.seek(0)
            with _answers():
                obstore.put(self._store, self.key(digest), source)
        return blob

    def open(self, sha256: str, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Yield the bytes [start, end) in chunks of at most 1 MiB."""
        key = self.key(sha256)
        try:
            with _answers(may_miss=True):
                if start == 0 and end is None:
                    return _cut(iter(obstore.get(self._store, key).stream(min_chunk_size=CHUNK_BYTES)))
                size_bytes = obstore.head(self._store, key)["size"]
                end = size_bytes if end is None else min(end, size_bytes)
                if start >= end:
                    return iter(())
                found = obstore.get(self._store, key, options={"range": (start, end)})
                return _cut(iter(found.stream(min_chunk_size=CHUNK_BYTES)))
        except MISSING as error:
            if self._find(self.key(sha256, "quarantine")) is not None:
                raise StorageCorrupt(f"blob {sha256} was found damaged and is in quarantine") from error
            raise BlobMissing(f"blob {sha256} is not in storage") from error

    def download(self, sha256: str, size_bytes: int, path: Path) -> None:
        """Copy to a new file, verified."""
        write_new_file(path, self.read(sha256, size_bytes))

    def find(self, sha256: str) -> StoredBlob | None:
        """Return the blob, None where there is none."""
        found = self._find(self.key(sha256))
        return None if found is None else _describe(sha256, *found)

    def blobs(self) -> Iterator[StoredBlob]:
        """Yield every blob."""
        with _answers():
            listed = [each for batch in obstore.list(self._store, f"blobs/{self._name}") for each in batch]
        for each in listed:
            sha256 = each["path"].rpartition("/")[2]
            if SHA256.fullmatch(sha256):
                yield _describe(sha256, each["size"], each["last_modified"])

    def delete(self, sha256: str) -> None:
        """Remove the blob; does nothing where there is none."""
        with suppress(*MISSING), _answers(may_miss=True):
            obstore.delete(self._store, self.key(sha256))

    def quarantine(self, sha256: str) -> bool:
        """Put a blob aside unless its bytes are right."""
        try:
            digest = hashlib.sha256()
            for chunk in self.open(sha256):
                digest.update(chunk)
        except StorageCorrupt:
            return False  # it is gone
        if digest.hexdigest() == sha256:
            return False
        with _answers():
            obstore.copy(self._store, self.key(sha256), self.key(sha256, "quarantine"))
        self.delete(sha256)
        return True

    def clear(self) -> None:
        """Remove every blob of this section, for good."""
        with _answers():
            for batch in obstore.list(self._store, f"blobs/{self._name}"):
                obstore.delete(self._store, [each["path"] for each in batch])

    def tidy(self) -> None:
        """Do nothing: an empty section is nothing."""

    def link(self, sha256: str, seconds: int) -> str | None:
        """Return a URL at which anybody can read the blob for a while."""
        with _answers():
            return obstore.sign(self._storage.public, "GET", self.key(sha256), timedelta(seconds=seconds))

    def key(self, sha256: str, folder: str = "blobs") -> str:
        """Return the name of the object."""
        assert SHA256.fullmatch(sha256), f"{sha256!r} is no SHA-256"
        return f"{folder}/{self._name}/{sha256}"

    def _find(self, key: str) -> tuple[int, datetime] | None:
        try:
            with _answers(may_miss=True):
                found = obstore.head(self._store, key)
        except MISSING:
            return None
        return found["size"], found["last_modified"]


class ObjectWriter:
    """A blob on its way in: in a temporary file without a name until it has arrived."""

    def __init__(self, section: ObjectSection, reserve_bytes: int) -> None:
        self._section, self._reserve_bytes = section, reserve_bytes
        with translated():
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed by abort and commit
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
        self._file.seek(0)
        with _answers():
            obstore.put(self._section._store, self._section.key(blob.sha256), self._file)
        self._file.close()
        return blob

    def abort(self) -> None:
        """Forget the bytes; does nothing after commit."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()


@contextmanager
def _answers(*, may_miss: bool = False) -> Iterator[None]:
    """Turn what goes wrong with the store into Unavailable; where an object may be missing, that passes as it is."""
    try:
        yield
    except (BaseError, OSError, TimeoutError) as error:
        if may_miss and isinstance(error, MISSING):
            raise
        # What the store says may hold its address and more: that is for the log.
        log.warning("the object store refused", error=str(error)[:500])
        raise Unavailable(f"the object store does not work ({type(error).__name__})") from error


def _cut(chunks: Iterator[object]) -> Iterator[bytes]:
    while True:
        with _answers():
            chunk = next(chunks, None)
        if chunk is None:
            return
        view = memoryview(bytes(chunk))  # type: ignore[call-overload]
        for start in range(0, len(view), CHUNK_BYTES):
            yield bytes(view[start : start + CHUNK_BYTES])


def _describe(sha256: str, size_bytes: int, modified_at: datetime) -> StoredBlob:
    return StoredBlob(sha256, size_bytes, (datetime.now(UTC) - modified_at).total_seconds())
