"""The API description is complete, and the API does what it says: checked over generated requests."""

import re

import pytest
import schemathesis
from fastapi import APIRouter, FastAPI
from fastapi.routing import APIRoute
from schemathesis import GenerationMode
from starlette.routing import Route
from starlette.testclient import TestClient

from app.db.session import Database
from app.settings import Settings
from tests.app.api.generated import Requests, list_operations, send_all
from tests.app.api.keyed import bearer, create_keyed_app, make_token


def test_every_operation_describes_itself_and_its_errors(app: FastAPI) -> None:
    for path, method, operation in list_operations(app.openapi()):
        where = f"{method} {path}"
        assert operation["summary"], where
        assert operation["description"], where
        assert operation["tags"], where
        assert {"500", "503"} <= set(operation["responses"]), where
        for status, response in operation["responses"].items():
            assert "X-Request-ID" in response["headers"], where
            if int(status) >= 400 and "/health" not in path:
                assert list(response["content"]) == ["application/problem+json"], f"{where} {status}"
        for parameter in operation.get("parameters", []):
            assert parameter.get("description"), f"{where} {parameter['name']}"


def test_every_route_is_described(app: FastAPI, client: TestClient) -> None:
    described = {(method.upper(), path) for path, method, _ in list_operations(app.openapi())}
    routes = [*app.routes]
    for included in app.routes:  # each of the application's routers
        routes += getattr(included, "original_router", APIRouter()).routes
    ours = {(method, route.path) for route in routes if isinstance(route, APIRoute) for method in route.methods or ()}
    assert ours == described
    assert [route.path for route in routes if isinstance(route, Route) and not isinstance(route, APIRoute)] == [
        "/openapi.json"
    ]
    for path in ("/docs", "/redoc", "/docs/oauth2-redirect"):
        assert client.get(path).status_code == 404


def test_operation_ids_are_verbs_and_unique(app: FastAPI) -> None:
    ids = [operation["operationId"] for _, _, operation in list_operations(app.openapi())]
    assert len(ids) == len(set(ids))
    assert all(name.islower() and "_" in name for name in ids)


def test_every_field_of_an_answer_is_described_and_required(app: FastAPI) -> None:
    schemas = app.openapi()["components"]["schemas"]
    views = {name: schema for name, schema in schemas.items() if name.endswith(("View", "Page"))}
    assert len(views) > 10
    for name, schema in views.items():
        for field, described in schema["properties"].items():
            assert described.get("description"), f"{name}.{field}"
        assert set(schema["required"]) == set(schema["properties"]), name


def test_description_needs_nothing_from_elsewhere(client: TestClient) -> None:
    answer = client.get("/openapi.json")
    assert answer.status_code == 200
    assert "default-src 'none'" in answer.headers["content-security-policy"]


def test_whoever_makes_or_lists_a_thing_is_told_what_can_be_done_with_it(app: FastAPI) -> None:
    description = app.openapi()
    places = {item["operationId"]: (path, item) for path, _, item in list_operations(description)}
    reached: dict[str, set[str]] = {}
    for name, (_, operation) in places.items():
        for status, response in operation["responses"].items():
            for link in response.get("links", {}).values():
                assert int(status) < 300
                assert set(link["parameters"]) == set(re.findall(r"\{(\w+)\}", places[link["operationId"]][0]))
                reached.setdefault(link["operationId"], set()).add(name)
    on_things = {name for name, (path, _) in places.items() if path.endswith("_id}") or "_id}/" in path}
    assert set(reached) == on_things
    assert {"submit_job", "list_jobs", "get_job", "submit_distillation"} <= reached["cancel_job"]
    assert reached["download_artifact"] == {"list_artifacts"}
    assert "create_key" in reached["revoke_key"], "its id stands inside another object"
    assert "test_webhook" in reached["redeliver_webhook"], "one id is in the answer, the other in the request"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["good", "bad"])
def test_generated_requests_are_answered_as_described(
    settings: Settings, sqlite_database: Database, mode: GenerationMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.api.throttle.MAX_BAD_KEYS", 10**9)  # it tries every operation with bad keys, too
    app = create_keyed_app(settings)
    requests = Requests(mode, bearer(make_token(sqlite_database, "ann")), num_examples=5)
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, config=requests.config())
    assert send_all(schema, requests) > 50
