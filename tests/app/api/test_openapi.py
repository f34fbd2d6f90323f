"""The API description is complete, and the API does what it says: checked over generated requests."""

from contextlib import suppress
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from schemathesis import GenerationMode
from schemathesis.config import SchemathesisConfig
from schemathesis.core.control import SkipTest
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import positive_data_acceptance
from starlette.testclient import TestClient

from app.db.session import Database
from app.settings import Settings
from tests.app.api.keyed import bearer, create_keyed_app, make_token

JUDGED_BY_STATE = {
    "list_models", "list_datasets", "list_jobs", "submit_job", "submit_distillation", "download_artifact",
    "upload_model", "begin_upload", "list_webhooks", "create_webhook", "change_webhook", "list_keys", "list_actions",
}  # fmt: skip
"""A schema cannot say which cursors were given out, which models there are, how long a file is, which format needs an
architecture, or which addresses are public."""


schemathesis.serializer.alias("application/offset+octet-stream", "application/octet-stream")

REFUSALS = ["400", "401", "403", "406", "412", "415", "422"]
EXPECTED_STATUSES = {
    "negative_data_rejection": {"expected-statuses": [*REFUSALS, "404", "405", "409", "428", "429", "5xx"]},
    "missing_required_header": {"expected-statuses": REFUSALS},
}
"""Those that schemathesis expects by itself, and 412: the tus protocol prescribes it for a missing version."""


def list_operations(description: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [(path, method, item) for path, items in description["paths"].items() for method, item in items.items()]


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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["good", "bad"])
def test_generated_requests_are_answered_as_described(
    settings: Settings, sqlite_database: Database, mode: GenerationMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.api.throttle.MAX_BAD_KEYS", 10**9)  # it tries every operation with bad keys, too
    app = create_keyed_app(settings)
    # Not one of the requests about keys can end it: it is not among what they may name.
    headers = bearer(make_token(sqlite_database, "ann"))
    if mode is GenerationMode.NEGATIVE:
        for _, _, operation in list_operations(app.openapi()):
            operation.pop("security", None)  # else it spoils requests by taking the key away, and we put it back
    config = SchemathesisConfig.from_dict(
        {"generation": {"mode": mode.value, "deterministic": True}, "checks": EXPECTED_STATUSES}
    )
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, config=config)
    num_cases = 0
    for found in schema.get_all_operations():
        assert isinstance(found, Ok), found
        num_cases += run_operation(found.ok(), mode, headers)
    assert num_cases > 50


def run_operation(operation: Any, mode: GenerationMode, headers: dict[str, str]) -> int:
    """Send generated requests for one operation and let schemathesis judge the answers; return how many."""
    num_cases = 0
    name = operation.definition.raw["operationId"]

    @hypothesis_settings(
        max_examples=8,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Any) -> None:
        nonlocal num_cases
        num_cases += 1
        excluded = [positive_data_acceptance] if name in JUDGED_BY_STATE else []
        case.call_and_validate(headers=headers, excluded_checks=excluded)

    with suppress(SkipTest):  # nothing can be wrong with a request that takes nothing
        send()
    return num_cases
