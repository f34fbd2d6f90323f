"""Who gets in: nothing but the public paths without a key, nothing beyond the key's scopes, nothing after its end."""

import re
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from fastapi import FastAPI
from sqlalchemy import event
from starlette.testclient import TestClient

from app.access.keys import revoke_key
from app.access.tokens import new_token
from app.api.guard import PUBLIC_PATHS, required_scope
from app.api.throttle import MAX_BAD_KEYS, PERIOD_SECONDS, BadKeyThrottle
from app.db.session import Database
from app.settings import Settings
from tests.app.api.conftest import serve, wait_until
from tests.app.api.generated import list_operations
from tests.app.api.keyed import bearer, create_keyed_app, id_of, make_token, open_client
from tests.app.jobs.world import World

ENDS_WITHIN_SECONDS = 5.0


@pytest.fixture
def app(settings: Settings) -> FastAPI:
    return create_keyed_app(settings)


def fill_path(path: str) -> str:
    """Return a path with ids that have the right form."""
    prefixes = {
        "model": "mdl",
        "dataset": "dst",
        "artifact": "art",
        "webhook": "whk",
        "delivery": "msg",
        "upload": "upl",
    }
    for name in re.findall(r"\{(\w+)_id\}", path):
        path = path.replace(f"{{{name}_id}}", f"{prefixes.get(name, name)}_{'a' * 26}")
    return path.replace("{owner}", "somebody")


def count_queries(app: FastAPI) -> list[str]:
    """Return a list that every look of the application at its keys is added to."""
    seen: list[str] = []
    engine = app.state.service.database.engine

    @event.listens_for(engine, "before_cursor_execute")
    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "api_keys" in statement:
            seen.append(statement)

    return seen


def test_every_operation_but_the_public_ones_wants_a_key(app: FastAPI) -> None:
    with open_client(app) as client:
        for path, method, operation in list_operations(app.openapi()):
            answer = client.request(method, fill_path(path))
            if path in PUBLIC_PATHS:
                assert "security" not in operation
                assert answer.status_code == 200
                continue
            assert operation["security"] == [
                {"key": [scope] if (scope := required_scope(method.upper(), path)) else []}
            ]
            assert answer.status_code == 401, f"{method} {path}"
            assert answer.json()["code"] == "key_missing"
            assert answer.headers["www-authenticate"] == 'Bearer realm="pare"'


@pytest.mark.parametrize(
    "path", ["/", "/v1/nothing", "/docs", "//v1/jobs", "/v1/jobs/", "/health/live/x", "/metrics/x"]
)
def test_paths_that_are_nowhere_tell_nothing_without_a_key(app: FastAPI, path: str) -> None:
    with open_client(app) as client:
        assert client.get(path).status_code == 401


def test_every_operation_wants_its_scope(app: FastAPI, sqlite_database: Database) -> None:
    tokens = {scope: make_token(sqlite_database, "ann", (scope,)) for scope in ("read", "write", "admin")}
    with open_client(app) as client:
        for path, method, operation in list_operations(app.openapi()):
            if path in PUBLIC_PATHS:
                continue
            ((needed,),) = [[*entry["key"], None][:1] for entry in operation["security"]]
            for scope, token in tokens.items():
                answer = client.request(method, fill_path(path), headers=bearer(token))
                where = f"{method} {path} with {scope}"
                if needed is None or scope == needed:
                    assert answer.status_code not in (401, 403), where
                else:
                    assert answer.status_code == 403, where
                    assert answer.json()["code"] == "missing_scope", where
                    assert f'scope="{needed}"' in answer.headers["www-authenticate"], where


def test_mutating_operations_never_want_read_alone(app: FastAPI) -> None:
    for path, method, _ in list_operations(app.openapi()):
        if method not in ("get", "options"):
            assert required_scope(method.upper(), path) in ("write", "admin"), f"{method} {path}"


@pytest.mark.parametrize("form", ["Basic {}", "{}", "Bearer", "Bearer {}x", "Bearer \xe9", "Bearer " + "x" * 10_000])
def test_what_is_no_key_is_refused_without_the_database(app: FastAPI, form: str) -> None:
    with open_client(app) as client:
        seen = count_queries(app)
        token = new_token("live", "key_" + "a" * 26).render()
        answer = client.get("/v1/jobs", headers=[(b"Authorization", form.format(token).encode("latin-1"))])
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == 'Bearer realm="pare", error="invalid_token"'
    assert seen == []


