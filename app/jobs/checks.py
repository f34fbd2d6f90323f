"""The check of an upload is a job too: it is claimed, leased and reaped like any other, and it settles the upload."""

from collections.abc import Callable
from typing import Any

from sqlalchemy import update
from sqlalchemy.orm import Session, make_transient_to_detached

from app.db.tables import Base, DatasetRow, JobRow, ModelRow
from app.db.together import NewRow, insert_together
from app.ids import new_id
from app.jobs.claim import NO_PROGRESS
from app.jobs.lifecycle import CHECK_PRIORITY, MADE_OF_PARTS, State, describe_state, make_event
from app.jobs.needs import JobNeeds, derive_needs
from app.jobs.outbox import make_hint
from app.jobs.workers import list_workers, require_isolation
from app.logs import current_request_id
from app.recipes.plan import EngineError
from app.settings import Settings
from app.tracing import current_traceparent

CHECKING = "checking"
READY = "ready"
REJECTED = "rejected"
Record = Callable[[str], NewRow]
"""Makes the row that says who submitted the job with this id."""
_TABLE = Base.metadata.tables["jobs"]
_EMPTY = dict.fromkeys(_TABLE.c.keys())


def queue_check(
    session: Session, settings: Settings, *, owner: str, model_id: str | None = None, dataset_id: str | None = None
) -> JobRow:
    """Queue the check of one upload, in the transaction that inserts it."""
    assert (model_id is None) != (dataset_id is None), "a check is of a model or of a dataset"
    require_isolation(list_workers(session, settings.worker_seen_seconds))
    return queue_job(
        session,
        owner=owner,
        action="check_model" if model_id else "check_dataset",
        model_id=model_id,
        dataset_id=dataset_id,
        deadline_seconds=settings.check_deadline_seconds,
        max_attempts=settings.max_attempts,
        priority=CHECK_PRIORITY,
    )


def queue_job(
    session: Session,
    *,
    owner: str,
    action: str,
    deadline_seconds: int,
    max_attempts: int,
    model_id: str | None = None,
    dataset_id: str | None = None,
    evaluation_dataset_id: str | None = None,
    recipe: dict[str, Any] | None = None,
    labels: dict[str, str] | None = None,
    priority: int = 0,
    needs: JobNeeds | None = None,
    parent_id: str | None = None,
    part: str | None = None,
    webhook_id: str | None = None,
    request_id: str | None = None,
    traceparent: str | None = None,
    record: Record | None = None,
) -> JobRow:
    """Insert a waiting job with its first event and, where a worker is to take it, its hint.

    `record` makes a row more that is written with them.

    Without `needs` any CPU worker will do; without `request_id` and `traceparent` they
    are those of the request being answered.
    """
    needs = needs or derive_needs(None)
    row: dict[str, Any] = {
        "id": new_id("job"),
        "owner": owner,
        "action": action,
        "parent_id": parent_id,
        "part": part,
        "webhook_id": webhook_id,
        "request_id": request_id or current_request_id(),
        "traceparent": traceparent or current_traceparent(),
        "model_id": model_id,
        "dataset_id": dataset_id,
        "evaluation_dataset_id": evaluation_dataset_id,
        "recipe": recipe,
        "labels": labels or {},
        "priority": priority,
        "deadline_seconds": deadline_seconds,
        "needs_device": needs.device,
        "needs_num_devices": needs.num_devices,
        "needs_memory_bytes": needs.memory_bytes,
        "needs_num_threads": needs.num_threads,
        "state": State.QUEUED.value,
        "attempt": 0,
        "max_attempts": max_attempts,
        "epoch": 0,
        "progress": NO_PROGRESS,
        "isolation": [],
        "last_seq": 1,
    }
    rows = [NewRow(_TABLE, row), make_event(row["id"], 1, "state", describe_state(State.QUEUED, 0, None))]
    if action not in MADE_OF_PARTS:
        rows.append(make_hint(row["id"]))
    if record is not None:
        rows.append(record(row["id"]))
    now = insert_together(session, rows)
    # What was written is known, and need not be read.
    job = JobRow(**_EMPTY | row | {"created_at": now, "published_at": now})
    make_transient_to_detached(job)
    session.add(job)
    return job


def accept_upload(session: Session, job: JobRow, facts: dict[str, Any]) -> None:
    """Make the upload of a succeeded check ready."""
    _settle(session, job, {"state": READY, "facts": facts, "error": None})


def reject_upload(session: Session, job: JobRow, error: EngineError) -> None:
    """Reject the upload of a failed check."""
    _settle(session, job, {"state": REJECTED, "error": error.model_dump(mode="json")})


def check_again(session: Session, model_id: str) -> None:
    """Let a model whose check is tried again wait for its verdict."""
    session.execute(
        update(ModelRow)
        .where(ModelRow.id == model_id)
        .values(state=CHECKING, error=None)
        .execution_options(synchronize_session=False)
    )


def _settle(session: Session, job: JobRow, values: dict[str, Any]) -> None:
    table: type[ModelRow] | type[DatasetRow] = ModelRow if job.action == "check_model" else DatasetRow
    upload_id = job.model_id or job.dataset_id
    session.execute(
        update(table)
        .where(table.id == upload_id, table.state == CHECKING)
        .values(**values)
        .execution_options(synchronize_session=False)
    )
