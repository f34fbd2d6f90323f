"""Files to and from the service: streamed both ways, verified by sha256, resumed where they broke."""

import contextlib
import hashlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2

from pare.errors import Conflict, NotReachable, PareError, TransferCorrupt, Unavailable, UsageError
from pare.records import Artifact
from pare.resumable import upload_resumable
from pare.transport import TIMEOUT, OnBytes, Transport, problem_of

CHUNK_BYTES = 1024 * 1024
RESUMABLE_BYTES = 16 * 1024 * 1024
"""Files from this size on are sent part by part, so that a broken connection costs a part and not the file."""

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MAX_BREAKS_WITHOUT_PROGRESS = 5


def upload(
    transport: Transport, path: str, file: Path, params: dict[str, Any], on_bytes: OnBytes | None = None
) -> dict[str, Any]:
    """POST a file as the request's body, a large one part by part; return the answer after comparing the sha256."""
    if not file.is_file():
        raise UsageError(f"{file} is not a file", fix="Give the path of the file to upload.")
    total = file.stat().st_size
    if total >= RESUMABLE_BYTES:
        return upload_resumable(transport, path, file, params, on_bytes)
    digest = hashlib.sha256()

    def send() -> httpx2.Response:
        nonlocal digest
        digest = hashlib.sha256()
        headers = {"Content-Length": str(total), "Content-Type": "application/octet-stream"}
        content = _read_chunks(file, total, digest.update, on_bytes)
        with transport.stream("POST", path, params=params, content=content, headers=headers) as response:
            if not response.is_success:
                raise problem_of(response)
            response.read()
            return response

    # An upload is repeated only when its bytes never left: a second copy would be a second model.
    answer: dict[str, Any] = transport.retry(send, safe=False).json()
    if answer["sha256"] != digest.hexdigest():
        # While it is being checked it cannot be deleted; the check finds out about changed bytes as well.
        with contextlib.suppress(Conflict):
            transport.request("DELETE", f"{path}/{answer['id']}")
        raise TransferCorrupt(f"upload of {file} as {answer['id']}", digest.hexdigest(), answer["sha256"])
    return answer


def download(transport: Transport, artifact: Artifact, directory: Path, on_bytes: OnBytes | None = None) -> Path:
    """Fetch an artifact into `directory` and return its path.

    The bytes go to a hidden partial file first, which a later call goes on with; it gets its name when its sha256 is
    the announced one. A file that is already there and right is not fetched again.
    """
    if not _FILE_NAME.fullmatch(artifact.name):
        raise UsageError(f"the service names an artifact {artifact.name!r}, which is not a plain file name")
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / artifact.name
    if target.is_file() and target.stat().st_size == artifact.size_bytes and _sha256(target) == artifact.sha256:
        return target
    partial = directory / f".{artifact.name}.{artifact.sha256[:16]}.partial"
    breaks = 0
    while True:
        start = partial.stat().st_size if partial.exists() else 0
        if start > artifact.size_bytes:
            partial.unlink()
            start = 0
        if start == artifact.size_bytes and partial.exists():
            break
        try:
            _fetch(transport, artifact, partial, start, on_bytes)
        except (httpx2.TransportError, Unavailable) as error:
            now = partial.stat().st_size if partial.exists() else 0
            breaks = 0 if now > start else breaks + 1
            if breaks >= _MAX_BREAKS_WITHOUT_PROGRESS:
                raise _as_pare_error(transport, error) from error
            time.sleep(min(0.1 * 2**breaks, 2.0))
    actual = _sha256(partial)
    if actual != artifact.sha256:
        partial.unlink()
        raise TransferCorrupt(f"download of {artifact.name}", artifact.sha256, actual)
    return partial.replace(target)


def _fetch(transport: Transport, artifact: Artifact, partial: Path, start: int, on_bytes: OnBytes | None) -> None:
    """Append to `partial` from `start`, or begin again where the service does not know the range any more."""
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": f'"sha256-{artifact.sha256}"'}
    with transport.stream("GET", f"/v1/artifacts/{artifact.id}", headers=headers) as response:
        if response.status_code != 307:
            return _receive(response, artifact, partial, start, on_bytes)
        link = response.headers["location"]
    # To the object store, with nothing of ours: the link says all. Its validators are others, and the digest decides.
    headers.pop("If-Range", None)
    with httpx2.stream("GET", link, headers=headers, timeout=TIMEOUT) as response:
        _receive(response, artifact, partial, start, on_bytes)


def _receive(
    response: httpx2.Response, artifact: Artifact, partial: Path, start: int, on_bytes: OnBytes | None
) -> None:
    if response.status_code == 416:
        partial.unlink()
        return
    if not response.is_success:
        raise problem_of(response)
    resumed = response.status_code == 206
    done = start if resumed else 0
    with partial.open("ab" if resumed else "wb") as file:
        # As they arrive: whole chunks would lose up to one when the connection breaks.
        for chunk in response.iter_raw():
            done += len(chunk)
            if done > artifact.size_bytes:
                break
            file.write(chunk)
            if on_bytes is not None:
                on_bytes(done, artifact.size_bytes)
    if done < artifact.size_bytes:
        raise httpx2.ReadError(f"the connection closed after {done} of {artifact.size_bytes} bytes")
    if done > artifact.size_bytes:
        partial.unlink()
        raise TransferCorrupt(
            f"download of {artifact.name}", artifact.sha256, f"more than the announced {artifact.size_bytes} bytes"
        )


def _read_chunks(
    file: Path, total: int, on_chunk: Callable[[bytes], None], on_bytes: OnBytes | None
) -> Iterator[bytes]:
    done = 0
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            on_chunk(chunk)
            yield chunk
            done += len(chunk)
            if on_bytes is not None:
                on_bytes(done, total)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _as_pare_error(transport: Transport, error: Exception) -> PareError:
    return error if isinstance(error, PareError) else NotReachable(transport.url, str(error) or type(error).__name__)
