"""Upload bodies into storage: a megabyte in memory at a time, hashed on the way, nothing left behind on any failure."""

from typing import Annotated

from fastapi import Query, Request
from starlette.concurrency import run_in_threadpool

from app.errors import InvalidRequest, Problem, TooLarge, UnsupportedFormat
from app.storage import Blob, BlobWriter, Section
from app.storage.base import CHUNK_BYTES

Name = Annotated[
    str,
    Query(
        min_length=1,
        max_length=200,
        # Control characters, and the marks that turn the direction of text around, disguise names.
        pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]+$",
        description="A name for people; need not be unique.",
        examples=["resnet20"],
    ),
]

REQUEST_BODY = {
    "requestBody": {
        "required": True,
        "description": "The bytes of the file, as they are (no multipart).",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary", "minLength": 1}}},
    }
}
"""For the API description: the endpoint reads the stream itself."""


async def receive_blob(request: Request, section: Section, max_bytes: int) -> Blob:
    """Store the request's body."""
    if request.headers.get("content-type", "").lower().startswith("multipart/"):
        raise UnsupportedFormat(
            "the body is a multipart form", fix="Send the file itself as the body: curl --data-binary @FILE or -T FILE."
        )
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise TooLarge(f"the body has {int(declared)} bytes; the limit is {max_bytes}")
    writer = await run_in_threadpool(section.writer)
    try:
        num_bytes = await _receive(request, writer, max_bytes)
        if num_bytes == 0:
            raise InvalidRequest([Problem("", "the body is empty; send the bytes of the file")], code="empty_upload")
        return await run_in_threadpool(writer.commit)
    finally:
        writer.abort()  # does nothing after commit


async def _receive(request: Request, writer: BlobWriter, max_bytes: int) -> int:
    num_bytes = 0
    waiting = bytearray()
    async for chunk in request.stream():
        num_bytes += len(chunk)
        if num_bytes > max_bytes:
            raise TooLarge(f"the body has more than {max_bytes} bytes")
        waiting += chunk
        if len(waiting) >= CHUNK_BYTES:
            # Disk and hash work in a thread: other requests go on meanwhile, and the sender waits.
            await run_in_threadpool(writer.write, bytes(waiting))
            waiting.clear()
    if waiting:
        await run_in_threadpool(writer.write, bytes(waiting))
    return num_bytes
