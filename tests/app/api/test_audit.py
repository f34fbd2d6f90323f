"""The audit log: every change and every attempt at one, with who did it, and no secret."""

from typing import Any

import pytest
from fastapi import FastAPI
from sqlalchemy import event, select
from starlette.testclient import TestClient

from app.access.__main__ import main
from app.access.audit import forget_actions
from app.db.access_tables import AuditRow
from app.db.clock import db_now
from app.db.session import Database
from app.errors import Unavailable
from app.settings import Settings
from tests.app.api.keyed import bearer, create_keyed_app, id_of, make_token
from tests.app.jobs.world import World


@pytest.fixture
def app(settings: Settings) -> FastAPI:
    return create_keyed_app(settings)


def read_log(client: TestClient, admin: str, **params: Any) -> list[dict[str, Any]]:
    answer = client.get("/v1/audit", headers=bearer(admin), params=params)
    assert answer.status_code == 200
    items: list[dict[str, Any]] = answer.json()["items"]
    return items


def test_changes_are_written_down_with_who_made_them(
    client: TestClient, sqlite_database: Database, world: World
) -> None:
    admin, ann = make_token(sqlite_database, "ops"), make_token(sqlite_database, "ann", ("read", "write"))
    model_id = world.add_model(owner="ann")
    body = {"model_id": model_id, "recipe": {"steps": [{"kind": "prune_magnitude"}]}}
    answers = [
        client.post("/v1/jobs", json=body, headers=bearer(ann)),
        client.get("/v1/jobs", headers=bearer(ann)),
        client.post("/v1/jobs", json={}, headers=bearer(ann)),
        client.delete(f"/v1/models/{model_id}", headers=bearer(ann)),
        client.post("/v1/keys", json={"owner": "bob"}, headers=bearer(ann)),
        client.post("/v1/keys", json={"owner": "bob"}, headers=bearer(admin)),
        client.post("/v1/jobs", json=body, headers=bearer("nonsense")),
    ]
    job_id, made = answers[0].json()["id"], answers[5].json()
    assert [answer.status_code for answer in answers] == [202, 200, 422, 409, 403, 201, 401]
    log = read_log(client, admin)
    told = [(entry["owner"], entry["action"], entry["target"], entry["status"], entry["outcome"]) for entry in log]
    assert told == [
        ("ops", "create_key", made["key"]["id"], 201, "done"),
        ("ann", "POST", "/v1/keys", 403, "refused"),
        ("ann", "delete_model", model_id, 409, "refused"),
        ("ann", "submit_job", "/v1/jobs", 422, "refused"),
        ("ann", "submit_job", job_id, 202, "done"),
    ]
    assert log[0]["key_id"] == id_of(admin)
    assert log[-1]["key_id"] == id_of(ann)
    assert log[-1]["request_id"] == answers[0].headers["x-request-id"]
    everything = client.get("/v1/audit", headers=bearer(admin)).text
    assert made["token"].split("_")[3] not in everything
    assert {entry["owner"] for entry in read_log(client, admin, owner="ann")} == {"ann"}
    assert len(read_log(client, admin, key_id=id_of(admin))) == 1
    assert len(read_log(client, admin, limit=2)) == 2
    assert client.get("/v1/audit", headers=bearer(ann)).status_code == 403


def test_an_upload_is_written_down_by_its_id(client: TestClient, sqlite_database: Database) -> None:
    admin = make_token(sqlite_database, "ops")
    model_id = client.post("/v1/models", content=b"x", headers=bearer(admin)).json()["id"]
    assert [(entry["action"], entry["target"]) for entry in read_log(client, admin)] == [("upload_model", model_id)]


def test_of_the_parts_of_an_upload_the_last_is_written_down(client: TestClient, sqlite_database: Database) -> None:
    admin = make_token(sqlite_database, "ops")
    headers = {**bearer(admin), "Tus-Resumable": "1.0.0"}
    begun = client.post("/v1/uploads", headers={**headers, "Upload-Length": "3"})
    headers |= {"Content-Type": "application/offset+octet-stream"}
    offsets = (0, 1, 0, 2)
    answers = [
        client.patch(begun.headers["location"], content=b"x", headers={**headers, "Upload-Offset": str(offset)})
        for offset in offsets
    ]
    assert [answer.status_code for answer in answers] == [204, 204, 409, 204]
    log = reversed(read_log(client, admin))
    assert [(entry["action"], entry["status"]) for entry in log] == [
        ("begin_upload", 201), ("append_to_upload", 409), ("append_to_upload", 204)
    ]  # fmt: skip


def test_odd_paths_are_written_down_in_print(client: TestClient, sqlite_database: Database) -> None:
    admin = make_token(sqlite_database, "ops")
    assert client.delete("/v1/models/%00%0a" + "x" * 300, headers=bearer(admin)).status_code in (404, 405)
    (entry,) = read_log(client, admin)
    assert entry["target"].isprintable()
    assert len(entry["target"]) <= 200


def test_an_entry_that_cannot_be_written_keeps_nobody_from_the_answer(
    app: FastAPI, client: TestClient, sqlite_database: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    admin = make_token(sqlite_database, "ops")
    client.get("/v1/me", headers=bearer(admin))
    engine = app.state.service.database.engine

    @event.listens_for(engine, "before_cursor_execute")
    def fail(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("INSERT INTO audit"):
            raise Unavailable

    answer = client.post("/v1/keys", json={"owner": "bob"}, headers=bearer(admin))
    assert answer.status_code == 201
    logged = capsys.readouterr().out
    assert "an action is in this log alone" in logged
    assert answer.json()["key"]["id"] in logged
    assert answer.json()["token"] not in logged


def test_the_services_own_command_is_written_down(
    database: Database, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PARE_DATABASE_URL", database.url)
    assert main(["create", "--owner", "ops"]) == 0
    key_id = id_of(capsys.readouterr().out.strip())
    assert main(["revoke", key_id]) == 0
    with database.read() as session:
        rows = session.scalars(select(AuditRow).order_by(AuditRow.created_at, AuditRow.action)).all()
    assert [(row.owner, row.action, row.target) for row in rows] == [
        ("(service)", "create_key", key_id),
        ("(service)", "revoke_key", key_id),
    ]


def test_old_entries_are_forgotten(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARE_DATABASE_URL", database.url)
    for owner in ("old", "new"):
        assert main(["create", "--owner", owner]) == 0
    with database.session() as session:
        session.scalars(select(AuditRow)).first().created_at = db_now(-10 * 24 * 3600 - 1)  # type: ignore[union-attr]
    with database.session() as session:
        forget_actions(session, 10)
    with database.read() as session:
        assert len(session.scalars(select(AuditRow)).all()) == 1
