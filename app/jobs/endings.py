"""The ways a job leaves a worker without success; shared by those who finish attempts and by the reaper."""

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import ColumnElement, null
from sqlalchemy.orm import Session

from app.db.clock import db_now
from app.db.tables import JobRow
from app.jobs.checks import reject_upload
from app.jobs.claim import NO_PROGRESS
from app.jobs.lifecycle import CHECKS, State, move
from app.jobs.outbox import enqueue
from app.recipes.plan import EngineError

Conditions = Iterable[ColumnElement[bool]]

ENDED: dict[str, Any] = {"lease_until": null(), "finished_at": db_now()}
"""What every end of a job sets."""
WAITING: dict[str, Any] = {
    "lease_until": null(),
    "worker_id": null(),
    "published_at": db_now(),
    "stage": null(),
    "progress": NO_PROGRESS,
    "waiting_reason": null(),
}
"""What every return to the queue sets; the caller writes the hint."""


def requeue(
    session: Session,
    job_id: str,
    *,
    reason: str,
    only_if: Conditions,
    detail: str | None = None,
    values: dict[str, Any] | None = None,
) -> JobRow | None:
    """Return a running job to the queue, with a hint."""
    job = move(
        session,
        job_id,
        sources=[State.RUNNING],
        target=State.QUEUED,
        reason=reason,
        detail=detail,
        only_if=only_if,
        values=WAITING | (values or {}),
    )
    if job is not None:
        enqueue(session, job_id)
    return job


def end_failed(
    session: Session, job_id: str, error: EngineError, *, only_if: Conditions, isolation: Sequence[str] | None = None
) -> JobRow | None:
    """Fail a running job; the upload that a failed check was for is rejected."""
    values: dict[str, Any] = ENDED | {"error": error.model_dump(mode="json")}
    if isolation is not None:
        values["isolation"] = list(isolation)
    job = move(
        session,
        job_id,
        sources=[State.RUNNING],
        target=State.FAILED,
        reason=error.code,
        detail=error.detail,
        only_if=only_if,
        values=values,
    )
    if job is not None and job.action in CHECKS:
        reject_upload(session, job, error)
    return job


def end_cancelled(session: Session, job_id: str, *, only_if: Conditions) -> JobRow | None:
    """End a job that is being cancelled, its processes being gone."""
    return move(session, job_id, sources=[State.CANCELLING], target=State.CANCELLED, only_if=only_if, values=ENDED)
