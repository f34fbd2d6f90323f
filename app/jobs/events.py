"""What happened to a job, in order. Numbers come from the job's row, so they have no gaps and no twins."""

from typing import Any

from sqlalchemy import ColumnElement, bindparam, select, update
from sqlalchemy.orm import Session

from app.db.tables import EventRow, JobRow
from app.errors import NotFound
from app.jobs.lifecycle import write_event


def append_event(session: Session, job_id: str, kind: str, data: dict[str, Any]) -> int:
    """Append an event and return its number."""
    job = change_with_event(session, job_id, kind, data)
    if job is None:
        raise NotFound(f"there is no job {job_id}")
    return job.last_seq


def change_with_event(
    session: Session,
    job_id: str,
    kind: str,
    data: dict[str, Any],
    *,
    only_if: tuple[ColumnElement[bool], ...] = (),
    values: dict[str, Any] | None = None,
) -> JobRow | None:
    """Change columns other than the state and append an event; return None where a condition does not hold."""
    assert "state" not in (values or {}), "the state moves through lifecycle.move only"
    job = session.scalar(
        update(JobRow)
        .where(JobRow.id == job_id, *only_if)
        .values(last_seq=JobRow.last_seq + 1, **(values or {}))
        .returning(JobRow)
        .execution_options(synchronize_session=False, populate_existing=True)
    )
    if job is not None:
        write_event(session, job, kind, data)
    return job


_LIST = (
    select(EventRow)
    .where(EventRow.job_id == bindparam("job_id"), EventRow.seq > bindparam("after"))
    .order_by(EventRow.seq)
    .limit(bindparam("limit"))
)


def list_events(session: Session, job_id: str, after: int = 0, limit: int = 200) -> list[EventRow]:
    """Return the events numbered above `after`, in order."""
    return list(session.scalars(_LIST, {"job_id": job_id, "after": after, "limit": limit}))
