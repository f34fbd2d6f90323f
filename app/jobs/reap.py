"""Jobs whose worker went silent are taken from it: they wait again, or fail when their attempts are used up."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db.clock import db_now
from app.db.tables import JobRow
from app.jobs.endings import end_cancelled, end_failed, requeue
from app.jobs.lifecycle import OWNED, State
from app.recipes.plan import EngineError


def reap_expired(session: Session, limit: int = 100) -> list[str]:
    """Take jobs with expired leases from their workers; return their ids. Safe to run in many places at once."""
    query = (
        select(JobRow)
        .where(JobRow.state.in_(OWNED), JobRow.lease_until < db_now())
        .order_by(JobRow.lease_until)
        .limit(limit)
        .with_for_update(skip_locked=True)
        .execution_options(populate_existing=True)
    )
    expired = list(session.scalars(query))
    for job in expired:
        fence = [JobRow.epoch == job.epoch]
        if job.state == State.CANCELLING:
            end_cancelled(session, job.id, only_if=fence)
        elif job.attempt < job.max_attempts:
            loss = _describe_loss(job)
            requeue(session, job.id, reason=loss.code, detail=loss.detail, only_if=fence)
        else:
            end_failed(session, job.id, _describe_loss(job), only_if=fence)
    return [job.id for job in expired]


def _describe_loss(job: JobRow) -> EngineError:
    return EngineError(
        code="worker_lost",
        detail=f"worker {job.worker_id} went silent in attempt {job.attempt} of {job.max_attempts}",
        fix="See whether the worker's machine is up and has enough memory, then retry the job.",
        retryable=True,
    )
