"""Every error is a problem, whoever found it, and tells nothing about the inside."""

import logging
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from app import errors
from app.api.problems import status_of
from app.settings import Settings
from tests.app.jobs.world import World

FIELDS = {"type", "title", "status", "detail", "code", "fix", "retryable", "request_id"}
JSON = {"Content-Type": "application/json"}


def check_problem(answer: Any, status: int, code: str) -> dict[str, Any]:
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    problem: dict[str, Any] = answer.json()
    assert set(problem) - {"errors"} == FIELDS
    assert (problem["status"], problem["code"], problem["type"]) == (status, code, f"urn:pare:problem:{code}")
    assert problem["request_id"] == answer.headers["x-request-id"] != ""
    assert problem["detail"]
    assert problem["fix"]
    assert "Traceback" not in answer.text
    assert "site-packages" not in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"
    return problem


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/v1/models/", 404, "not_found"),
        ("GET", "/docs", 404, "not_found"),
        ("GET", "/v1/models/mdl_" + "a" * 26, 404, "not_found"),
        ("GET", "/v1/models/no-id", 404, "not_found"),
        ("GET", "/v1/jobs/job_%00", 404, "not_found"),
        ("GET", "/v1/artifacts/..%2f..%2fetc%2fpasswd", 404, "not_found"),
        ("GET", "/%ff%fe", 404, "not_found"),
        ("PUT", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/jobs?limit=0", 422, "invalid_request"),
        ("GET", "/v1/jobs?limit=x", 422, "invalid_request"),
        ("GET", "/v1/jobs?limit=" + "9" * 5000, 422, "invalid_request"),
        ("GET", "/v1/jobs?cursor=x", 400, "invalid_cursor"),
        ("POST", "/v1/jobs", 422, "invalid_request"),
    ],
)
def test_walk(client: TestClient, method: str, path: str, status: int, code: str) -> None:
    check_problem(client.request(method, path), status, code)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PATCH", "/v1/models", "GET, HEAD, POST"),
        ("PATCH", "/v1/models/mdl_x", "DELETE, GET, HEAD"),
        ("GET", "/v1/jobs/job_x/cancel", "POST"),
        ("HEAD", "/v1/jobs/job_x/cancel", "POST"),
        ("DELETE", "/health/live", "GET, HEAD"),
        ("DELETE", "/openapi.json", "GET, HEAD"),
    ],
)
def test_wrong_method_names_all_right_ones(client: TestClient, method: str, path: str, allowed: str) -> None:
    answer = client.request(method, path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allowed)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nul",
        b"\xff\xfe",
        b'{"model_id": "\xff"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[" * 300_000 + b"]" * 300_000,
        b'{"priority": NaN}',
        b'{"priority": -Infinity}',
        b'{"priority": ' + b"9" * 100_000 + b"}",
        b'{"priority": 1e999}',
        b'{"priority": 1, "priority": 2}',
        rb'{"\ud800": 1}',
        rb'{"model_id": "\ud800"}',
        rb'{"labels": {"a": "\ud800"}}',
        rb'{"labels": {"a": "\u0000"}}',
        b'{"recipe": null, "model_id": [], "labels": 7}',
        b"[]",
        b'"text"',
        b"{" + b",".join(b'"%d":%d' % (i, i) for i in range(50_000)) + b"}",
    ],
)
def test_json_bombs_are_the_senders_fault(client: TestClient, body: bytes) -> None:
    answer = client.post("/v1/jobs", content=body, headers=JSON)
    assert answer.status_code in (400, 413, 422)
    problem = check_problem(answer, answer.status_code, answer.json()["code"])
    assert len(problem.get("errors", [])) <= 100


