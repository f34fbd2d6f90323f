"""Resumable uploads: the tus protocol 1.0.0 with creation, checksum, expiration and termination.

A file that is complete becomes a model or a dataset by POST /v1/models or /v1/datasets with its upload_id. Left out on
purpose: X-HTTP-Method-Override, because what a request does is said by its method alone.
"""

import re
from datetime import datetime
from email.utils import format_datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Path, Request, Response
from starlette.concurrency import run_in_threadpool

from app.api.appending import ALGORITHMS, Append, read_checksum, receive
from app.api.frame import HEAD_ONLY
from app.api.openapi import CREATED, problems
from app.api.owner import Owner
from app.api.problems import TUS_VERSION
from app.api.recorder import RECORDED
from app.api.service import Parts, Service
from app.api.uploads import discard_upload
from app.api.views import SelfLink, View
from app.db.tables import UploadRow
from app.errors import (
    Conflict,
    InvalidRequest,
    OffsetMismatch,
    Problem,
    TooLarge,
    UnsupportedFormat,
    VersionUnsupported,
)
from app.files.resumable import begin_upload, find_upload
from app.jobs.quotas import require_stored_fits

router = APIRouter(prefix="/v1/uploads", tags=["uploads"])

MEDIA_TYPE = "application/offset+octet-stream"
MAX_BYTES = 2**62
_PAIR = r"[\x21-\x2b\x2d-\x7e]+( [A-Za-z0-9+/]*={0,2})?"
_METADATA = re.compile(rf"{_PAIR}(,{_PAIR})*")

UploadId = Annotated[
    str, Path(pattern=r"^upl_[a-z0-9]{26}$", description="The upload.", examples=["upl_k3v0q7m2c9x1f8z5a4b6n0p2r7"])
]


class UploadView(View):
    """A file on its way in."""

    id: str
    """Names the upload."""
    size_bytes: int
    """Size of the whole file."""
    offset_bytes: int
    """Bytes that have arrived and are safe."""
    made: str | None
    """The model or dataset that was made of it; null before."""
    created_at: datetime
    """When it began."""
    expires_at: datetime
    """When it is forgotten, if nothing is added until then."""
    links: SelfLink
    """Where to send the bytes, with PATCH."""


def check_version(
    request: Request,
    tus_resumable: Annotated[str | None, Header(alias="Tus-Resumable", include_in_schema=False)] = None,
) -> None:
    """Raise VersionUnsupported where the client follows another version, or none; only a plain GET needs none."""
    plain = request.method == "GET" and not request.scope.get(HEAD_ONLY)
    if tus_resumable != TUS_VERSION and not (plain and tus_resumable is None):
        raise VersionUnsupported


_TUS: list[Any] = [Depends(check_version)]


def _version_header(*, required: bool = True) -> dict[str, Any]:
    """Describe the header by which clients say that they follow the protocol; `check_version` answers it with 412."""
    header = {"name": "Tus-Resumable", "in": "header", "required": required, "description": "Version of the protocol."}
    return {"parameters": [{**header, "schema": {"type": "string", "enum": [TUS_VERSION]}}]}


def _headers(*names: str) -> dict[str, Any]:
    described = {
        "Tus-Resumable": "The version of the protocol.",
        "Upload-Offset": "Bytes that have arrived and are safe.",
        "Upload-Length": "Size of the whole file.",
        "Upload-Expires": "When the upload is forgotten, if nothing is added until then.",
        "Upload-Metadata": "As it was sent.",
        "Tus-Version": "The versions that are spoken.",
        "Tus-Extension": "What is there beyond the core.",
        "Tus-Max-Size": "The largest file.",
        "Tus-Checksum-Algorithm": "Digests for Upload-Checksum.",
    }
    return {name: {"description": described[name], "schema": {"type": "string"}} for name in names}


_ABILITIES = ("Tus-Resumable", "Tus-Version", "Tus-Extension", "Tus-Max-Size", "Tus-Checksum-Algorithm")
_STATE = ("Tus-Resumable", "Upload-Offset", "Upload-Length", "Upload-Expires", "Upload-Metadata")


@router.options(
    "",
    operation_id="describe_uploads",
    status_code=204,
    responses={204: {"headers": _headers(*_ABILITIES)}},
)
def describe_uploads(service: Parts, response: Response) -> None:
    """Say which version and which extensions of the protocol there are, and how large a file may be."""
    response.headers["Tus-Version"] = TUS_VERSION
    response.headers["Tus-Extension"] = "creation,checksum,expiration,termination"
    response.headers["Tus-Max-Size"] = str(_max_bytes(service))
    response.headers["Tus-Checksum-Algorithm"] = ",".join(ALGORITHMS)


