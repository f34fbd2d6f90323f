"""The API with keys in force, and callers with keys of their own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI
from starlette.testclient import TestClient

from app.access.keys import SCOPES, Scope, create_key
from app.db.session import Database
from app.main import create_app
from app.settings import Settings


def make_token(database: Database, owner: str, scopes: tuple[Scope, ...] = SCOPES, **changes: Any) -> str:
    """Make a key and return its text."""
    with database.session() as session:
        return create_key(session, environment="live", owner=owner, name=owner, scopes=scopes, **changes)[1]


def bearer(token: str) -> dict[str, str]:
    """Return the header that carries a key."""
    return {"Authorization": f"Bearer {token}"}


def create_keyed_app(settings: Settings, **changes: Any) -> FastAPI:
    """Return an application that asks for keys."""
    return create_app(settings.model_copy(update={"auth": "keys", **changes}))


@contextmanager
def open_client(app: FastAPI, token: str | None = None, **options: Any) -> Iterator[TestClient]:
    """Run the application, with a client that sends this key."""
    with TestClient(app, headers=bearer(token) if token else {}, **options) as client:
        yield client


def id_of(token: str) -> str:
    """Return the id of the key with this text."""
    return f"key_{token.split('_')[2]}"
