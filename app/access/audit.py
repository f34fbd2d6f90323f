"""The record of what was done: who, with which key, what, to what, and how it ended. Rows are added, never changed."""

from typing import Any

from sqlalchemy import delete
from sqlalchemy.orm import Session

from app.db.access_tables import AuditRow
from app.db.clock import db_now
from app.db.tables import Base
from app.db.together import NewRow, insert_row
from app.ids import new_id

SERVICE = "(service)"
"""Stands for the owner where the service's own command acted; no owner can have this name."""
DAY_SECONDS = 24 * 3600.0
MAX_TARGET = 200
_TABLE = Base.metadata.tables["audit"]


def record_action(session: Session, **described: Any) -> None:
    """Write down an action, described as for `make_entry`."""
    insert_row(session, make_entry(**described))


def make_entry(
    *,
    owner: str,
    action: str,
    outcome: str,
    key_id: str | None = None,
    target: str | None = None,
    request_id: str | None = None,
    status: int | None = None,
) -> NewRow:
    """Return the row of an action; `outcome` is done, refused or failed."""
    row = {
        "id": new_id("aud"),
        "owner": owner,
        "key_id": key_id,
        "action": action,
        "target": target[:MAX_TARGET] if target is not None else None,
        "request_id": request_id,
        "status": status,
        "outcome": outcome,
    }
    return NewRow(_TABLE, row)


def forget_actions(session: Session, older_than_days: float) -> None:
    """Remove the record of what was done longer ago."""
    session.execute(delete(AuditRow).where(AuditRow.created_at < db_now(-older_than_days * DAY_SECONDS)))
