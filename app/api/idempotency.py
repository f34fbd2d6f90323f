"""Idempotency-Key (draft-ietf-httpapi-idempotency-key-header-07): one job for each key, however often it is asked for.

The answer to a request is kept in the transaction that does its work, and given again to a repeat. Failed requests keep
nothing, since they did nothing: the key can be used again once the request is right.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Annotated, Any

from fastapi import Header, Request, Response
from pydantic import BaseModel
from sqlalchemy import BigInteger, ColumnElement, bindparam, delete, func, literal, select, true, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from app.api.recorder import RECORDED, make_done
from app.api.service import Service
from app.api.views import View
from app.db.clock import db_now
from app.db.tables import Base
from app.db.together import insert_row
from app.errors import IdempotencyMismatch, InvalidRequest, Problem, StillRunning
from app.jobs.checks import Record

KEPT_SECONDS = 24 * 3600
MAX_CHARACTERS = 255
_ACCEPTED = 202
_QUOTED = re.compile(r'"((?:[\x20-\x21\x23-\x5b\x5d-\x7e]|\\["\\])*)"')
_BARE = re.compile(r"[\x21\x23-\x2b\x2d-\x7e]+")

_TABLE = Base.metadata.tables["idempotency_keys"]
_NAMES = ("owner", "route", "key")
_MINE = [_TABLE.c[name] == bindparam(f"its_{name}") for name in _NAMES]
_EXPIRED = _TABLE.c.created_at < db_now(-KEPT_SECONDS)
_FIND = select(_TABLE.c.fingerprint, _TABLE.c.status, _TABLE.c.body).where(*_MINE, ~_EXPIRED)
_KEEP = update(_TABLE).where(*_MINE).values(status=bindparam("answered"), body=bindparam("answer"))


def _make_take(dialect: Any, alone: ColumnElement[bool]) -> Any:
    """Return what takes a key that is free, or was used long ago, where nobody else works for it."""
    given = {name: bindparam(f"its_{name}", type_=_TABLE.c[name].type) for name in (*_NAMES, "fingerprint")}
    row: dict[str, Any] = given | {"status": literal(0), "body": literal(""), "created_at": db_now()}
    new = dialect.insert(_TABLE).from_select(list(row), select(*list[Any](row.values())).where(alone))
    changed = {name: new.excluded[name] for name in row if name not in _NAMES}
    return new.on_conflict_do_update(index_elements=_NAMES, set_=changed, where=_EXPIRED).returning(_TABLE.c.key)


_TAKE = {
    "postgresql": _make_take(postgresql, func.pg_try_advisory_xact_lock(bindparam("number", type_=BigInteger))),
    "sqlite": _make_take(sqlite, true()),  # one transaction writes at a time
}

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="Any text of at most 255 characters, quoted or not, new for each new request. Within 24 hours a "
        "repeat with the same key and the same body gets the first answer again and does nothing; the same key with "
        "another body is refused with 422, and while the first request is still being worked on, with 409.",
        examples=['"7c1b3a52-58b4-4a0c-9a6e-3a3d8d2c1f10"'],
    ),
]


REPLAYED: dict[str, Any] = {
    "Idempotency-Replayed": {
        "description": "`true` where this is the answer to an earlier request with the same key.",
        "schema": {"type": "string"},
    }
}
"""For the API description: a header of the answer."""


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


def _canonical(body: BaseModel) -> str:
    """Return the form of a request by which repeats are known, in ASCII: texts may hold what UTF-8 cannot."""
    return json.dumps(body.model_dump(mode="json"), sort_keys=True)


def submit_once(
    service: Service,
    request: Request,
    *,
    owner: str,
    route: str,
    header: str | None,
    body: BaseModel,
    work: Callable[[Session, Record], View],
) -> Response:
    """Make a new thing and answer 202 with its view and place; with a key, once for each key of the owner and route.

    The audit log has it from the same transaction: `work` writes the entry beside the new thing.
    """
    key = parse_key(header) if header is not None else None

    with service.database.session() as session:

        def do() -> tuple[int, str]:
            return _ACCEPTED, work(session, partial(make_done, request.scope, _ACCEPTED)).model_dump_json()

        if key is None:
            answer = Answer(*do(), replayed=False)
        else:
            answer = answer_once(session, owner=owner, route=route, key=key, request=_canonical(body), work=do)
        place = str(json.loads(answer.body)["links"]["self"])
        if answer.replayed:
            insert_row(session, make_done(request.scope, answer.status, place.rpartition("/")[2]))
    request.scope[RECORDED] = True
    headers = {"Location": place}
    if answer.replayed:
        headers["Idempotency-Replayed"] = "true"
    return Response(answer.body, answer.status, headers, media_type="application/json")


def answer_once(
    session: Session, *, owner: str, route: str, key: str, request: str, work: Callable[[], tuple[int, str]]
) -> Answer:
    """Do the work once for each key and return its (status, body); a repeat gets those of the first time.

    `request` is the canonical form of what is asked. Of two at once the second is refused with StillRunning; on SQLite,
    where one transaction writes at a time, it waits instead.
    """
    mine = {"its_owner": owner, "its_route": route, "its_key": key}
    fingerprint = sha256(request.encode()).hexdigest()
    # The lock lasts until the transaction ends; who does not get it takes nothing, and does not wait either.
    number = int.from_bytes(sha256(f"{owner}\0{route}\0{key}".encode()).digest()[:8], "big", signed=True)
    take = _TAKE[session.get_bind().dialect.name]
    if session.scalar(take, mine | {"its_fingerprint": fingerprint, "number": number}) is None:
        kept = session.execute(_FIND, mine).one_or_none()
        if kept is None:
            raise StillRunning
        if kept.fingerprint != fingerprint:
            raise IdempotencyMismatch(f"Idempotency-Key {key!r} was used before with a different request")
        return Answer(kept.status, kept.body, replayed=True)
    status, body = work()
    session.execute(_KEEP, mine | {"answered": status, "answer": body})
    return Answer(status, body, replayed=False)


def forget_expired(session: Session) -> None:
    """Remove the answers that are kept no longer."""
    session.execute(delete(_TABLE).where(_EXPIRED))


def _refuse(detail: str) -> InvalidRequest:
    return InvalidRequest([Problem("header:Idempotency-Key", detail)], code="invalid_idempotency_key")
