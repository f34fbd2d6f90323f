"""Wake-up hints on their way to the queue. A hint may be lost or sent twice: the database alone says what is to do."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import bindparam, delete, exists, func, or_, select, update
from sqlalchemy.orm import Session

from app.db.clock import db_now
from app.db.session import Database
from app.db.tables import Base, JobRow, OutboxRow
from app.db.together import NewRow, insert_row
from app.jobs.lifecycle import State
from app.recipes.needs import DeviceKind

MAX_HINTS = 100
"""Of one round."""
_MAX_PUBLISH_SECONDS = 5.0
"""Of one round: the database does not wait longer for a slow broker, in a transaction that is open."""


@dataclass(frozen=True)
class Hint:
    """One message to publish: a worker shall look at the queue. The job is the one that it was sent for."""

    outbox_id: int
    job_id: str
    action: str
    priority: int
    device: DeviceKind
    """The kind of worker to wake."""
    owner: str
    """The job's."""
    request_id: str | None
    """The request that submitted the job."""
    traceparent: str | None
    """The span of that request."""


_JOBS, _OUTBOX = (Base.metadata.tables[name] for name in ("jobs", "outbox"))
_TAKE = (
    select(
        _OUTBOX.c.id,
        _OUTBOX.c.job_id,
        *(_JOBS.c[name] for name in ("action", "priority", "needs_device", "owner", "request_id", "traceparent")),
    )
    .join(_JOBS, _JOBS.c.id == _OUTBOX.c.job_id)
    .order_by(_JOBS.c.priority.desc(), _OUTBOX.c.id)
    .limit(bindparam("limit"))
    .with_for_update(of=_OUTBOX, skip_locked=True)
)
_REMOVE = delete(_OUTBOX).where(_OUTBOX.c.id.in_(bindparam("sent", expanding=True)))
_NOTE_SENT = (
    update(_JOBS)
    .where(_JOBS.c.id.in_(bindparam("job_ids", expanding=True)), _JOBS.c.state == State.QUEUED)
    .values(published_at=db_now())
)
"""Made once, and past the ORM: the dispatcher asks them several times a second."""


def make_hint(job_id: str) -> NewRow:
    """Return the row of a hint."""
    return NewRow(_OUTBOX, {"job_id": job_id})


def enqueue(session: Session, job_id: str) -> None:
    """Write a hint in the transaction that makes the job wait; the caller sets `published_at`."""
    insert_row(session, make_hint(job_id))


def take_outbox(session: Session, limit: int = MAX_HINTS) -> list[Hint]:
    """Return the oldest hints. On PostgreSQL other relays pass over them until the transaction ends."""
    return [Hint(*row) for row in session.execute(_TAKE, {"limit": limit})]


def mark_sent(session: Session, hints: list[Hint]) -> None:
    """Remove hints that were published, and note when."""
    session.execute(_REMOVE, {"sent": [hint.outbox_id for hint in hints]})
    session.execute(_NOTE_SENT, {"job_ids": [hint.job_id for hint in hints]})


def relay_outbox(database: Database, publish: Callable[[Hint], None], limit: int = MAX_HINTS) -> int:
    """Publish waiting hints; return how many. When `publish` raises, the hints not yet sent stay."""
    if database.dialect == "postgresql":
        with database.session() as session:
            hints = take_outbox(session, limit)
            sent, failure = _publish(hints, publish)
            mark_sent(session, sent)
    else:
        # SQLite has one writer at a time: a slow broker must not hold it. Two relays may send a hint twice; no harm.
        with database.read() as session:
            hints = take_outbox(session, limit)
        sent, failure = _publish(hints, publish)
        if sent:
            with database.session() as session:
                mark_sent(session, sent)
    if failure is not None:
        raise failure
    return len(sent)


def count_waiting(session: Session, device: DeviceKind) -> int:
    """Return how many jobs wait for a worker of a device kind."""
    waiting = (JobRow.state == State.QUEUED, JobRow.needs_device == device)
    return session.scalar(select(func.count()).where(*waiting)) or 0


def sweep_unpublished(session: Session, device: DeviceKind, older_than_seconds: float, limit: int = 100) -> list[str]:
    """Write new hints for jobs of a kind that still wait long after their last one; return the ids of the jobs."""
    pending = exists().where(OutboxRow.job_id == JobRow.id)
    query = (
        select(JobRow.id)
        .where(JobRow.state == State.QUEUED, JobRow.needs_device == device, ~pending)
        .where(or_(JobRow.published_at.is_(None), JobRow.published_at < db_now(-older_than_seconds)))
        .order_by(JobRow.published_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    job_ids = list(session.scalars(query))
    if job_ids:
        session.execute(
            update(JobRow)
            .where(JobRow.id.in_(job_ids))
            .values(published_at=db_now())
            .execution_options(synchronize_session=False)
        )
        for job_id in job_ids:
            enqueue(session, job_id)
    return job_ids


def _publish(hints: list[Hint], publish: Callable[[Hint], None]) -> tuple[list[Hint], Exception | None]:
    sent: list[Hint] = []
    end = time.monotonic() + _MAX_PUBLISH_SECONDS
    for hint in hints:
        if time.monotonic() > end:
            break
        try:
            publish(hint)
        except Exception as failure:
            return sent, failure
        sent.append(hint)
    return sent, None
