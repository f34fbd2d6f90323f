"""The dispatchers that are there, and whether they reach the broker: what health says of the way from job to worker."""

from dataclasses import dataclass

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from app.db.clock import db_now
from app.db.tables import DispatcherRow


@dataclass(frozen=True)
class Dispatch:
    """How the way from the database to the workers stands."""

    num_dispatchers: int
    """Seen lately."""
    num_reaching_broker: int
    """Of those, how many got an answer from the broker lately."""


def touch_dispatcher(session: Session, dispatcher_id: str, *, broker_answers: bool) -> None:
    """Note that a dispatcher is alive, and whether the broker is for it."""
    row = session.get(DispatcherRow, dispatcher_id)
    if row is None:
        row = DispatcherRow(id=dispatcher_id, started_at=db_now())
        session.add(row)
    row.seen_at = db_now()
    if broker_answers:
        row.broker_seen_at = db_now()
    session.flush()


def read_dispatch(session: Session, seen_within_seconds: float) -> Dispatch:
    """Count the dispatchers that are alive, and those among them that reach the broker."""
    since = db_now(-seen_within_seconds)
    alive = DispatcherRow.seen_at > since
    reaching = func.count().filter(DispatcherRow.broker_seen_at > since)
    row = session.execute(select(func.count(), reaching).where(alive)).one()
    return Dispatch(*row)


def remove_dispatcher(session: Session, dispatcher_id: str) -> None:
    """Forget a dispatcher that stops."""
    session.execute(delete(DispatcherRow).where(DispatcherRow.id == dispatcher_id))


def forget_dispatchers(session: Session, not_seen_seconds: float) -> None:
    """Forget dispatchers that went away without a word."""
    session.execute(delete(DispatcherRow).where(DispatcherRow.seen_at < db_now(-not_seen_seconds)))
