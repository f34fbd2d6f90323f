"""Keys in the database, on both kinds of it: made, recognized, rotated, revoked."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from app.access.__main__ import main
from app.access.keys import (
    Caller,
    Scope,
    authenticate,
    create_key,
    get_key,
    has_admin,
    is_live,
    note_use,
    revoke_key,
    rotate_key,
)
from app.access.tokens import parse_token
from app.db.access_tables import KeyRow
from app.db.clock import db_now
from app.db.session import Database
from app.errors import Conflict, NotAuthenticated, NotFound


def make(database: Database, scopes: tuple[Scope, ...] = ("read",), **changes: Any) -> tuple[str, str]:
    """Return a key's id and text."""
    with database.session() as session:
        row, token = create_key(session, environment="live", owner="ann", name="n", scopes=scopes, **changes)
        return row.id, token


def recognize(database: Database, token: str) -> Caller:
    with database.read() as session:
        return authenticate(session, parse_token(token, "live"))[0]


def rotate(database: Database, key_id: str, grace_seconds: float) -> tuple[str, str]:
    with database.session() as session:
        row, token = rotate_key(session, environment="live", key_id=key_id, grace_seconds=grace_seconds)
        return row.id, token


@contextmanager
def changed(database: Database, key_id: str) -> Iterator[tuple[Session, KeyRow]]:
    with database.session() as session:
        yield session, session.get_one(KeyRow, key_id)


def test_a_key_opens_what_belongs_to_its_owner(database: Database) -> None:
    key_id, token = make(database, ("write", "read"))
    assert recognize(database, token) == Caller("ann", frozenset({"read", "write"}), key_id)


def test_the_secret_is_nowhere_in_the_database(database: Database) -> None:
    _, token = make(database)
    secret = parse_token(token, "live").secret
    with database.read() as session:
        dump = str(session.execute(text("SELECT * FROM api_keys")).all())
    assert secret not in dump
    assert token not in dump


def test_another_secret_and_an_unknown_id_sound_the_same(database: Database) -> None:
    (_, mine), (_, other) = make(database), make(database)
    forged = parse_token(mine, "live").__class__(
        "live", parse_token(mine, "live").key_id, parse_token(other, "live").secret
    )
    unknown = forged.__class__("live", "key_" + "z" * 26, forged.secret)
    messages = set()
    for token in (forged, unknown):
        with pytest.raises(NotAuthenticated) as refused:
            recognize(database, token.render())
        messages.add(refused.value.detail)
    assert len(messages) == 1


def test_a_key_ends_when_it_expires_and_when_it_is_revoked(database: Database) -> None:
    short, revoked = make(database, expires_in_seconds=100), make(database)
    recognize(database, short[1])
    with changed(database, short[0]) as (_, row):
        row.expires_at = db_now(-0.001)
    with database.session() as session:
        revoke_key(session, revoked[0])
        revoke_key(session, revoked[0])
    with pytest.raises(NotAuthenticated, match="has expired"):
        recognize(database, short[1])
    with pytest.raises(NotAuthenticated, match="was revoked"):
        recognize(database, revoked[1])
    with database.read() as session:
        assert not is_live(session, short[0])
        assert not is_live(session, revoked[0])
        with pytest.raises(NotFound):
            get_key(session, "key_" + "0" * 26)


def test_rotation_leaves_both_for_the_time_of_grace(database: Database) -> None:
    key_id, old = make(database, ("read", "admin"))
    new_id, new = rotate(database, key_id, 60)
    assert recognize(database, old).key_id == key_id
    assert recognize(database, new) == Caller("ann", frozenset({"read", "admin"}), new_id)
    with changed(database, key_id) as (_, row):
        assert row.replaced_by == new_id
        assert row.expires_at is not None
        row.expires_at = db_now(-1)
    with pytest.raises(NotAuthenticated, match="has expired"):
        recognize(database, old)
    recognize(database, new)
    with pytest.raises(Conflict, match="was replaced by"):
        rotate(database, key_id, 60)


def test_rotation_without_grace_ends_the_old_key_now(database: Database) -> None:
    key_id, old = make(database)
    _, new = rotate(database, key_id, 0)
    with pytest.raises(NotAuthenticated):
        recognize(database, old)
    recognize(database, new)


def test_rotation_never_lengthens_a_life(database: Database) -> None:
    key_id, _ = make(database, expires_in_seconds=10)
    with changed(database, key_id) as (_, row):
        before = row.expires_at
    new_id, _ = rotate(database, key_id, 1000)
    with changed(database, key_id) as (session, row):
        assert row.expires_at == before
        new = session.get_one(KeyRow, new_id)
        assert new.expires_at is not None
        assert 9 < (new.expires_at - new.created_at).total_seconds() < 11  # as long as the old one was to live


def test_a_key_that_ended_cannot_be_rotated(database: Database) -> None:
    key_id, _ = make(database)
    with database.session() as session:
        revoke_key(session, key_id)
    with pytest.raises(Conflict, match="not valid any more"):
        rotate(database, key_id, 60)


def test_use_is_written_down_once_a_minute(database: Database) -> None:
    key_id, token = make(database)

    def idle() -> bool:
        with database.read() as session:
            return authenticate(session, parse_token(token, "live"))[1]

    assert idle()
    with database.session() as session:
        note_use(session, key_id)
    with changed(database, key_id) as (_, row):
        first = row.last_used_at
    assert not idle()
    with database.session() as session:
        note_use(session, key_id)
    with changed(database, key_id) as (_, row):
        assert row.last_used_at == first
        row.last_used_at = db_now(-61)
    assert idle()


def test_whether_somebody_can_make_keys(database: Database) -> None:
    def any_admin() -> bool:
        with database.read() as session:
            return has_admin(session)

    make(database, ("read", "write"))
    assert not any_admin()
    key_id, _ = make(database, ("admin",))
    assert any_admin()
    with database.session() as session:
        revoke_key(session, key_id)
    assert not any_admin()


def test_the_command_works_on_the_services_database(
    database: Database, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PARE_DATABASE_URL", database.url)
    assert (
        main(["create", "--owner", "ops", "--scopes", "read,admin", "--name", "first", "--expires-in-days", "2"]) == 0
    )
    printed = capsys.readouterr()
    token = printed.out.strip()
    caller = recognize(database, token)
    assert caller.owner == "ops"
    assert caller.scopes == {"read", "admin"}
    assert token not in printed.err
    key_id = str(caller.key_id)

    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    assert key_id in listed
    assert parse_token(token, "live").secret not in listed

    assert main(["rotate", key_id, "--grace-seconds", "0"]) == 0
    fresh = capsys.readouterr().out.strip()
    with pytest.raises(NotAuthenticated):
        recognize(database, token)
    assert main(["revoke", str(recognize(database, fresh).key_id)]) == 0
    with pytest.raises(NotAuthenticated):
        recognize(database, fresh)

    assert main(["revoke", "key_" + "0" * 26]) == 1
    assert "there is no key" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [["--owner", "A B"], ["--owner", "a", "--scopes", "all"], []])
def test_the_command_explains_what_is_wrong(wrong: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "app.access", "create", *wrong], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 2
    assert "error" in done.stderr
    assert done.stdout == ""