@pytest.mark.parametrize("headers", [JSON, {**JSON, "Idempotency-Key": '"hostile"'}])
def test_hostile_text_in_a_good_request_is_refused_where_it_stands(
    client: TestClient, world: World, headers: dict[str, str]
) -> None:
    step = rb'{"kind": "prune_magnitude", "skip_layers": ["\ud800"]}'
    body = b'{"model_id": "%s", "recipe": {"steps": [%s]}}' % (world.model_id.encode(), step)
    problem = check_problem(client.post("/v1/jobs", content=body, headers=headers), 422, "invalid_request")
    assert problem["errors"][0]["pointer"] == "/recipe/steps/0/skip_layers/0"


@pytest.mark.parametrize("chunked", [False, True])
def test_large_json_is_413(client: TestClient, settings: Settings, chunked: bool) -> None:
    size = settings.max_body_bytes + 1
    content = iter([b" " * (size // 2), b" " * (size - size // 2)]) if chunked else b" " * size
    problem = check_problem(client.post("/v1/jobs", content=content, headers=JSON), 413, "too_large")
    assert str(settings.max_body_bytes) in problem["detail"]


# A page of another site can send these without asking; JSON it cannot. The second is what curl -d says by itself.
@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded; charset=utf-8"])
def test_json_under_another_name_is_refused_and_the_header_named(client: TestClient, media_type: str) -> None:
    answer = client.post("/v1/jobs", content=b"{}", headers={"Content-Type": media_type})
    problem = check_problem(answer, 415, "unsupported_format")
    assert media_type.partition(";")[0] in problem["detail"]
    assert "Content-Type: application/json" in problem["fix"]


def test_unexpected_error_tells_nothing_and_is_logged(
    app: FastAPI, client: TestClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def explode() -> None:
        raise ZeroDivisionError("secret in /etc/pare")

    monkeypatch.setattr(app.state.service.database, "ping", explode)
    answer = client.get("/health/ready")
    check_problem(answer, 500, "internal_error")
    assert "secret" not in answer.text
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_request_id_is_taken_over_if_it_is_one(client: TestClient) -> None:
    given = "0af7651916cd43dd8448eb211c80319c"
    assert client.get("/health/live", headers={"X-Request-ID": given}).headers["x-request-id"] == given
    logging.getLogger("asgi_correlation_id").disabled = True
    forged = client.get("/nowhere", headers={"X-Request-ID": "a\tb<script>"})
    assert forged.headers["x-request-id"] != "a\tb<script>"


def test_locked_database_is_503_in_time(client: TestClient, world: World, settings: Settings) -> None:
    path = settings.database_url.removeprefix("sqlite:///")
    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    try:
        body = {"model_id": world.model_id, "recipe": {"steps": [{"kind": "prune_magnitude"}]}}
        answer = client.post("/v1/jobs", json=body)
        problem = check_problem(answer, 503, "unavailable")
        assert problem["retryable"] is True
        assert int(answer.headers["retry-after"]) > 0
        assert client.get("/v1/jobs").status_code == 200  # readers go on
    finally:
        blocker.close()
    assert client.post("/v1/jobs", json=body).status_code == 202


def test_gone_storage_is_503_and_reading_goes_on(client: TestClient, tmp_path: Path) -> None:
    incoming = tmp_path / "store" / "incoming"
    incoming.rmdir()
    check_problem(client.post("/v1/models", content=b"abc"), 503, "unavailable")
    assert client.get("/v1/models").status_code == 200


def list_errors(kind: type[errors.PareError]) -> list[type[errors.PareError]]:
    ours = [child for child in kind.__subclasses__() if child.__module__.startswith("app.")]
    return [kind, *(found for child in ours for found in list_errors(child))]


@pytest.mark.parametrize("kind", list_errors(errors.PareError), ids=lambda kind: kind.__name__)
def test_every_error_of_the_service_has_a_status(kind: type[errors.PareError]) -> None:
    error = kind.__new__(kind)
    errors.PareError.__init__(error)
    own_fault = kind is errors.PareError or issubclass(kind, errors.ConfigurationError)
    assert (status_of(error) == 500) == own_fault