@router.post(
    "",
    operation_id="begin_upload",
    openapi_extra=_version_header(),
    status_code=201,
    dependencies=_TUS,
    responses={
        201: {"headers": {**CREATED["headers"], **_headers("Tus-Resumable", "Upload-Offset", "Upload-Expires")}},
        **problems(412, 413, 422, 507),
    },
)
def post_upload(
    service: Parts,
    owner: Owner,
    response: Response,
    size_bytes: Annotated[
        int, Header(alias="Upload-Length", ge=1, le=MAX_BYTES, description="Size of the whole file in bytes.")
    ],
    description: Annotated[
        str | None,
        Header(
            alias="Upload-Metadata",
            max_length=4096,
            description="Your own notes: `key base64,key base64`; Pare gives them back, and that is all.",
        ),
    ] = None,
) -> UploadView:
    """Begin a resumable upload. The bytes follow with PATCH to its Location."""
    if size_bytes > _max_bytes(service):
        raise TooLarge(f"the file has {size_bytes} bytes; the limit is {_max_bytes(service)}")
    if description is not None and not _METADATA.fullmatch(description):
        raise InvalidRequest([Problem("header:Upload-Metadata", "send `key base64`, several with commas between")])
    with service.database.session() as session:
        upload = begin_upload(
            session,
            owner=owner,
            size_bytes=size_bytes,
            description=description,
            expiry_seconds=service.settings.upload_expiry_seconds,
        )
        require_stored_fits(session, service.settings, owner)
        view = _describe(upload)
    response.headers["Location"] = view.links.self
    response.headers["Upload-Offset"] = "0"
    response.headers["Upload-Expires"] = _date(upload.expires_at)
    return view


@router.get(
    "/{upload_id}",
    operation_id="get_upload",
    openapi_extra=_version_header(required=False),
    dependencies=_TUS,
    responses={
        200: {"headers": _headers(*_STATE)},
        **problems(404, 410, 412),
    },
)
def show_upload(service: Parts, owner: Owner, response: Response, upload_id: UploadId) -> UploadView:
    """Show how much of a file has arrived; HEAD, as the protocol asks for it, says the same in headers."""
    with service.database.read() as session:
        upload = find_upload(session, owner, upload_id)
    response.headers["Upload-Offset"] = str(upload.offset_bytes)
    response.headers["Upload-Length"] = str(upload.size_bytes)
    response.headers["Upload-Expires"] = _date(upload.expires_at)
    if upload.description is not None:
        response.headers["Upload-Metadata"] = upload.description
    return _describe(upload)


@router.patch(
    "/{upload_id}",
    operation_id="append_to_upload",
    status_code=204,
    dependencies=_TUS,
    openapi_extra={
        **_version_header(),
        "requestBody": {
            "required": True,
            "description": "The next bytes of the file, as many as you like.",
            "content": {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}},
        },
    },
    responses={
        204: {"headers": _headers("Tus-Resumable", "Upload-Offset", "Upload-Expires")},
        **problems(404, 409, 410, 412, 413, 415, 422, 460, 507),
    },
)
async def patch_upload(
    request: Request,
    response: Response,
    service: Parts,
    owner: Owner,
    upload_id: UploadId,
    offset: Annotated[
        int, Header(alias="Upload-Offset", ge=0, le=MAX_BYTES, description="Where in the file these bytes begin.")
    ],
    checksum: Annotated[
        str | None,
        Header(
            alias="Upload-Checksum",
            max_length=200,
            description="`sha256 <base64>` or `sha1 <base64>` of this body; then it counts as a whole or not at all.",
        ),
    ] = None,
) -> None:
    """Append. What has arrived when the connection breaks counts too: HEAD says where to go on."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != MEDIA_TYPE:
        raise UnsupportedFormat(
            "the body is not the next part of a file", fix=f"Send it with Content-Type: {MEDIA_TYPE}."
        )
    upload = await run_in_threadpool(_find, service, owner, upload_id)
    expected = read_checksum(checksum) if checksum is not None else None
    if upload.made is not None:
        raise Conflict(f"upload {upload_id} is complete", code="upload_complete", fix="Begin another upload.")
    if offset != upload.offset_bytes:
        raise OffsetMismatch(upload.offset_bytes)
    declared = request.headers.get("content-length", "")
    append = Append(service, upload, expected)
    try:
        if declared.isdecimal():
            append.check_length(int(declared))
        await receive(request, append)
        await run_in_threadpool(append.finish)
    except TooLarge:
        # It is not the file that was announced; nobody can say which of its bytes are.
        await run_in_threadpool(discard_upload, service, owner, upload_id)
        raise
    finally:
        append.abort()
    if append.offset < upload.size_bytes:
        request.scope[RECORDED] = True  # thousands of parts would bury the rest; the beginning and the last one tell
    response.headers["Upload-Offset"] = str(append.offset)
    response.headers["Upload-Expires"] = _date(upload.expires_at)


@router.delete(
    "/{upload_id}",
    operation_id="end_upload",
    openapi_extra=_version_header(),
    status_code=204,
    dependencies=_TUS,
    responses={204: {"headers": _headers("Tus-Resumable")}, **problems(404, 410, 412)},
)
def delete_upload(service: Parts, owner: Owner, upload_id: UploadId) -> None:
    """Give an upload up: its bytes are deleted. What was made of one that is complete stays."""
    discard_upload(service, owner, upload_id)


def _find(service: Service, owner: str, upload_id: str) -> UploadRow:
    with service.database.read() as session:
        return find_upload(session, owner, upload_id)


def _max_bytes(service: Service) -> int:
    return max(service.settings.max_model_bytes, service.settings.max_dataset_bytes)


def _date(time: datetime) -> str:
    return format_datetime(time, usegmt=True)


def _describe(upload: UploadRow) -> UploadView:
    return UploadView(
        id=upload.id,
        size_bytes=upload.size_bytes,
        offset_bytes=upload.offset_bytes,
        made=upload.made,
        created_at=upload.created_at,
        expires_at=upload.expires_at,
        links=SelfLink(self=f"/v1/uploads/{upload.id}"),
    )
