"""Pages of a list, newest first. A cursor names the last row seen, so rows that come meanwhile shift nothing."""

import base64
import binascii
import hashlib
import json
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Annotated, TypeVar

from fastapi import Query
from pydantic import StringConstraints, TypeAdapter
from sqlalchemy import Select, literal, select, tuple_
from sqlalchemy.orm import Session

from app.db.access_tables import AuditRow, KeyRow
from app.db.tables import DatasetRow, DeliveryRow, JobRow, ModelRow, WebhookRow
from app.db.types import UtcDateTime
from app.errors import InvalidRequest, Problem

Row = TypeVar("Row", ModelRow, DatasetRow, JobRow, KeyRow, WebhookRow, DeliveryRow, AuditRow)

Limit = Annotated[int, Query(ge=1, le=200, description="Items per page.")]
Cursor = Annotated[
    str | None,
    Query(max_length=300, description="`next_cursor` of the page before; leave it out for the newest items."),
]

CHECK_CHARACTERS = 16
_CONTENT = TypeAdapter(tuple[datetime, Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]{1,40}$")]])


def read_page(
    session: Session,
    table: type[Row],
    owner: str | None,
    cursor: str | None,
    limit: int,
    query: Select[Row] | None = None,
) -> tuple[Sequence[Row], str | None]:
    """Return one page of the owner's rows (None: of everybody's) and the cursor of the next, if there is one."""
    selection = query if query is not None else select(table)
    if owner is not None:
        selection = selection.where(table.owner == owner)
    if cursor is not None:
        created_at, last_id = decode_cursor(table.__tablename__, cursor)
        seen = tuple_(literal(created_at, UtcDateTime()), literal(last_id))
        selection = selection.where(tuple_(table.created_at, table.id) < seen)
    selection = selection.order_by(table.created_at.desc(), table.id.desc()).limit(limit + 1)
    rows = session.scalars(selection).all()
    if len(rows) <= limit:
        return rows, None
    last = rows[limit - 1]
    return rows[:limit], encode_cursor(table.__tablename__, last.created_at, last.id)


def encode_cursor(noun: str, created_at: datetime, last_id: str) -> str:
    """Return the cursor that continues after a row."""
    content = json.dumps([created_at.isoformat(), last_id]).encode()
    return base64.urlsafe_b64encode(content).decode().rstrip("=") + "." + _checksum(noun, content)


def decode_cursor(noun: str, cursor: str) -> tuple[datetime, str]:
    """Return the row that a cursor names; raises InvalidRequest for one that this list did not give out."""
    encoded, _, checksum = cursor.partition(".")
    try:
        content = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
        created_at, last_id = _CONTENT.validate_json(content)
    except (binascii.Error, ValueError):
        raise _refuse(noun) from None
    # Not a secret: a forged cursor shows nothing but the owner's own rows. It tells mistakes from cursors.
    if checksum != _checksum(noun, content) or created_at.utcoffset() != timedelta(0):
        raise _refuse(noun)
    return created_at, last_id


def _refuse(noun: str) -> InvalidRequest:
    problem = Problem("query:cursor", f"this is not a cursor that the list of {noun} gave out")
    return InvalidRequest([problem], code="invalid_cursor")


def _checksum(noun: str, content: bytes) -> str:
    return hashlib.sha256(noun.encode() + b"\0" + content).hexdigest()[:CHECK_CHARACTERS]
