"""The bytes of one PATCH to a resumable upload on their way into storage."""

import base64
import binascii
import hashlib
from contextlib import suppress

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from app.api.service import Service
from app.db.tables import UploadRow
from app.errors import ChecksumMismatch, InvalidRequest, OffsetMismatch, Problem, TooLarge
from app.files.resumable import append_part
from app.storage import BlobWriter, upload_storage
from app.storage.base import CHUNK_BYTES

PART_BYTES = 16 * 1024 * 1024
"""A longer append is made safe in parts of this size: what a crash of the service takes is less than one of them."""
ALGORITHMS = {"sha1": hashlib.sha1, "sha256": hashlib.sha256}


class Append:
    """The bytes of one PATCH: made safe part by part, or, with a checksum, as a whole."""

    def __init__(self, service: Service, upload: UploadRow, expected: tuple[str, bytes] | None) -> None:
        self._service, self._upload = service, upload
        self._section = upload_storage(service.storage, upload.id)
        self._writer: BlobWriter | None = None
        self._algorithm, self._expected = expected or ("", b"")
        self._digest = ALGORITHMS[self._algorithm]() if expected else None
        self._waiting_bytes = 0
        self.offset = upload.offset_bytes
        """What is safe."""

    def check_length(self, num_bytes: int) -> None:
        """Raise TooLarge where more would come than the file has left."""
        left = self._upload.size_bytes - self.offset - self._waiting_bytes
        if num_bytes > left:
            raise TooLarge(
                f"{num_bytes} bytes were sent where the file has {left} left; the upload is given up",
                fix="Begin another upload with the right Upload-Length.",
            )

    def write(self, data: bytes) -> None:
        """Take bytes."""
        self.check_length(len(data))
        if self._writer is None:
            self._writer = self._section.writer()
        self._writer.write(data)
        self._waiting_bytes += len(data)
        if self._digest is not None:
            self._digest.update(data)
        elif self._waiting_bytes >= PART_BYTES:
            self.keep()

    def keep(self) -> None:
        """Make safe what has come since the last time; raises OffsetMismatch where another append was first."""
        if self._writer is None:
            return
        part = self._writer.commit()
        expiry_seconds = self._service.settings.upload_expiry_seconds
        with self._service.database.session() as session:
            self.offset = append_part(session, self._section, self._upload, self.offset, part, expiry_seconds)
        self._writer, self._waiting_bytes = None, 0

    def break_off(self) -> None:
        """The connection broke: keep what came, unless only the whole is worth something."""
        if self._digest is None:
            self.keep()

    def finish(self) -> None:
        """Keep the rest; raises ChecksumMismatch where it is not what was meant."""
        if self._digest is not None and self._digest.digest() != self._expected:
            found = base64.b64encode(self._digest.digest()).decode()
            raise ChecksumMismatch(f"the body's {self._algorithm} is {found}; it was dropped")
        self.keep()

    def abort(self) -> None:
        """Drop what is not kept."""
        if self._writer is not None:
            self._writer.abort()


async def receive(request: Request, append: Append) -> None:
    """Take the request's body; what came before the connection broke is kept."""
    waiting = bytearray()
    try:
        async for chunk in request.stream():
            waiting += chunk
            if len(waiting) >= CHUNK_BYTES:
                data = bytes(waiting)
                waiting.clear()
                await run_in_threadpool(append.write, data)
        if waiting:
            await run_in_threadpool(append.write, bytes(waiting))
    except (ClientDisconnect, HTTPException):  # gone, or too slow, or this process stops
        with suppress(OffsetMismatch):
            if waiting:
                await run_in_threadpool(append.write, bytes(waiting))
            await run_in_threadpool(append.break_off)
        raise


def read_checksum(header: str) -> tuple[str, bytes]:
    """Return the algorithm and the digest of an Upload-Checksum header."""
    algorithm, _, text = header.partition(" ")
    try:
        digest = base64.b64decode(text, validate=True)
    except binascii.Error:
        digest = b""
    if algorithm not in ALGORITHMS or len(digest) != ALGORITHMS[algorithm]().digest_size:
        expected = f"one of {', '.join(ALGORITHMS)}, a space, and the digest in base64"
        raise InvalidRequest([Problem("header:Upload-Checksum", f"send {expected}")], code="invalid_checksum")
    return algorithm, digest
