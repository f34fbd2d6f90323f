"""Artifacts: the files jobs made, their list and their bytes."""

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Request, Response
from sqlalchemy import select

from app.api.downloads import Content, answer_content
from app.api.jobs import JobId
from app.api.openapi import LOCATION, problems
from app.api.owner import Owner
from app.api.service import Parts
from app.api.views import SelfLink, View
from app.db.tables import ArtifactRow
from app.errors import NotFound
from app.jobs import get_job
from app.storage import owner_storage

router = APIRouter(prefix="/v1", tags=["artifacts"])

ArtifactId = Annotated[
    str, Path(pattern=r"^art_[a-z0-9]{26}$", description="The artifact.", examples=["art_k3v0q7m2c9x1f8z5a4b6n0p2r7"])
]


class ArtifactView(View):
    """A file a job made."""

    id: str
    """Names the artifact."""
    name: str
    """The name of the file."""
    media_type: str
    """What kind of file it is."""
    size_bytes: int
    """Its size."""
    sha256: str
    """SHA-256 of its bytes, in hexadecimal."""
    created_at: datetime
    """When the job succeeded."""
    links: SelfLink
    """Where the bytes are."""


class ArtifactList(View):
    """The files of one job."""

    items: list[ArtifactView]
    """By name; none while the job has not succeeded."""


@router.get("/jobs/{job_id}/artifacts", operation_id="list_artifacts", responses=problems(404))
def list_artifacts(service: Parts, owner: Owner, job_id: JobId) -> ArtifactList:
    """List the files of a job. They appear all at once, when it succeeds."""
    with service.database.read() as session:
        get_job(session, owner, job_id)
        rows = session.scalars(select(ArtifactRow).where(ArtifactRow.job_id == job_id).order_by(ArtifactRow.name))
        return ArtifactList(items=[_describe(row) for row in rows])


def _headers(*names: str) -> dict[str, Any]:
    described = {
        "ETag": 'Strong validator: `"sha256-<hexadecimal>"`.',
        "Repr-Digest": "SHA-256 of the whole file (RFC 9530), in partial answers too.",
        "Accept-Ranges": "`bytes`.",
        "Content-Disposition": "The name of the file.",
        "Content-Range": "Which bytes these are, and of how many.",
    }
    return {name: {"description": described[name], "schema": {"type": "string"}} for name in names}


_BYTES = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_WHOLE = ("ETag", "Repr-Digest", "Accept-Ranges", "Content-Disposition")


@router.get(
    "/artifacts/{artifact_id}",
    operation_id="download_artifact",
    response_class=Response,
    responses={
        200: {"description": "The whole file.", "content": _BYTES, "headers": _headers(*_WHOLE)},
        206: {"description": "One range of it.", "content": _BYTES, "headers": _headers(*_WHOLE, "Content-Range")},
        307: {
            "description": "The bytes are in the object store; the link is good for some minutes, for ranges too.",
            "headers": {**_headers("ETag", "Repr-Digest"), "Location": LOCATION},
        },
        304: {"description": "The client has this file.", "headers": _headers("ETag", "Repr-Digest", "Accept-Ranges")},
        **problems(404, 412, 416),
    },
)
def download_artifact(
    request: Request,
    service: Parts,
    owner: Owner,
    artifact_id: ArtifactId,
    range_: Annotated[  # noqa: ARG001 - described here, read by answer_content
        str | None,
        Header(alias="Range", description="One range of bytes; several at once are answered with the whole file."),
    ] = None,
    if_range: Annotated[  # noqa: ARG001
        str | None, Header(alias="If-Range", description="The ETag for which the range is meant.")
    ] = None,
    if_none_match: Annotated[  # noqa: ARG001
        str | None, Header(alias="If-None-Match", description="ETags the client has.")
    ] = None,
    if_match: Annotated[str | None, Header(alias="If-Match", description="ETags the client expects.")] = None,  # noqa: ARG001
) -> Response:
    """Download a file: whole or one range, resumable, verified. HEAD gives the same headers without the bytes."""
    with service.database.read() as session:
        query = select(ArtifactRow).where(ArtifactRow.id == artifact_id, ArtifactRow.owner == owner)
        row = session.scalar(query)
    if row is None:
        raise NotFound(f"there is no artifact {artifact_id}")
    section = owner_storage(service.storage, owner)
    content = Content(row.sha256, row.size_bytes, row.media_type, row.name)
    return answer_content(request, section, content, service.settings)


def _describe(row: ArtifactRow) -> ArtifactView:
    return ArtifactView(
        id=row.id,
        name=row.name,
        media_type=row.media_type,
        size_bytes=row.size_bytes,
        sha256=row.sha256,
        created_at=row.created_at,
        links=SelfLink(self=f"/v1/artifacts/{row.id}"),
    )
