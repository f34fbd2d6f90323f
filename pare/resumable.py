"""Large files to the service over connections that break and services that restart: the tus protocol 1.0.0."""

import contextlib
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2

from pare.errors import Conflict, NotReachable, PareError, Refused, TransferCorrupt, Unavailable, UsageError
from pare.transport import OnBytes, Transport, problem_of

CHUNK_BYTES = 1024 * 1024
_TUS = {"Tus-Resumable": "1.0.0"}
_PATIENCE_SECONDS = 120.0
"""Without any progress for this long, the upload is given up."""
_COMPLETION_TIMEOUT = httpx2.Timeout(connect=5.0, read=900.0, write=60.0, pool=5.0)
"""The service reads the whole file once more before it answers."""


def upload_resumable(
    transport: Transport, path: str, file: Path, params: dict[str, Any], on_bytes: OnBytes | None = None
) -> dict[str, Any]:
    """Send a file part by part, going on where it broke, and make of it what `path` makes; return the answer."""
    total = file.stat().st_size
    begun = transport.request("POST", "/v1/uploads", headers=_TUS | {"Upload-Length": str(total)}, repeatable=True)
    upload_id = begun.json()["id"]
    source = _Source(file, total, on_bytes)
    try:
        _send(transport, f"/v1/uploads/{upload_id}", source)
        answer: dict[str, Any] = transport.request(
            "POST",
            path,
            params=params,
            json={"upload_id": upload_id, "sha256": source.sha256},
            repeatable=True,  # it makes one thing, however often it is asked
            timeout=_COMPLETION_TIMEOUT,
        ).json()
    except BaseException as error:
        with contextlib.suppress(PareError):
            transport.request("DELETE", f"/v1/uploads/{upload_id}", headers=_TUS)
        if isinstance(error, Refused) and error.code == "checksum_mismatch":
            raise TransferCorrupt(f"upload of {file}", source.sha256, error.detail) from None
        raise
    return answer


class _Source:
    """The file, hashed as it is read for the first time."""

    def __init__(self, file: Path, total: int, on_bytes: OnBytes | None) -> None:
        self.file, self.total = file, total
        self._on_bytes = on_bytes
        self._digest = hashlib.sha256()
        self._hashed = 0

    @property
    def sha256(self) -> str:
        """The digest of what was read."""
        return self._digest.hexdigest()

    def read(self, offset: int) -> Iterator[bytes]:
        """Yield the bytes from `offset` on, which is never beyond what was read before."""
        done = offset
        with self.file.open("rb") as stream:
            stream.seek(offset)
            while done < self.total and (chunk := stream.read(min(CHUNK_BYTES, self.total - done))):
                new = done + len(chunk) - self._hashed
                if new > 0:
                    self._digest.update(chunk[-new:])
                    self._hashed += new
                yield chunk
                done += len(chunk)
                if self._on_bytes is not None:
                    self._on_bytes(done, self.total)


def _send(transport: Transport, url: str, source: _Source) -> None:
    offset = 0
    give_up_at = time.monotonic() + _PATIENCE_SECONDS
    pause = 0.1
    while offset < source.total:
        before = offset
        try:
            offset = _append(transport, url, source, offset)
        except (httpx2.TransportError, Unavailable, Conflict) as error:
            if isinstance(error, Refused) and error.code not in ("offset_mismatch", "unavailable"):
                raise
            if source.file.stat().st_size != source.total:
                raise UsageError(f"{source.file} changed while it was sent") from error
            time.sleep(pause)  # the service may still be putting away what came before the cut
            pause = min(pause * 2, 5.0)
            offset = _ask(transport, url, give_up_at)
        if offset > before:
            give_up_at, pause = time.monotonic() + _PATIENCE_SECONDS, 0.1
        elif time.monotonic() > give_up_at:
            raise NotReachable(transport.url, f"no byte of {source.file} got through for {_PATIENCE_SECONDS:g} s")


def _append(transport: Transport, url: str, source: _Source, offset: int) -> int:
    headers = _TUS | {
        "Upload-Offset": str(offset),
        "Content-Length": str(source.total - offset),
        "Content-Type": "application/offset+octet-stream",
    }
    with transport.stream("PATCH", url, content=source.read(offset), headers=headers) as response:
        if not response.is_success:
            raise problem_of(response)
        return int(response.headers["upload-offset"])


def _ask(transport: Transport, url: str, give_up_at: float) -> int:
    """Return where the upload goes on, once the service is there to say it."""
    while True:
        try:
            return int(transport.request("HEAD", url, headers=_TUS).headers["upload-offset"])
        except (NotReachable, Unavailable):
            if time.monotonic() > give_up_at:
                raise
            time.sleep(0.5)
