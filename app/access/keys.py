"""Keys: made, shown, rotated, revoked, and recognized. Every function works in a transaction that its caller owns."""

import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from sqlalchemy import ColumnElement, func, or_, select, update
from sqlalchemy.orm import Session

from app.access.limits import know_owner
from app.access.tokens import Token, new_token
from app.db.access_tables import KeyRow
from app.db.clock import db_now
from app.errors import Conflict, NotAuthenticated, NotFound
from app.ids import new_id

Scope = Literal["read", "write", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
OWNER_NAME = r"[a-z0-9][a-z0-9_-]{0,39}"
LOCAL_OWNER = "local"
"""Owns everything where nobody is asked for a key."""
MAX_GRACE_SECONDS = 30 * 24 * 3600
USED_SECONDS = 60.0
"""`last_used_at` is written at most this often."""
_NOBODY = "0" * 64


@dataclass(frozen=True)
class Caller:
    """Who sends a request."""

    owner: str
    scopes: frozenset[Scope]
    key_id: str | None = None
    """None where nobody is asked for a key."""


LOCAL_CALLER = Caller(LOCAL_OWNER, frozenset(SCOPES))


def create_key(
    session: Session,
    *,
    environment: str,
    owner: str,
    name: str,
    scopes: Iterable[Scope],
    expires_in_seconds: float | None = None,
) -> tuple[KeyRow, str]:
    """Make a key; return its row and its text, which is nowhere else."""
    know_owner(session, owner)
    token = new_token(environment, new_id("key"))
    row = KeyRow(
        id=token.key_id,
        owner=owner,
        name=name,
        scopes=[scope for scope in SCOPES if scope in set(scopes)],
        secret_sha256=token.digest,
        created_at=db_now(),
        expires_at=db_now(expires_in_seconds) if expires_in_seconds is not None else None,
    )
    session.add(row)
    session.flush()
    session.refresh(row)
    return row, token.render()


def get_key(session: Session, key_id: str, *, for_update: bool = False) -> KeyRow:
    """Return a key of whichever owner, for administrators."""
    query = select(KeyRow).where(KeyRow.id == key_id).execution_options(populate_existing=True)
    row = session.scalar(query.with_for_update() if for_update else query)
    if row is None:
        raise NotFound(f"there is no key {key_id}")
    return row


def rotate_key(
    session: Session, *, environment: str, key_id: str, grace_seconds: float, expires_in_seconds: float | None = None
) -> tuple[KeyRow, str]:
    """Make a key that takes the place of another, which goes on for `grace_seconds` at most; 0 ends it now.

    The new one lives as long as the old one was meant to, unless `expires_in_seconds` says otherwise.
    """
    old = get_key(session, key_id, for_update=True)
    if old.replaced_by is not None:
        raise Conflict(
            f"key {key_id} was replaced by {old.replaced_by}", code="key_replaced", fix=f"Rotate {old.replaced_by}."
        )
    if not is_live(session, key_id):
        raise Conflict(f"key {key_id} is not valid any more", code="key_ended", fix="Make a new key.")
    if expires_in_seconds is None and old.expires_at is not None:
        expires_in_seconds = (old.expires_at - old.created_at).total_seconds()
    row, text = create_key(
        session,
        environment=environment,
        owner=old.owner,
        name=old.name,
        scopes=old.scopes,
        expires_in_seconds=expires_in_seconds,
    )
    earlier = or_(KeyRow.expires_at.is_(None), KeyRow.expires_at > db_now(grace_seconds))
    untracked = {"synchronize_session": False}
    session.execute(update(KeyRow).where(KeyRow.id == key_id).values(replaced_by=row.id).execution_options(**untracked))
    session.execute(
        update(KeyRow)
        .where(KeyRow.id == key_id, earlier)
        .values(expires_at=db_now(grace_seconds))
        .execution_options(**untracked)
    )
    return row, text


def revoke_key(session: Session, key_id: str) -> None:
    """End a key for good; one that was revoked before stays as it is."""
    get_key(session, key_id, for_update=True)
    session.execute(
        update(KeyRow)
        .where(KeyRow.id == key_id)
        .values(revoked_at=func.coalesce(KeyRow.revoked_at, db_now()))
        .execution_options(synchronize_session=False)
    )


def authenticate(session: Session, token: Token) -> tuple[Caller, bool]:
    """Return whose token this is, and whether its use is to be noted; raises NotAuthenticated.

    The digests are compared in a time that does not depend on them, also for a key that does not exist.
    """
    expired = (KeyRow.expires_at <= db_now()).label("expired")
    idle = or_(KeyRow.last_used_at.is_(None), KeyRow.last_used_at < db_now(-USED_SECONDS)).label("idle")
    found = session.execute(select(KeyRow, expired, idle).where(KeyRow.id == token.key_id)).first()
    right = hmac.compare_digest(token.digest, found[0].secret_sha256 if found else _NOBODY)
    if found is None or not right:
        raise NotAuthenticated("no key of this service has this id and secret")
    row = found[0]
    if row.revoked_at is not None or found[1]:
        ending = "was revoked" if row.revoked_at is not None else "has expired"
        raise NotAuthenticated(f"key {row.id} {ending}")
    return Caller(row.owner, frozenset(row.scopes), row.id), bool(found[2])


def is_live(session: Session, key_id: str) -> bool:
    """Return whether a key is there, not revoked and not expired."""
    return session.scalar(select(KeyRow.id).where(KeyRow.id == key_id, *_live())) is not None


def require_live(session: Session, caller: Caller) -> None:
    """Raise NotAuthenticated where the caller's key has ended since its request began."""
    if caller.key_id is not None and not is_live(session, caller.key_id):
        raise NotAuthenticated(f"key {caller.key_id} ended while the request went on")


def has_admin(session: Session) -> bool:
    """Return whether anybody can make keys over HTTP."""
    scopes = session.scalars(select(KeyRow.scopes).where(*_live()))
    return any("admin" in each for each in scopes)


def note_use(session: Session, key_id: str) -> None:
    """Write down that a key was used."""
    session.execute(
        update(KeyRow)
        .where(KeyRow.id == key_id, or_(KeyRow.last_used_at.is_(None), KeyRow.last_used_at < db_now(-USED_SECONDS)))
        .values(last_used_at=db_now())
        .execution_options(synchronize_session=False)
    )


def _live() -> tuple[ColumnElement[bool], ...]:
    return KeyRow.revoked_at.is_(None), or_(KeyRow.expires_at.is_(None), KeyRow.expires_at > db_now())
