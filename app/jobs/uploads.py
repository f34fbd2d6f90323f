"""Models and datasets as the user sees them: add what was uploaded, look, delete."""

from typing import Any, TypeVar

from sqlalchemy import delete, false, or_, select, update
from sqlalchemy.orm import InstrumentedAttribute, Session

from app.db.clock import db_now
from app.db.tables import DatasetRow, JobRow, ModelRow
from app.errors import Conflict, NotFound
from app.ids import new_id
from app.jobs.checks import CHECKING, queue_check
from app.jobs.lifecycle import CHECKS, TERMINAL
from app.jobs.quotas import require_stored_fits
from app.jobs.teachers import learns_from
from app.settings import Settings
from app.storage.base import Blob

Upload = TypeVar("Upload", ModelRow, DatasetRow)


def add_model(
    session: Session,
    settings: Settings,
    *,
    owner: str,
    name: str,
    format: str,
    blob: Blob,
    architecture: str | None = None,
) -> ModelRow:
    """Write down an uploaded model and queue its check; raises QuotaExceeded where the owner may not store it."""
    model = ModelRow(id=new_id("mdl"), architecture=architecture, **_describe(owner, name, format, blob))
    session.add(model)
    session.flush()
    require_stored_fits(session, settings, owner)
    queue_check(session, settings, owner=owner, model_id=model.id)
    session.refresh(model)
    return model


def make_model(session: Session, *, owner: str, name: str, blob: Blob, made_by: str) -> str:
    """Write down a .pt2 that a part of the job `made_by` left for the next; the caller queues its check."""
    model = ModelRow(id=new_id("mdl"), made_by=made_by, **_describe(owner, name, "pt2", blob))
    session.add(model)
    session.flush()
    return model.id


def add_dataset(session: Session, settings: Settings, *, owner: str, name: str, format: str, blob: Blob) -> DatasetRow:
    """Write down an uploaded dataset and queue its check; raises QuotaExceeded where the owner may not store it."""
    dataset = DatasetRow(id=new_id("dst"), **_describe(owner, name, format, blob))
    session.add(dataset)
    session.flush()
    require_stored_fits(session, settings, owner)
    queue_check(session, settings, owner=owner, dataset_id=dataset.id)
    session.refresh(dataset)
    return dataset


def get_upload(
    session: Session, table: type[Upload], owner: str, upload_id: str, *, for_update: bool = False
) -> Upload:
    """Return a model or a dataset of this owner. `for_update` locks it until the transaction ends."""
    query = select(table).where(table.id == upload_id, table.owner == owner)
    upload = session.scalars(query.with_for_update() if for_update else query).one_or_none()
    if upload is None:
        raise NotFound(f"there is no {_noun(table)} {upload_id}")
    return upload


def delete_upload(session: Session, table: type[Upload], owner: str, upload_id: str) -> None:
    """Delete a model or dataset that no unfinished job uses; finished jobs keep everything but the reference."""
    # The lock keeps out jobs that are being submitted: they lock what they refer to as well.
    upload = get_upload(session, table, owner, upload_id, for_update=True)
    made_by = getattr(upload, "made_by", None)
    if made_by is not None:
        raise Conflict(
            f"model {upload_id} was made by job {made_by} and goes with it",
            code="model_in_use",
            fix=f"Delete job {made_by}.",
        )
    columns = _references(table)
    uses = or_(*(column == upload_id for column in columns))
    learns = learns_from(upload_id) if table is ModelRow else false()
    user = session.scalar(select(JobRow).where(or_(uses, learns), JobRow.state.not_in(TERMINAL)).limit(1))
    if user is not None:
        noun = _noun(table)
        what = f"job {user.id} is {user.state} and uses it" if user.action not in CHECKS else "it is being checked"
        raise Conflict(
            f"{noun} {upload_id} cannot be deleted: {what}",
            code=f"{noun}_in_use",
            fix="Wait until the check is done." if user.action in CHECKS else "Cancel the job, or wait for its end.",
        )
    untracked = {"synchronize_session": False}
    session.execute(delete(JobRow).where(uses, JobRow.action.in_(CHECKS)).execution_options(**untracked))
    for column in columns:
        session.execute(update(JobRow).where(column == upload_id).values({column: None}).execution_options(**untracked))
    session.execute(delete(table).where(table.id == upload_id).execution_options(**untracked))


def _describe(owner: str, name: str, format: str, blob: Blob) -> dict[str, Any]:
    return {
        "owner": owner,
        "name": name,
        "format": format,
        "state": CHECKING,
        "size_bytes": blob.size_bytes,
        "sha256": blob.sha256,
        "created_at": db_now(),
    }


def _references(table: type[ModelRow] | type[DatasetRow]) -> list[InstrumentedAttribute[str | None]]:
    return [JobRow.model_id] if table is ModelRow else [JobRow.dataset_id, JobRow.evaluation_dataset_id]


def _noun(table: type[ModelRow] | type[DatasetRow]) -> str:
    return "model" if table is ModelRow else "dataset"
