"""The life of a job: its states and the moves between them. `move` is the only code that changes `jobs.state`.

queued -> running -> succeeded | failed
running -> queued                     lease expired or retryable failure, attempts left
queued -> cancelled                   cancelled before it started
running -> cancelling -> cancelled    cancelled while it ran; wins over a retry
failed | cancelled -> queued          the user asks for another try

A job made of parts is never seen waiting: it runs from its submission on, without a lease.
"""

from collections.abc import Iterable
from enum import StrEnum
from typing import Any

from sqlalchemy import ColumnElement, update
from sqlalchemy.orm import Session

from app.db.tables import Base, JobRow
from app.db.together import NewRow, insert_row
from app.webhooks.announce import announce


class State(StrEnum):
    """Where a job is in its life."""

    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


MOVES: dict[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.RUNNING, State.CANCELLED}),
    State.RUNNING: frozenset({State.SUCCEEDED, State.FAILED, State.QUEUED, State.CANCELLING}),
    State.CANCELLING: frozenset({State.CANCELLED}),
    State.SUCCEEDED: frozenset(),
    State.FAILED: frozenset({State.QUEUED}),
    State.CANCELLED: frozenset({State.QUEUED}),
}
"""The allowed moves."""

TERMINAL = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED})
"""The job is over; nothing but the user's retry moves it."""
CHECKS = frozenset({"check_model", "check_dataset"})
"""The actions that settle an upload; users do not see these jobs."""
CHECK_PRIORITY = 100
"""Theirs; above what a user can ask for: checks are short, and users wait for them."""
MADE_OF_PARTS = frozenset({"distill"})
"""The actions that no worker claims: the dispatcher runs their parts (app/jobs/parents.py)."""
OWNED = frozenset({State.RUNNING, State.CANCELLING})
"""A worker holds the job and must renew its lease."""
_EVENTS = Base.metadata.tables["events"]


def held(epoch: int) -> tuple[ColumnElement[bool], ...]:
    """Return the conditions under which the claim with this epoch still holds its job."""
    return (JobRow.epoch == epoch, JobRow.state.in_(OWNED))


def check_move(source: State, target: State) -> None:
    """Assert that the table allows the move; asking for another is a mistake in Pare."""
    assert target in MOVES[source], f"no move from {source} to {target}"


def move(
    session: Session,
    job_id: str,
    *,
    sources: Iterable[State],
    target: State,
    reason: str | None = None,
    detail: str | None = None,
    only_if: Iterable[ColumnElement[bool]] = (),
    values: dict[str, Any] | None = None,
) -> JobRow | None:
    """Move a job, append its state event, tell webhooks; return the new row, or None where it was in no `sources`.

    One UPDATE does the check, the change and the numbering of the event, so of two movers at once one gets None.
    """
    states = tuple(sources)
    for source in states:
        check_move(source, target)
    job = session.scalar(
        update(JobRow)
        .where(JobRow.id == job_id, JobRow.state.in_(states), *only_if)
        .values(state=target.value, last_seq=JobRow.last_seq + 1, **(values or {}))
        .returning(JobRow)
        .execution_options(synchronize_session=False, populate_existing=True)
    )
    if job is None:
        return None
    worker_id = job.worker_id if target is State.RUNNING else None
    write_event(session, job, "state", describe_state(target, job.attempt, reason, detail=detail, worker_id=worker_id))
    announce(session, job)
    return job


def describe_state(
    state: State, attempt: int, reason: str | None, *, detail: str | None = None, worker_id: str | None = None
) -> dict[str, Any]:
    """Return the data of a state event."""
    said = {"reason": reason, "detail": detail, "worker": worker_id}
    return {"state": state.value, "attempt": attempt} | {name: value for name, value in said.items() if value}


def write_event(session: Session, job: JobRow, kind: str, data: dict[str, Any]) -> None:
    """Write the event that `job.last_seq` was just raised for."""
    insert_row(session, make_event(job.id, job.last_seq, kind, data))


def make_event(job_id: str, seq: int, kind: str, data: dict[str, Any]) -> NewRow:
    """Return the row of an event."""
    return NewRow(_EVENTS, {"job_id": job_id, "seq": seq, "kind": kind, "data": data})
