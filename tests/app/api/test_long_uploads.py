"""What happens while a file is on its way: its key ends, its room is taken, its process stops."""

import threading
import time
from collections.abc import Callable, Iterator

import httpx2
import pytest
from fastapi import FastAPI

from app.access.keys import revoke_key
from app.access.limits import Limits, set_overrides
from app.api import authenticator, frame
from app.db.session import Database
from app.main import create_app
from app.settings import Settings
from tests.app.api.conftest import serve, wait_until
from tests.app.api.keyed import bearer, create_keyed_app, id_of, make_token
from tests.app.api.test_resumable import CONTENT, SHA256, ask, begin, complete, send

HALF = len(CONTENT) // 2
Between = Callable[[], None]


@pytest.fixture
def keyed(settings: Settings) -> Iterator[tuple[FastAPI, str]]:
    app = create_keyed_app(settings)
    with serve(app) as (url, _):
        yield app, url


def in_two_parts(between: Between) -> Iterator[bytes]:
    yield CONTENT[:HALF]
    between()
    yield CONTENT[HALF:]


def open_client(url: str, token: str = "") -> httpx2.Client:
    headers = bearer(token) if token else {}
    return httpx2.Client(base_url=url, timeout=60, trust_env=False, headers=headers)


def stored_bytes(client: httpx2.Client) -> int:
    return int(client.get("/v1/me").json()["usage"]["stored_bytes"])


@pytest.fixture
def _slow_to_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watch over a key during a request does not come into it."""
    for name in ("app.api.authenticator.RECHECK_SECONDS", "app.api.guard.RECHECK_SECONDS"):
        monkeypatch.setattr(name, 3600.0)
    assert authenticator.RECHECK_SECONDS == 3600


@pytest.mark.usefixtures("_slow_to_notice")
@pytest.mark.parametrize("resumable", [False, True], ids=["plain", "resumable"])
def test_a_key_that_ended_on_the_way_makes_nothing(
    keyed: tuple[FastAPI, str], sqlite_database: Database, resumable: bool
) -> None:
    token, other = make_token(sqlite_database, "ann"), make_token(sqlite_database, "ann")

    def revoke() -> None:
        with sqlite_database.session() as session:
            revoke_key(session, id_of(token))

    with open_client(keyed[1], token) as client, open_client(keyed[1], other) as still_good:
        if resumable:
            url = begin(client)
            assert send(client, url, 0, CONTENT).status_code == 204
            revoke()
            answer = complete(client, url)
        else:
            answer = client.post("/v1/models", content=in_two_parts(revoke))
        assert (answer.status_code, answer.json()["code"]) == (401, "not_authenticated")
        assert still_good.get("/v1/models").json()["items"] == []
        if resumable:  # whoever has a key of the same owner may finish it
            assert complete(still_good, url).status_code == 201
        else:
            assert stored_bytes(still_good) == 0


def test_room_that_was_taken_on_the_way_is_missed_at_the_end(
    keyed: tuple[FastAPI, str], sqlite_database: Database
) -> None:
    token = make_token(sqlite_database, "ann")
    with open_client(keyed[1], token) as client:
        with sqlite_database.session() as session:
            set_overrides(session, "ann", Limits(stored_bytes=len(CONTENT) + 10))

        def take_room() -> None:
            assert client.post("/v1/models", content=b"eleven byte").status_code == 201

        answer = client.post("/v1/models", content=in_two_parts(take_room))
        assert (answer.status_code, answer.json()["violated-policies"]) == (429, ["stored-bytes"])
        assert stored_bytes(client) == 11
        assert len(client.get("/v1/models").json()["items"]) == 1


def test_an_upload_that_ends_in_time_is_finished_by_a_process_that_stops(app: FastAPI) -> None:
    with serve(app) as (url, server), open_client(url) as client:
        answer = client.post("/v1/models", content=in_two_parts(lambda: server.handle_exit(15, None)))
        assert (answer.status_code, answer.json()["sha256"]) == (201, SHA256)
        wait_until(lambda: not server.servers[0].is_serving())


@pytest.mark.parametrize("resumable", [False, True], ids=["plain", "resumable"])
def test_an_endless_upload_is_told_that_the_process_stops(
    settings: Settings, resumable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame, "STOP_SECONDS", 0.3)
    refused, sent = threading.Event(), 0
    with serve(create_app(settings)) as (url, server), open_client(url) as client:

        def trickle() -> Iterator[bytes]:
            nonlocal sent
            while not refused.is_set() and sent < HALF:
                yield CONTENT[sent : sent + 5000]
                sent += 5000
                if sent == 100_000:
                    server.handle_exit(15, None)
                time.sleep(0.05)

        if resumable:
            place = begin(client)
            answer = send(client, place, 0, trickle())  # type: ignore[arg-type]
        else:
            answer = client.post("/v1/models", content=trickle())
        refused.set()
        assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
        assert answer.json()["retryable"] is True
        assert int(answer.headers["retry-after"]) > 0
        assert sent < HALF
    store = settings.data_dir / "store"
    assert list((store / "incoming").iterdir()) == []
    with serve(create_app(settings)) as (url, _), open_client(url) as client:
        assert client.get("/v1/models").json()["items"] == []
        if resumable:
            offset = ask(client, place)
            assert 100_000 <= offset <= sent, "what came until then counts"
            assert send(client, place, offset, CONTENT[offset:]).status_code == 204
            assert complete(client, place).json()["sha256"] == SHA256
