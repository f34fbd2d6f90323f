"""Workers that are idle although a job waits that they can run: its hint got lost, or went to one that cannot."""

from collections.abc import Mapping, Sequence

from sqlalchemy import and_, func, or_, select
from sqlalchemy.orm import Session

from app.db.clock import db_now
from app.db.tables import JobRow, OutboxRow, WorkerRow
from app.jobs.lifecycle import CHECKS
from app.jobs.needs import Capacity, capacity_of
from app.jobs.order import can_run, find_saturated
from app.jobs.outbox import enqueue
from app.jobs.workers import accepts_jobs, count_running, find_disk_problem
from app.recipes.needs import DEVICE_KINDS, DeviceKind


def wake_workers(
    session: Session,
    workers: Sequence[WorkerRow],
    num_hints: Mapping[DeviceKind, int],
    older_than_seconds: float,
    max_running: int | None = None,
) -> list[str]:
    """Write one hint for each idle worker of a kind where one of them can run a job; return the jobs they are for.

    A hint goes to whichever worker of the kind is next in line, which may not be the one that can run the job: hence
    one for each. `num_hints` are in the broker already, and count. Jobs whose last hint is younger are left alone, and
    those of owners of whom as many run as may (`max_running`, or their own limit).
    """
    running = count_running(session)
    able = [worker for worker in workers if accepts_jobs(worker) and find_disk_problem(worker) is None]
    idle = [capacity_of(worker) for worker in able if not running[worker.id]]
    saturated = find_saturated(session, max_running)
    woken = []
    for kind in DEVICE_KINDS:
        takers = [capacity for capacity in idle if kind in capacity.accepts]
        missing = len(takers) - num_hints[kind] - _count_unsent(session, kind)
        job_id = _find_waiting(session, takers, kind, older_than_seconds, saturated) if missing > 0 else None
        if job_id is not None:
            for _ in range(missing):
                enqueue(session, job_id)
            woken.append(job_id)
    return woken


def _count_unsent(session: Session, kind: DeviceKind) -> int:
    query = select(func.count()).select_from(OutboxRow).join(JobRow, JobRow.id == OutboxRow.job_id)
    return session.scalar(query.where(JobRow.needs_device == kind)) or 0


def _find_waiting(
    session: Session,
    takers: Sequence[Capacity],
    kind: DeviceKind,
    older_than_seconds: float,
    saturated: Sequence[str],
) -> str | None:
    runnable = or_(*(and_(*can_run(capacity, kind)) for capacity in set(takers)))
    sent = JobRow.published_at < db_now(-older_than_seconds)
    may_run = or_(JobRow.owner.not_in(saturated), JobRow.action.in_(CHECKS))
    return session.scalar(select(JobRow.id).where(runnable, sent, may_run).order_by(JobRow.priority.desc()).limit(1))
