"""Immutable bytes over HTTP (RFC 9110): strong ETag, conditions, one range, digest (RFC 9530)."""

import asyncio
import base64
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from itertools import chain

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from app.api.frame import HEAD_ONLY
from app.api.handover import MECHANISM, find_internal_uri
from app.errors import PreconditionFailed, RangeNotSatisfiable
from app.settings import Settings
from app.storage import Section
from app.storage.base import CHUNK_BYTES

RANGE = re.compile(r"bytes=[ \t]*(\d{0,18})-(\d{0,18})[ \t]*", re.ASCII | re.IGNORECASE)
ENTITY_TAG = re.compile(r'(W/)?"([\x21\x23-\x7e\x80-\xff]*)"')
MAX_HEADER_CHARACTERS = 8192


@dataclass(frozen=True)
class Content:
    """The bytes to answer with."""

    sha256: str
    size_bytes: int
    media_type: str
    file_name: str
    """Only letters, digits, dot, dash and underscore."""

    @property
    def etag(self) -> str:
        """The strong validator."""
        return f'"sha256-{self.sha256}"'

    @property
    def digest(self) -> str:
        """The value of Repr-Digest."""
        return f"sha-256=:{base64.b64encode(bytes.fromhex(self.sha256)).decode()}:"


def answer_content(request: Request, section: Section, content: Content, settings: Settings) -> Response:
    """Return 200, 206, 304, 307 to the store, or what the proxy makes 200 and 206 of.

    Raises PreconditionFailed (412) and RangeNotSatisfiable (416).
    """
    given = {name: request.headers.get(name) for name in ("if-match", "if-none-match", "if-range", "range")}
    headers = {
        "ETag": content.etag,
        "Repr-Digest": content.digest,
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, no-cache",
    }
    if given["if-match"] is not None and not _matches(given["if-match"], content.etag, weak=False):
        raise PreconditionFailed(f"the file's ETag is {content.etag}")
    if given["if-none-match"] is not None and _matches(given["if-none-match"], content.etag, weak=True):
        return Response(status_code=304, headers=headers)
    if settings.download_link_seconds and not request.scope.get(HEAD_ONLY):
        link = section.link(content.sha256, settings.download_link_seconds)
        if link is not None:
            if not section.exists(content.sha256):
                section.open(content.sha256)  # raises what is the matter
            return Response(status_code=307, headers=headers | {"Location": link, "Cache-Control": "no-store"})
    headers["Content-Disposition"] = f'attachment; filename="{content.file_name}"'
    applies = given["if-range"] is None or given["if-range"].strip() == content.etag
    part = parse_range(given["range"], content.size_bytes) if given["range"] is not None and applies else None
    start, end = part or (0, content.size_bytes)
    if end - start > CHUNK_BYTES and not request.scope.get(HEAD_ONLY):
        uri = find_internal_uri(
            request, section, content.sha256, content.size_bytes, settings.x_accel_redirect, whole=part is None
        )
        if uri is not None:
            if part is None:
                del headers["Accept-Ranges"]  # nginx adds its own, but not to a range
            return Response(headers=headers | {MECHANISM: uri}, media_type=content.media_type)
    headers["Content-Length"] = str(end - start)
    if part:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{content.size_bytes}"
    status = 206 if part else 200
    if request.scope.get(HEAD_ONLY):
        return Response(status_code=status, headers=headers, media_type=content.media_type)
    if part:
        chunks = section.open(content.sha256, start, end)
    else:
        chunks = begin(section.read(content.sha256, content.size_bytes))
    if end - start <= CHUNK_BYTES:
        return Response(b"".join(chunks), status, headers, media_type=content.media_type)
    return StreamingResponse(_read_ahead(chunks), status, headers, media_type=content.media_type)


def parse_range(header: str, size_bytes: int) -> tuple[int, int] | None:
    """Return the asked-for [start, end), or None where the header is to be ignored.

    Ignored, as RFC 9110 section 14.2 allows: other units, malformed values, and more than one range.
    """
    found = RANGE.fullmatch(header[:MAX_HEADER_CHARACTERS])
    if found is None or found.groups() == ("", ""):
        return None
    first, last = found.groups()
    if not first:
        start, end = max(0, size_bytes - int(last)), size_bytes
    else:
        start, end = int(first), min(int(last) + 1, size_bytes) if last else size_bytes
        if last and int(last) < start:
            return None
    if start >= end:
        raise RangeNotSatisfiable(size_bytes)
    return start, end


def begin(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Have the first chunk before the answer begins: a small file that is damaged is a problem, not half an answer."""
    first = next(chunks, b"")
    return chain([first], chunks) if first else chunks


async def _read_ahead(chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the chunks; the next is read, and hashed, while one is sent."""
    ahead = asyncio.ensure_future(run_in_threadpool(next, chunks, b""))
    try:
        while chunk := await ahead:
            ahead = asyncio.ensure_future(run_in_threadpool(next, chunks, b""))
            yield chunk
    finally:
        await asyncio.gather(ahead, return_exceptions=True)  # its thread uses the file


def _matches(header: str, etag: str, *, weak: bool) -> bool:
    if header.strip() == "*":
        return True
    for is_weak, tag in ENTITY_TAG.findall(header[:MAX_HEADER_CHARACTERS]):
        if f'"{tag}"' == etag and (weak or not is_weak):
            return True
    return False
