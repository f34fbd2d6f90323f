"""Requests per minute, counted in the database for all API processes together.

A process takes a block of requests at a time and lets them through without asking again, so the count is never above
the limit, and the database hears of one in twenty requests or fewer. What a process took and did not use is lost with
its minute.
"""

from dataclasses import dataclass

from sqlalchemy import case, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from app.db.access_tables import WindowRow
from app.db.clock import db_now

WINDOW_SECONDS = 60


@dataclass(frozen=True)
class Block:
    """Requests that one process may let through."""

    granted: int
    untaken: int
    """What is left of the window for blocks to come, of whichever process."""
    seconds_left: float
    """Of the window."""


def take_block(session: Session, owner: str, limit: int, size: int) -> Block:
    """Take up to `size` of the `limit` requests of the current minute."""
    now = session.execute(select(db_now())).scalar_one().timestamp()
    window = int(now // WINDOW_SECONDS)
    dialect = postgresql if session.get_bind().dialect.name == "postgresql" else sqlite
    # A process that read the clock just before the minute ended may come after one that read it just after.
    same = WindowRow.window >= window
    statement = (
        dialect.insert(WindowRow)
        .values(owner=owner, window=window, taken=size)
        .on_conflict_do_update(
            index_elements=[WindowRow.owner],
            set_={
                "window": case((same, WindowRow.window), else_=window),
                "taken": case((same, WindowRow.taken + size), else_=size),
            },
        )
        .returning(WindowRow.taken)
    )
    taken = session.execute(statement).scalar_one()
    granted = min(size, max(0, limit - (taken - size)))
    return Block(granted, max(0, limit - taken), WINDOW_SECONDS - now % WINDOW_SECONDS)
