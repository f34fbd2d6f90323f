"""Datasets: upload, look, delete."""

from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from sqlalchemy.orm import Session

from app.api.cursors import Cursor, Limit, read_page
from app.api.openapi import CREATED, problems
from app.api.owner import Owner
from app.api.service import Parts
from app.api.uploads import REQUEST_BODY, Name, take_file
from app.api.views import ErrorView, SelfLink, View
from app.db.tables import DatasetRow
from app.jobs.uploads import add_dataset, delete_upload, get_upload
from app.recipes.facts import DatasetFacts
from app.recipes.plan import DatasetFormat
from app.storage import Blob

router = APIRouter(prefix="/v1/datasets", tags=["datasets"])

DatasetId = Annotated[
    str, Path(pattern=r"^dst_[a-z0-9]{26}$", description="The dataset.", examples=["dst_k3v0q7m2c9x1f8z5a4b6n0p2r7"])
]


class DatasetView(View):
    """Uploaded, immutable examples."""

    id: str
    """Names the dataset in recipes."""
    name: str
    """The name given at upload."""
    format: str
    """The format of the file."""
    state: Literal["checking", "ready", "rejected"]
    """A dataset can be used once it is ready."""
    size_bytes: int
    """Size of the file."""
    sha256: str
    """SHA-256 of the file, in hexadecimal."""
    created_at: datetime
    """When it was uploaded."""
    facts: DatasetFacts | None
    """What the check found; null until ready."""
    error: ErrorView | None
    """Why it was rejected; null otherwise."""
    links: SelfLink
    """Related URL paths."""


class DatasetPage(View):
    """One page of datasets, newest first."""

    items: list[DatasetView]
    """The datasets."""
    next_cursor: str | None
    """For the `cursor` of the next page; null on the last."""


@router.post(
    "",
    operation_id="upload_dataset",
    status_code=201,
    response_model=DatasetView,
    responses={201: CREATED, **problems(400, 404, 409, 410, 413, 415, 422, 460, 507)},
    openapi_extra=REQUEST_BODY,
)
async def upload_dataset(
    request: Request,
    response: Response,
    service: Parts,
    owner: Owner,
    format: Annotated[
        DatasetFormat,
        Query(
            description="npz, safetensors: arrays of equal length. parquet: a table of numbers, lists of numbers and "
            "text. images: a zip with one folder of images per class."
        ),
    ],
    name: Name = "dataset",
) -> DatasetView:
    """Upload a dataset: the body is the file, streamed. It is checked in a sandbox before it can be used."""

    def add(session: Session, blob: Blob) -> DatasetRow:
        return add_dataset(session, service.settings, owner=owner, name=name, format=format, blob=blob)

    dataset = describe_dataset(
        await take_file(request, service, owner, service.settings.max_dataset_bytes, DatasetRow, add)
    )
    response.headers["Location"] = dataset.links.self
    return dataset


@router.get("", operation_id="list_datasets", responses=problems(400, 422))
def list_datasets(service: Parts, owner: Owner, cursor: Cursor = None, limit: Limit = 50) -> DatasetPage:
    """List datasets, newest first."""
    with service.database.read() as session:
        rows, next_cursor = read_page(session, DatasetRow, owner, cursor, limit)
        return DatasetPage(items=[describe_dataset(row) for row in rows], next_cursor=next_cursor)


@router.get("/{dataset_id}", operation_id="get_dataset", responses=problems(404))
def get_dataset(service: Parts, owner: Owner, dataset_id: DatasetId) -> DatasetView:
    """Show one dataset with its columns."""
    with service.database.read() as session:
        return describe_dataset(get_upload(session, DatasetRow, owner, dataset_id))


@router.delete("/{dataset_id}", operation_id="delete_dataset", status_code=204, responses=problems(404, 409))
def delete_dataset(service: Parts, owner: Owner, dataset_id: DatasetId) -> None:
    """Delete a dataset that no unfinished job uses. Finished jobs and their artifacts stay."""
    with service.database.session() as session:
        delete_upload(session, DatasetRow, owner, dataset_id)


def describe_dataset(row: DatasetRow) -> DatasetView:
    """Return what the user sees of a row."""
    return DatasetView.model_validate(
        {
            "id": row.id,
            "name": row.name,
            "format": row.format,
            "state": row.state,
            "size_bytes": row.size_bytes,
            "sha256": row.sha256,
            "created_at": row.created_at,
            "facts": row.facts,
            "error": row.error,
            "links": {"self": f"/v1/datasets/{row.id}"},
        }
    )
