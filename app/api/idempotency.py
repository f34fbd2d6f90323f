"""Idempotency-Key: the answer to a request is kept in the transaction that does its work, and given again to a repeat.

Failed requests keep nothing, since they did nothing: the key can be used again once the request is right.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated

from fastapi import Header
from sqlalchemy import delete, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from app.db.clock import db_now
from app.db.tables import IdempotencyRow
from app.errors import IdempotencyMismatch, InvalidRequest, Problem

KEPT_SECONDS = 24 * 3600
MAX_CHARACTERS = 255
_QUOTED = re.compile(r'"((?:[\x20-\x21\x23-\x5b\x5d-\x7e]|\\["\\])*)"')
_BARE = re.compile(r"[\x21\x23-\x2b\x2d-\x7e]+")

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="Any text of at most 255 characters, quoted or not, new for each new request. Within 24 hours a "
        "repeat with the same key and the same body gets the first answer again and does nothing; the same key with "
        "another body is refused with 422.",
        examples=['"7c1b3a52-58b4-4a0c-9a6e-3a3d8d2c1f10"'],
    ),
]


@dataclass(frozen=True)
class Answer:
    """What a request was answered with."""

    status: int
    body: str
    replayed: bool


def parse_key(header: str) -> str:
    """Return the key in a header, which is quoted (RFC 9651 string) or bare."""
    text = header.strip()
    quoted = _QUOTED.fullmatch(text)
    if quoted:
        key = re.sub(r"\\(.)", r"\1", quoted.group(1))
    elif _BARE.fullmatch(text):
        key = text
    else:
        raise _refuse("send printable ASCII, either quoted or without spaces, quotes and commas")
    if not 1 <= len(key) <= MAX_CHARACTERS:
        raise _refuse(f"the key has {len(key)} characters; allowed are 1 to {MAX_CHARACTERS}")
    return key


def answer_once(
    session: Session, *, owner: str, route: str, key: str, request: str, work: Callable[[], tuple[int, str]]
) -> Answer:
    """Do the work once for each key and return its (status, body); a repeat gets those of the first time.

    `request` is the canonical form of what is asked. Of two at once the second waits for the first's transaction.
    """
    mine = (IdempotencyRow.owner == owner, IdempotencyRow.route == route, IdempotencyRow.key == key)
    fingerprint = sha256(request.encode()).hexdigest()
    session.execute(delete(IdempotencyRow).where(*mine, IdempotencyRow.created_at < db_now(-KEPT_SECONDS)))
    dialect = postgresql if session.get_bind().dialect.name == "postgresql" else sqlite
    taken = session.scalar(
        dialect.insert(IdempotencyRow)
        .values(owner=owner, route=route, key=key, fingerprint=fingerprint, status=0, body="", created_at=db_now())
        .on_conflict_do_nothing()
        .returning(IdempotencyRow.key)
    )
    if taken is None:
        kept = session.scalars(select(IdempotencyRow).where(*mine)).one()
        if kept.fingerprint != fingerprint:
            raise IdempotencyMismatch(f"Idempotency-Key {key!r} was used before with a different request")
        return Answer(kept.status, kept.body, replayed=True)
    status, body = work()
    session.execute(update(IdempotencyRow).where(*mine).values(status=status, body=body))
    return Answer(status, body, replayed=False)


def forget_expired(session: Session) -> None:
    """Remove the answers that are kept no longer."""
    session.execute(delete(IdempotencyRow).where(IdempotencyRow.created_at < db_now(-KEPT_SECONDS)))


def _refuse(detail: str) -> InvalidRequest:
    return InvalidRequest([Problem("header:Idempotency-Key", detail)], code="invalid_idempotency_key")
