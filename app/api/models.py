"""Models: upload, look, delete."""

from datetime import datetime
from typing import Annotated, Literal, NoReturn

from fastapi import APIRouter, Path, Query, Request, Response
from sqlalchemy import select
from sqlalchemy.orm import Session

from app.api.cursors import Cursor, Limit, read_page
from app.api.openapi import CREATED, problems
from app.api.owner import Owner
from app.api.service import Parts
from app.api.uploads import REQUEST_BODY, Name, take_file
from app.api.views import ErrorView, SelfLink, View
from app.db.tables import ModelRow
from app.errors import InvalidRequest, Problem
from app.jobs.uploads import add_model, delete_upload, get_upload
from app.recipes.architectures import MAX_TEXT, UnknownArchitecture, parse_architecture
from app.recipes.facts import ModelFacts
from app.storage import Blob

router = APIRouter(prefix="/v1/models", tags=["models"])

UploadFormat = Literal["pt2", "hf", "safetensors", "onnx"]
_FORMAT = (
    "What the file is. pt2: written by torch.export.save. hf: a zip of a Hugging Face folder (config.json and "
    "safetensors). safetensors: a state dict, with `architecture`. onnx: a float model in one ONNX file."
)

ModelId = Annotated[
    str, Path(pattern=r"^mdl_[a-z0-9]{26}$", description="The model.", examples=["mdl_k3v0q7m2c9x1f8z5a4b6n0p2r7"])
]


class ModelView(View):
    """An uploaded, immutable program."""

    id: str
    """Names the model in jobs."""
    name: str
    """The name given at upload."""
    format: str
    """The format of the file."""
    architecture: str | None
    """safetensors: the program of the catalogue that uses the weights; null otherwise."""
    state: Literal["checking", "ready", "rejected"]
    """A model can be used once it is ready."""
    size_bytes: int
    """Size of the file."""
    sha256: str
    """SHA-256 of the file, in hexadecimal."""
    created_at: datetime
    """When it was uploaded."""
    facts: ModelFacts | None
    """What the check found; null until ready."""
    error: ErrorView | None
    """Why it was rejected; null otherwise."""
    links: SelfLink
    """Related URL paths."""


class ModelPage(View):
    """One page of models, newest first."""

    items: list[ModelView]
    """The models."""
    next_cursor: str | None
    """For the `cursor` of the next page; null on the last."""


@router.post(
    "",
    operation_id="upload_model",
    status_code=201,
    response_model=ModelView,
    responses={201: CREATED, **problems(400, 404, 409, 410, 413, 415, 422, 460, 507)},
    openapi_extra=REQUEST_BODY,
)
async def upload_model(
    request: Request,
    response: Response,
    service: Parts,
    owner: Owner,
    name: Name = "model",
    format: Annotated[UploadFormat, Query(description=_FORMAT)] = "pt2",
    architecture: Annotated[
        str | None,
        Query(
            description="safetensors only: the program that uses the weights, `name` or `name:parameter=number,...`; "
            "GET /v1/architectures lists them.",
            examples=["resnet20", "vit:heads=6"],
            max_length=MAX_TEXT,
        ),
    ] = None,
) -> ModelView:
    """Upload a model: the body is the file, streamed. It is checked in a sandbox before it can be used."""
    check_architecture(format, architecture)

    def add(session: Session, blob: Blob) -> ModelRow:
        return add_model(
            session, service.settings, owner=owner, name=name, format=format, blob=blob, architecture=architecture
        )

    model = describe_model(await take_file(request, service, owner, service.settings.max_model_bytes, ModelRow, add))
    response.headers["Location"] = model.links.self
    return model


@router.get("", operation_id="list_models", responses=problems(400, 422))
def list_models(service: Parts, owner: Owner, cursor: Cursor = None, limit: Limit = 50) -> ModelPage:
    """List models, newest first."""
    with service.database.read() as session:
        uploaded = select(ModelRow).where(ModelRow.made_by.is_(None))
        rows, next_cursor = read_page(session, ModelRow, owner, cursor, limit, uploaded)
        return ModelPage(items=[describe_model(row) for row in rows], next_cursor=next_cursor)


@router.get("/{model_id}", operation_id="get_model", responses=problems(404))
def get_model(service: Parts, owner: Owner, model_id: ModelId) -> ModelView:
    """Show one model with what its check found: signature, layers, and which technique applies to which of them."""
    with service.database.read() as session:
        return describe_model(get_upload(session, ModelRow, owner, model_id))


@router.delete("/{model_id}", operation_id="delete_model", status_code=204, responses=problems(404, 409))
def delete_model(service: Parts, owner: Owner, model_id: ModelId) -> None:
    """Delete a model that no unfinished job uses. Finished jobs and their artifacts stay."""
    with service.database.session() as session:
        delete_upload(session, ModelRow, owner, model_id)


def check_architecture(format: UploadFormat, architecture: str | None) -> None:
    """Raise InvalidRequest unless a state dict, and only a state dict, names a program that the catalogue has."""
    if architecture is None:
        if format == "safetensors":
            _refuse_architecture("format=safetensors needs an architecture: the program that uses the weights")
        return
    if format != "safetensors":
        _refuse_architecture(f"a file of format={format} brings its own program; leave architecture out")
    try:
        parse_architecture(architecture)
    except UnknownArchitecture as error:
        _refuse_architecture(str(error))


def _refuse_architecture(detail: str) -> NoReturn:
    raise InvalidRequest([Problem("query:architecture", f"{detail}; see GET /v1/architectures")])


def describe_model(row: ModelRow) -> ModelView:
    """Return what the user sees of a row."""
    return ModelView.model_validate(
        {
            "id": row.id,
            "name": row.name,
            "format": row.format,
            "architecture": row.architecture,
            "state": row.state,
            "size_bytes": row.size_bytes,
            "sha256": row.sha256,
            "created_at": row.created_at,
            "facts": row.facts,
            "error": row.error,
            "links": {"self": f"/v1/models/{row.id}"},
        }
    )
