"""Everything belongs to an owner: to everybody else it is not there, on every operation of the API description.

A new operation is walked by itself. It fails here when its path has a parameter whose owner this file does not know.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from app import jobs
from app.api.guard import PUBLIC_PATHS, required_scope
from app.db.clock import db_now
from app.db.session import Database
from app.db.tables import ArtifactRow, LogRow
from app.files.resumable import begin_upload
from app.ids import new_id
from app.settings import Settings
from app.storage import Storage, owner_storage
from app.webhooks.deliveries import send_test
from app.webhooks.endpoints import create_endpoint
from tests.app.api.generated import list_operations
from tests.app.api.keyed import create_keyed_app, make_token, open_client
from tests.app.jobs.world import REFUSAL, World, dataset_facts, model_facts

SECRET = "anns-own-words"
OF_NOBODY = {"key_id", "owner"}
"""Parameters of paths that only administrators may ask for, whoever they belong to."""


@dataclass(frozen=True)
class Belongings:
    """What ann has: parameter of a path -> an id of hers."""

    ids: dict[str, str]
    recipe: dict[str, Any]


@pytest.fixture
def app(settings: Settings) -> FastAPI:
    return create_keyed_app(settings)


@pytest.fixture
def ann(world: World, sqlite_database: Database, storage: Storage) -> Belongings:
    """Ann's model and dataset, her job that failed with an artifact and a log, her webhook, her upload."""
    model_id = world.add_model(owner="ann", facts=model_facts())
    dataset_id = world.add_dataset(owner="ann", facts=dataset_facts())
    with sqlite_database.session() as session:
        for row in (world.upload(model_id), world.upload(dataset_id)):
            session.merge(row).name = SECRET
    job_id = world.submit(owner="ann", model_id=model_id, labels={"note": SECRET})
    claim = world.start(job_id)
    with owner_storage(storage, "ann").writer() as writer:
        writer.write(SECRET.encode())
        blob = writer.commit()
    with sqlite_database.session() as session:
        jobs.fail(session, claim, REFUSAL)
        artifact = ArtifactRow(
            id=new_id("art"), job_id=job_id, owner="ann", name=SECRET, media_type="text/plain", epoch=1,
            size_bytes=blob.size_bytes, sha256=blob.sha256, created_at=db_now(),
        )  # fmt: skip
        log = LogRow(job_id=job_id, attempt=2, size_bytes=blob.size_bytes, sha256=blob.sha256, created_at=db_now())
        webhook = create_endpoint(
            session, owner="ann", url="https://8.8.8.8/ann", description=SECRET, events=["job.failed"], jobs="named"
        )
        session.add_all([artifact, log])
    with sqlite_database.session() as session:
        delivery = send_test(session, "ann", webhook.id)
        upload = begin_upload(session, owner="ann", size_bytes=10, description=None, expiry_seconds=3600)
    ids = {
        "model_id": model_id, "dataset_id": dataset_id, "job_id": job_id, "artifact_id": artifact.id,
        "webhook_id": webhook.id, "delivery_id": delivery.id, "upload_id": upload.id,
    }  # fmt: skip
    return Belongings(ids, {"steps": [{"kind": "prune_magnitude"}]})


@pytest.fixture
def bob(app: FastAPI, sqlite_database: Database) -> Iterator[TestClient]:
    with open_client(app, make_token(sqlite_database, "bob", ("read", "write"))) as client:
        yield client


def list_paths(app: FastAPI) -> list[tuple[str, str, list[str]]]:
    """Return (method, path, names of its parameters) of every operation that is not for administrators."""
    found = []
    for path, method, _ in list_operations(app.openapi()):
        if path not in PUBLIC_PATHS and required_scope(method.upper(), path) != "admin":
            found.append((method, path, re.findall(r"\{(\w+)\}", path)))
    return found


def test_every_parameter_of_a_path_is_known_here(app: FastAPI, ann: Belongings) -> None:
    for method, path, names in list_paths(app):
        unknown = set(names) - set(ann.ids)
        assert not unknown, f"{method} {path}: add ann's {unknown} to `ann` above, so that bob can try it"
    described = [path for path, _, _ in list_operations(app.openapi())]
    admins = {name for path in described for name in re.findall(r"\{(\w+)\}", path)} - set(ann.ids)
    assert admins <= OF_NOBODY


def test_anothers_things_are_not_there(app: FastAPI, ann: Belongings, bob: TestClient) -> None:
    walked = 0
    for method, path, names in list_paths(app):
        if not names:
            continue
        url = path.format(**ann.ids)
        bodies = app.openapi()["paths"][path][method].get("requestBody", {}).get("content", {})
        json_body: Any = {} if "application/json" in bodies else None
        content = b"x" if "application/octet-stream" in bodies or "application/offset+octet-stream" in bodies else None
        protocol = {"Tus-Resumable": "1.0.0", "Upload-Offset": "0", "Content-Type": next(iter(bodies), "text/plain")}
        for headers in (protocol, {**protocol, "Accept": "text/event-stream"}):
            answer = bob.request(method, url, json=json_body, content=content, headers=headers)
            assert answer.status_code == 404, f"{method} {url} -> {answer.status_code} {answer.text}"
            told = answer.text
            for name, value in ann.ids.items():
                if name not in names:
                    assert value not in told, f"{method} {url} tells {name}"
            assert SECRET not in told
        walked += 1
    assert walked > 20


