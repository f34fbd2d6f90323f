"""The workers that are there, and what each can do."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, delete, select, update
from sqlalchemy.orm import Session

from app.db.clock import db_now
from app.db.tables import JobRow, WorkerRow
from app.errors import IsolationMissing
from app.jobs.lifecycle import OWNED


def register_worker(session: Session, worker_id: str, *, host: str, queue: str, facts: dict[str, Any]) -> WorkerRow:
    """Write down a worker that starts, or that has new facts."""
    row = WorkerRow(id=worker_id, host=host, queue=queue, facts=facts, started_at=db_now(), seen_at=db_now())
    worker = session.merge(row)
    session.flush()
    session.refresh(worker)
    return worker


def change_worker(session: Session, worker_id: str, facts: dict[str, Any]) -> None:
    """Write down new facts of a worker that is there."""
    session.execute(
        update(WorkerRow)
        .where(WorkerRow.id == worker_id)
        .values(facts=facts)
        .execution_options(synchronize_session=False)
    )


def touch_worker(session: Session, worker_id: str) -> bool:
    """Note that the worker is alive; False means it must register again."""
    touched = session.scalar(
        update(WorkerRow)
        .where(WorkerRow.id == worker_id)
        .values(seen_at=db_now())
        .returning(WorkerRow.id)
        .execution_options(synchronize_session=False)
    )
    return touched is not None


def list_workers(session: Session, seen_within_seconds: float) -> list[WorkerRow]:
    """Return the workers seen lately, oldest first."""
    query = select(WorkerRow).where(_seen_after(seen_within_seconds)).order_by(WorkerRow.started_at, WorkerRow.id)
    return list(session.scalars(query))


def accepts_jobs(worker: WorkerRow) -> bool:
    """Return whether the worker takes jobs; one that cannot isolate them does not."""
    return bool(worker.facts.get("accepts_jobs", True))


def is_stopping(worker: WorkerRow) -> bool:
    """Return whether the worker was told to stop: it takes no more jobs, and hands on the one it runs."""
    return bool(worker.facts.get("stopping", False))


def find_disk_problem(worker: WorkerRow) -> str | None:
    """Return why the worker takes no jobs for now: its disk has no space for their files; None where it has."""
    problem: str | None = worker.facts.get("disk_problem")
    return problem


def count_running(session: Session) -> Counter[str]:
    """Return how many jobs each worker is running."""
    owned = session.scalars(select(JobRow.worker_id).where(JobRow.state.in_(OWNED)))
    return Counter(worker_id for worker_id in owned if worker_id is not None)


def require_isolation(workers: Sequence[WorkerRow]) -> None:
    """Raise IsolationMissing where workers are there and all of them refuse; with none there yet, work may wait."""
    if workers and not any(accepts_jobs(worker) for worker in workers):
        raise IsolationMissing


def remove_worker(session: Session, worker_id: str) -> None:
    """Forget a worker that stops."""
    session.execute(delete(WorkerRow).where(WorkerRow.id == worker_id))


def forget_workers(session: Session, not_seen_seconds: float) -> int:
    """Forget workers that went away without a word; return how many."""
    gone = session.scalars(delete(WorkerRow).where(~_seen_after(not_seen_seconds)).returning(WorkerRow.id))
    return len(gone.all())


def _seen_after(seconds: float) -> ColumnElement[bool]:
    return WorkerRow.seen_at > db_now(-seconds)
