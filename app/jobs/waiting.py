"""Jobs that wait although nothing can come of it: no living worker has what they need. They say so, and why."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import ColumnElement, select
from sqlalchemy.orm import Session

from app.db.session import Database
from app.db.tables import JobRow, WorkerRow
from app.jobs.events import change_with_event
from app.jobs.lifecycle import State
from app.jobs.needs import JobNeeds, capacity_of
from app.jobs.workers import accepts_jobs, find_disk_problem, is_stopping, list_workers

Reason = Literal["no_worker", "no_worker_can_run"]
_NEEDS = (JobRow.needs_device, JobRow.needs_num_devices, JobRow.needs_memory_bytes, JobRow.needs_num_threads)


@dataclass(frozen=True)
class Wait:
    """Why no worker can run a job."""

    reason: Reason
    detail: str
    fix: str


def explain_wait(needs: JobNeeds, workers: Sequence[WorkerRow]) -> Wait | None:
    """Return why none of the living workers can run a job, None where one can (it may be busy)."""
    taking = [worker for worker in workers if accepts_jobs(worker) and not is_stopping(worker)]
    if not taking:
        return Wait(
            reason="no_worker",
            detail="no worker that takes jobs was seen lately; the job waits until one is",
            fix="Start a worker; GET /v1/workers lists those that are there.",
        )
    has = {worker.id: capacity_of(worker) for worker in taking}
    problems = {worker.id: f"takes none now: {problem}" for worker in taking if (problem := find_disk_problem(worker))}
    lacks = {
        worker_id: [*capacity.find_lacks(needs), *([problems[worker_id]] if worker_id in problems else [])]
        for worker_id, capacity in has.items()
    }
    # One of the right kind is closer than any of the other.
    closest = min(lacks, key=lambda name: (needs.device not in has[name].accepts, len(lacks[name]), name))
    if not lacks[closest]:
        return None
    which = f"the only worker, {closest}," if len(taking) == 1 else f"the closest of {len(taking)} workers, {closest},"
    return Wait(
        reason="no_worker_can_run",
        detail=f"the job needs {needs}; {which} {' and '.join(lacks[closest])}",
        fix="Start a worker that has what the job needs; or cancel the job, and submit it with smaller `needs` or with "
        "the smaller parallel plan from which they follow.",
    )


def note_waits(database: Database, seen_within_seconds: float, limit: int = 100) -> list[str]:
    """Write an event for each waiting job that no worker can run any more, or again; return the ids of these jobs."""
    with database.read() as session:
        workers = list_workers(session, seen_within_seconds)
        groups = session.execute(
            select(*_NEEDS, JobRow.waiting_reason).where(JobRow.state == State.QUEUED).distinct()
        ).all()
    changed: list[str] = []
    for device, num_devices, memory_bytes, num_threads, noted in groups:
        wait = explain_wait(JobNeeds(device, num_devices, memory_bytes, num_threads), workers)
        if (wait.reason if wait else None) != noted:
            needed = (device, num_devices, memory_bytes, num_threads)
            alike = [column == value for column, value in zip(_NEEDS, needed, strict=True)]
            alike += [JobRow.waiting_reason.is_not_distinct_from(noted), JobRow.state == State.QUEUED]
            with database.session() as session:
                changed += _note(session, alike, wait, limit - len(changed))
    return changed


def _note(session: Session, alike: list[ColumnElement[bool]], wait: Wait | None, limit: int) -> list[str]:
    reason = wait.reason if wait else None
    data: dict[str, Any] = {"reason": reason}
    if wait is not None:
        data |= {"detail": wait.detail, "fix": wait.fix}
    query = select(JobRow.id).where(*alike).order_by(JobRow.created_at).limit(limit).with_for_update(skip_locked=True)
    job_ids = list(session.scalars(query))
    for job_id in job_ids:
        change_with_event(
            session, job_id, "waiting", data, only_if=(JobRow.state == State.QUEUED,), values={"waiting_reason": reason}
        )
    return job_ids