def test_the_owner_reaches_all_of_it(app: FastAPI, ann: Belongings, sqlite_database: Database, bob: TestClient) -> None:
    """Else the walk above would prove nothing."""
    token = make_token(sqlite_database, "ann", ("read", "write"))
    absent = {"/v1/jobs/{job_id}/metrics", "/v1/distillations/{job_id}"}  # it failed, and is no distillation
    for method, path, names in list_paths(app):
        if names and method == "get" and path not in absent:
            answer = bob.get(path.format(**ann.ids), headers={"Authorization": f"Bearer {token}"})
            assert answer.status_code in (200, 204), f"{path} -> {answer.status_code} {answer.text}"


def test_lists_show_nothing_of_anothers(app: FastAPI, ann: Belongings, bob: TestClient) -> None:
    for method, path, names in list_paths(app):
        if method == "get" and not names:
            answer = bob.get(path)
            assert answer.status_code == 200, path
            assert SECRET not in answer.text, path
            assert not [value for value in ann.ids.values() if value in answer.text], path
    assert bob.get("/v1/jobs", params={"parent_id": ann.ids["job_id"]}).json()["items"] == []


def test_nothing_of_anothers_can_be_referred_to(world: World, ann: Belongings, bob: TestClient) -> None:
    """Refused in the same words as an id that nobody has."""
    mine, stolen = world.add_model(owner="bob"), ann.ids["model_id"]
    data = {"dataset_id": ann.ids["dataset_id"], "inputs": {"x": {"column": "image"}}}
    requests: list[tuple[str, dict[str, Any]]] = [
        ("/v1/jobs", {"model_id": stolen, "recipe": ann.recipe}),
        ("/v1/jobs", {"model_id": mine, "recipe": {**ann.recipe, "data": data}}),
        (
            "/v1/jobs",
            {
                "model_id": mine,
                "recipe": {**ann.recipe, "data": {**data, "evaluation_dataset_id": ann.ids["dataset_id"]}},
            },
        ),
        ("/v1/jobs", {"model_id": mine, "recipe": ann.recipe, "webhook_id": ann.ids["webhook_id"]}),
        (
            "/v1/distillations",
            {
                "model_id": stolen,
                "webhook_id": ann.ids["webhook_id"],
                "distillation": {"student": {"kind": "derive_student"}, "training": {"kind": "distill"}, "data": data},
            },
        ),
    ]
    taught = [{"kind": "take_student", "student": stolen}, {"kind": "distill", "teacher_model_id": stolen}]
    requests += [("/v1/jobs", {"model_id": mine, "recipe": {"steps": taught, "data": data}})]
    for path, body in requests:
        for params in ({}, {"dry_run": "true"}):
            answer = bob.post(path, json=body, params=params)
            nobody = bob.post(path, json=_replaced(body, ann.ids), params=params)
            assert answer.status_code == nobody.status_code == 422, answer.text
            assert answer.json()["code"] == "invalid_request"
            assert {place["pointer"] for place in answer.json()["errors"]} == {
                place["pointer"] for place in nobody.json()["errors"]
            }
            assert "there is no" in answer.json()["detail"]
            assert SECRET not in answer.text
    assert bob.get("/v1/jobs").json()["items"] == []
    for path in ("/v1/models", "/v1/datasets?format=npz"):
        answer = bob.post(path, json={"upload_id": ann.ids["upload_id"], "sha256": "0" * 64})
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


def _replaced(body: Any, ids: dict[str, str]) -> Any:
    if isinstance(body, dict):
        return {name: _replaced(value, ids) for name, value in body.items()}
    if isinstance(body, list):
        return [_replaced(value, ids) for value in body]
    return body[:4] + "0" * 26 if body in ids.values() else body


@pytest.mark.parametrize(
    "field", ["owner", "id", "state", "status", "epoch", "attempt", "worker_id", "parent_id", "action", "created_at"]
)
def test_nobody_chooses_what_the_service_decides(app: FastAPI, world: World, bob: TestClient, field: str) -> None:
    body = {"model_id": world.add_model(owner="bob"), "recipe": {"steps": [{"kind": "prune_magnitude"}]}}
    answer = bob.post("/v1/jobs", json={**body, field: "ann"})
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, f"/{field}")
    uploaded = bob.post("/v1/models", params={field: "ann", "name": "n"}, content=b"bytes").json()
    assert uploaded["state"] == "checking"
    assert bob.get(f"/v1/models/{uploaded['id']}").status_code == 200
    for name, schema in app.openapi()["components"]["schemas"].items():
        if name.endswith("Request"):
            assert schema["additionalProperties"] is False, name


def test_the_same_bytes_of_two_owners_look_like_different_bytes(sqlite_database: Database, bob: TestClient) -> None:
    """Nothing tells bob that ann has the file: same status, same fields, everything sent and counted again."""
    ann = {"Authorization": f"Bearer {make_token(sqlite_database, 'ann')}"}
    first = bob.post("/v1/models", content=b"a" * 1000, headers=ann)
    second, fresh = bob.post("/v1/models", content=b"a" * 1000), bob.post("/v1/models", content=b"b" * 1000)
    assert first.status_code == second.status_code == fresh.status_code == 201
    varying = {"id", "created_at", "links", "sha256"}
    shown = [
        {name: value for name, value in answer.json().items() if name not in varying} for answer in (second, fresh)
    ]
    assert shown[0] == shown[1]
    assert set(second.headers) == set(fresh.headers)
    assert len(bob.get("/v1/models").json()["items"]) == 2
    bob.headers.update(ann)
    assert len(bob.get("/v1/models").json()["items"]) == 1
