"""Files into storage: a megabyte in memory at a time, hashed on the way, nothing left behind on any failure.

A file is the body of the request, or it was sent before, part by part (app/api/resumable.py), and the body names it.
"""

import asyncio
import json
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, TypeVar

from fastapi import Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import Field, ValidationError
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from app.access.keys import Caller, require_live
from app.api.owner import caller_of
from app.api.service import Service
from app.db.tables import DatasetRow, ModelRow
from app.errors import Conflict, InvalidRequest, PareError, Problem, TooLarge, UnsupportedFormat
from app.files import hold
from app.files.resumable import Completion, assemble, end_upload, find_upload, finish_upload, list_parts
from app.jobs.quotas import find_room, full_storage
from app.jobs.uploads import get_upload
from app.recipes.base import Spec
from app.storage import Blob, BlobWriter, Section, owner_storage, upload_storage
from app.storage.base import CHUNK_BYTES, check_digest

Made = TypeVar("Made", ModelRow, DatasetRow)

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


class CompletionRequest(Spec):
    """The file is one that was sent to /v1/uploads."""

    upload_id: str = Field(pattern=r"^upl_[a-z0-9]{26}$", examples=["upl_k3v0q7m2c9x1f8z5a4b6n0p2r7"])
    """The upload, all of whose bytes have arrived. It makes one model or dataset, however often this is sent."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the whole file, in hexadecimal."""


REQUEST_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "The bytes of the file, as they are (no multipart); or, as JSON, which resumable upload it is.",
        "content": {
            "application/octet-stream": {"schema": {"type": "string", "format": "binary", "minLength": 1}},
            "application/json": {"schema": CompletionRequest.model_json_schema()},
        },
    }
}
"""For the API description: the endpoint reads the stream itself."""


async def take_file(
    request: Request,
    service: Service,
    owner: str,
    max_bytes: int,
    table: type[Made],
    add: Callable[[Session, Blob], Made],
) -> Made:
    """Store the file that the body is, or names, and add what it is.

    Whether the caller may is looked up again at the end, in the transaction that adds it: uploads take long.
    """
    caller = caller_of(request)
    if request.headers.get("content-type", "").lower().startswith("application/json"):
        completion = await _read_completion(request, service.settings.max_body_bytes)
        return await run_in_threadpool(_complete, service, caller, completion, max_bytes, table, add)
    await check_room(request, service, owner)
    section = owner_storage(service.storage, owner)
    blob = await receive_blob(request, section, max_bytes)

    def write() -> Made:
        with service.database.session() as session:
            require_live(session, caller)
            hold(session, section, [blob])
            return add(session, blob)

    return await run_in_threadpool(write)


async def check_room(request: Request, service: Service, owner: str) -> None:
    """Raise QuotaExceeded where it is known before the body is read that the owner may not store it.

    What comes of uploads at the same time is judged when the upload is written down.
    """

    def find() -> int | None:
        with service.database.read() as session:
            return find_room(session, service.settings, owner)

    room = await run_in_threadpool(find)
    declared = request.headers.get("content-length", "")
    num_bytes = int(declared) if declared.isdecimal() else 1
    if room is not None and num_bytes > room:
        raise full_storage(f"the body has {num_bytes} bytes; {room} more may be stored")


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
    # Disk and hash work in a thread. Meanwhile the next chunk comes; when that is complete too, the sender waits.
    writing: asyncio.Future[None] | None = None
    try:
        async for chunk in request.stream():
            num_bytes += len(chunk)
            if num_bytes > max_bytes:
                raise TooLarge(f"the body has more than {max_bytes} bytes")
            waiting += chunk
            if len(waiting) >= CHUNK_BYTES:
                if writing is not None:
                    await writing
                writing = asyncio.ensure_future(run_in_threadpool(writer.write, waiting))
                waiting = bytearray()
        if writing is not None:
            await writing
        if waiting:
            await run_in_threadpool(writer.write, waiting)
    finally:
        if writing is not None:
            await asyncio.gather(writing, return_exceptions=True)  # nobody takes the file away under it
    return num_bytes


async def _read_completion(request: Request, max_bytes: int) -> Completion:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise TooLarge(f"the body has more than {max_bytes} bytes")
    try:
        given = json.loads(body)
        asked = CompletionRequest.model_validate(given)
    except ValidationError as error:
        found = [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
        raise RequestValidationError(found, body=given) from None
    except (ValueError, RecursionError) as error:
        place, message = getattr(error, "pos", 0), getattr(error, "msg", "it cannot be read")
        described = {"type": "json_invalid", "loc": ("body", place), "msg": message, "ctx": {"error": message}}
        raise RequestValidationError([described]) from None
    return Completion(asked.upload_id, asked.sha256)


def _complete(
    service: Service,
    caller: Caller,
    completion: Completion,
    max_bytes: int,
    table: type[Made],
    add: Callable[[Session, Blob], Made],
) -> Made:
    """Make a model or dataset of a resumable upload, or return the one that was made of it before."""
    upload_id, database, storage, owner = completion.upload_id, service.database, service.storage, caller.owner
    with database.read() as session:
        upload = find_upload(session, owner, upload_id)
        if upload.made is not None:
            return _find_made(session, table, owner, upload.made, completion)
        is_too_large = upload.size_bytes > max_bytes
        parts = [] if is_too_large else list_parts(session, upload)
    if is_too_large:  # the limit is that of the noun, which nobody knew when the upload began
        discard_upload(service, owner, upload_id)
        raise TooLarge(f"the upload has {upload.size_bytes} bytes; the limit is {max_bytes}")
    blob = assemble(storage, owner, completion, parts)
    with database.session() as session:
        require_live(session, caller)
        upload = find_upload(session, owner, upload_id, for_update=True)
        if upload.made is not None:
            return _find_made(session, table, owner, upload.made, completion)
        hold(session, owner_storage(storage, owner), [blob])
        upload.made = upload.id  # until the row has its id: from here on the bytes count once, as its own
        made = add(session, blob)
        finish_upload(session, upload, made.id, service.settings.upload_expiry_seconds)
    _clear(service, upload_id)
    return made


def discard_upload(service: Service, owner: str, upload_id: str) -> None:
    """Forget a resumable upload and delete its bytes."""
    with service.database.session() as session:
        end_upload(session, owner, upload_id)
    _clear(service, upload_id)


def _find_made(session: Session, table: type[Made], owner: str, made: str, completion: Completion) -> Made:
    noun = "model" if made.startswith("mdl_") else "dataset"
    if table.__tablename__ != f"{noun}s":
        raise Conflict(f"the upload was made {noun} {made}", code="upload_used", fix="Upload the file again.")
    row = get_upload(session, table, owner, made)
    check_digest(Blob(row.sha256, row.size_bytes), completion.sha256)
    return row


def _clear(service: Service, upload_id: str) -> None:
    with suppress(PareError):  # the collector takes what is left
        upload_storage(service.storage, upload_id).clear()