def test_keys_of_another_environment_are_refused_without_the_database(app: FastAPI) -> None:
    with open_client(app) as client:
        seen = count_queries(app)
        answer = client.get("/v1/jobs", headers=bearer(new_token("trial", "key_" + "a" * 26).render()))
    assert "environment 'trial'" in answer.json()["detail"]
    assert seen == []


def test_a_key_is_looked_up_once_for_many_requests(app: FastAPI, sqlite_database: Database) -> None:
    with open_client(app, make_token(sqlite_database, "ann")) as client:
        client.get("/v1/techniques")
        seen = count_queries(app)
        for _ in range(5):
            assert client.get("/v1/techniques").status_code == 200
    assert seen == []


def test_me_tells_whose_key_it_is(sqlite_database: Database, client: TestClient) -> None:
    token = make_token(sqlite_database, "ann", ("write",))
    told = client.get("/v1/me", headers=bearer(token)).json()
    assert (told["owner"], told["scopes"], told["key"]["id"]) == ("ann", ["write"], id_of(token))
    assert told["key"]["last_used_at"] is not None


def test_nobody_is_asked_in_local_mode(settings: Settings) -> None:
    with open_client(create_keyed_app(settings, auth="local")) as client:
        told = client.get("/v1/me", headers=bearer("whatever")).json()
        assert (told["owner"], told["scopes"], told["key"]) == ("local", ["read", "write", "admin"], None)
        assert "security" not in client.get("/openapi.json").json()["paths"]["/v1/jobs"]["post"]


def test_administrators_make_rotate_and_revoke_keys(app: FastAPI, sqlite_database: Database) -> None:
    admin = make_token(sqlite_database, "ops", ("admin",))
    with open_client(app, admin) as client:
        made = client.post("/v1/keys", json={"owner": "ann", "scopes": ["read"]})
        assert made.status_code == 201
        key, token = made.json()["key"], made.json()["token"]
        assert made.headers["location"] == f"/v1/keys/{key['id']}"
        assert made.headers["cache-control"] == "no-store"
        assert client.get("/v1/jobs", headers=bearer(token)).status_code == 200
        assert token not in client.get("/v1/keys").text
        assert [item["id"] for item in client.get("/v1/keys", params={"owner": "ann"}).json()["items"]] == [key["id"]]

        fresh = client.post(f"/v1/keys/{key['id']}/rotate", json={"grace_seconds": 0}).json()["token"]
        assert client.get("/v1/jobs", headers=bearer(token)).status_code == 401
        assert client.get("/v1/jobs", headers=bearer(fresh)).status_code == 200
        assert client.post(f"/v1/keys/{key['id']}/rotate", json={}).json()["code"] == "key_replaced"

        assert client.delete(f"/v1/keys/{id_of(fresh)}").status_code == 204
        assert client.get("/v1/jobs", headers=bearer(fresh)).status_code == 401
        assert client.get(f"/v1/keys/{id_of(fresh)}").json()["revoked_at"] is not None
        assert client.delete("/v1/keys/key_" + "0" * 26).status_code == 404


@pytest.fixture
def live_url(app: FastAPI) -> Iterator[str]:
    with serve(app) as (url, _server):
        yield url


def revoke(database: Database, token: str) -> float:
    """Revoke a key behind the API process's back, as another process would; return when."""
    with database.session() as session:
        revoke_key(session, id_of(token))
    return time.monotonic()


def test_an_open_stream_ends_with_its_key(live_url: str, sqlite_database: Database, world: World) -> None:
    token = make_token(sqlite_database, "local")
    job_id = world.submit()
    headers = {"Accept": "text/event-stream", **bearer(token)}
    with httpx2.stream(
        "GET", f"{live_url}/v1/jobs/{job_id}/events", headers=headers, timeout=30, trust_env=False
    ) as answer:
        lines = answer.iter_lines()
        while next(lines) != "id: 1":
            pass
        revoked_at = revoke(sqlite_database, token)
        list(lines)  # ends in order
        assert time.monotonic() - revoked_at < ENDS_WITHIN_SECONDS
    again = httpx2.get(f"{live_url}/v1/jobs/{job_id}", headers=headers, trust_env=False)
    assert again.status_code == 401


