"""Fixtures of the API tests: the real application in process, and the same on a real socket."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx2
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from app.__main__ import Server, make_server
from app.api.service import Service
from app.db.session import Database
from app.main import create_app
from app.settings import Settings
from app.storage import Storage
from tests.app.jobs.world import World

LIMIT_BYTES = 3 * 1024 * 1024
"""Of models and datasets in these tests: more than one chunk of storage."""


@pytest.fixture(autouse=True)
def look_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every answer tell of the queue as it is now; tests change it behind the API's back."""
    monkeypatch.setattr("app.api.glances.KEEP_SECONDS", 0.0)
    monkeypatch.setattr("app.api.glances.COST_FACTOR", 0.0)


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"max_model_bytes": LIMIT_BYTES, "max_dataset_bytes": LIMIT_BYTES})


@pytest.fixture
def sqlite_database(sqlite_url: str) -> Iterator[Database]:
    database = Database(sqlite_url)
    yield database
    database.dispose()


@pytest.fixture
def world(sqlite_database: Database, settings: Settings) -> World:
    """What stands in the database of `client` and `live`."""
    return World(sqlite_database, settings)


@pytest.fixture
def app(settings: Settings) -> FastAPI:
    return create_app(settings)


@pytest.fixture
def storage(app: FastAPI) -> Storage:
    service: Service = app.state.service
    return service.storage


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app) as client:
        yield client


@pytest.fixture
def both(database_url: str, settings: Settings) -> Iterator[tuple[TestClient, World]]:
    """A client and its world, on a database of each kind in turn."""
    settings = settings.model_copy(update={"database_url": database_url})
    database = Database(database_url)
    with TestClient(create_app(settings)) as client:
        yield client, World(database, settings)
    database.dispose()


@contextmanager
def serve(app: FastAPI) -> Iterator[tuple[str, Server]]:
    """Run the application on a free port of this machine; yield its URL."""
    server = make_server(app, port=0, timeout_graceful_shutdown=3)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started or not thread.is_alive())
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", server
    finally:
        app.state.service.stopping.set()
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture
def live(app: FastAPI) -> Iterator[httpx2.Client]:
    with serve(app) as (url, _server), httpx2.Client(base_url=url, timeout=60, trust_env=False) as client:
        yield client


def wait_until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for something that happens in another thread or process."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)