def test_an_upload_ends_with_its_key_and_leaves_nothing(
    live_url: str, app: FastAPI, settings: Settings, sqlite_database: Database
) -> None:
    token = make_token(sqlite_database, "ann")
    began, ended = threading.Event(), threading.Event()

    def trickle() -> Iterator[bytes]:
        while not ended.is_set():
            yield b"x" * 1000
            began.set()
            time.sleep(0.05)

    answers: list[httpx2.Response] = []

    def upload() -> None:
        answers.append(
            httpx2.post(f"{live_url}/v1/models", content=trickle(), headers=bearer(token), timeout=30, trust_env=False)
        )

    thread = threading.Thread(target=upload)
    thread.start()
    assert began.wait(20)
    incoming = settings.data_dir / "store" / "incoming"
    wait_until(lambda: bool(list(incoming.iterdir())))
    revoked_at = revoke(sqlite_database, token)
    wait_until(lambda: not list(incoming.iterdir()), ENDS_WITHIN_SECONDS)
    assert time.monotonic() - revoked_at < ENDS_WITHIN_SECONDS
    ended.set()
    thread.join(20)
    assert [answer.status_code for answer in answers] == [401]
    with open_client(app, make_token(sqlite_database, "ann")) as client:
        assert client.get("/v1/models").json()["items"] == []


def test_bad_keys_are_slowed_down_and_good_ones_are_not(app: FastAPI, sqlite_database: Database) -> None:
    good = make_token(sqlite_database, "ann")
    fresh = make_token(sqlite_database, "ann")
    with open_client(app) as client:
        statuses = []
        for number in range(300):
            forged = new_token("live", f"key_{number:026d}").render()
            answer = client.get("/v1/jobs", headers=bearer(forged if number % 2 else forged[:-1]))
            statuses.append(answer.status_code)
            if number % 100 == 0:
                assert client.get("/v1/techniques", headers=bearer(good)).status_code == 200
        assert statuses == [401] * (MAX_BAD_KEYS - 1) + [429] * (300 - MAX_BAD_KEYS + 1)
        assert answer.json()["code"] == "too_many_bad_keys"
        assert 1 <= int(answer.headers["retry-after"]) <= PERIOD_SECONDS
        assert client.get("/v1/jobs", headers=bearer(fresh)).status_code == 200


def test_the_throttle_counts_by_address_and_forgets() -> None:
    now = 100.0
    throttle = BadKeyThrottle(clock=lambda: now)
    for _ in range(MAX_BAD_KEYS):
        assert throttle.wait_seconds("10.0.0.1") == 0
        throttle.note("10.0.0.1")
        throttle.note("2001:db8::1")
    assert throttle.wait_seconds("10.0.0.1") == PERIOD_SECONDS
    assert throttle.wait_seconds("10.0.0.2") == 0
    assert throttle.wait_seconds("2001:db8::2") == PERIOD_SECONDS, "one subscriber has the whole /64"
    assert throttle.wait_seconds("2001:db8:0:1::1") == 0
    now += PERIOD_SECONDS
    assert throttle.wait_seconds("10.0.0.1") == 0
    throttle.note("10.0.0.1")
    assert throttle.wait_seconds("10.0.0.1") == 0


def test_the_host_header_and_odd_targets_change_nothing(app: FastAPI, sqlite_database: Database) -> None:
    reader = make_token(sqlite_database, "ann", ("read",))
    with open_client(app, reader) as client:
        for host in ("x/health/live", "x/admin?", "[::1"):
            assert client.get("/v1/keys", headers={"Host": host}).status_code in (400, 403)
            assert client.get("/v1/jobs", headers={"Host": host}).status_code in (200, 400)
        for path in ("/v1/%6beys", "/v1/keys?x=/health/live", "/v1/keys/../keys"):
            assert client.get(path).status_code == 403
        for path in ("//v1/keys", "/V1/keys", "/v1/keys/", "/v1//keys", "/v1/%2e%2e/v1/keys"):
            assert client.get(path).status_code in (403, 404)
        answer = client.get("/v1/jobs", headers={"X-HTTP-Method-Override": "DELETE"})
        assert answer.status_code == 200


def test_the_socket_too_decides_by_the_path_it_routes(live_url: str, sqlite_database: Database) -> None:
    """Targets that a client library would not send."""
    place = urlsplit(live_url)
    reader = make_token(sqlite_database, "ann", ("read",))
    for target in (f"{live_url}/v1/keys", "/health/live/../../v1/keys", "/v1/keys#/health/live", "//health/live"):
        with socket.create_connection((place.hostname, place.port), timeout=20) as connection:
            head = f"GET {target} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {reader}\r\nConnection: close\r\n\r\n"
            connection.sendall(head.encode())
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert answer.split()[1] in (b"400", b"403", b"404"), target
