"""One look at the queue serves many answers, and says when it does not do."""

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from sqlalchemy import event, text
from starlette.testclient import TestClient

from app.access.limits import Limits, set_overrides
from app.api.glances import Glances
from app.api.service import Service
from tests.app.jobs.world import OWNER, World

RECIPE = {"steps": [{"kind": "prune_magnitude"}]}


@pytest.fixture(autouse=True)
def keep_glances(look_each_time: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001 - it comes first
    monkeypatch.setattr("app.api.glances.KEEP_SECONDS", 3600.0)
    monkeypatch.setattr("app.api.glances.MAX_SECONDS", 3600.0)


@pytest.fixture
def statements(app: FastAPI) -> Iterator[list[str]]:
    """What the application asks of its database."""
    service: Service = app.state.service
    asked: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        asked.append(statement)

    event.listen(service.database.engine, "before_cursor_execute", note)
    yield asked
    event.remove(service.database.engine, "before_cursor_execute", note)


def post(client: TestClient, world: World) -> Any:
    return client.post("/v1/jobs", json={"model_id": world.model_id, "recipe": RECIPE}).json()


def test_status_of_a_waiting_job_is_one_query_once_somebody_has_looked(
    client: TestClient, world: World, statements: list[str]
) -> None:
    job_ids = [world.submit() for _ in range(30)]
    client.get(f"/v1/jobs/{job_ids[0]}")
    statements.clear()
    answers = [client.get(f"/v1/jobs/{job_id}").json() for job_id in job_ids]
    assert [answer["num_jobs_ahead"] for answer in answers] == list(range(30))
    assert [answer["waiting"]["reason"] for answer in answers] == ["no_worker"] * 30
    asked = [statement for statement in statements if statement.lstrip().startswith("SELECT")]
    assert len(asked) == 30, "the row of the job, and nothing else"


def test_the_places_of_what_the_process_takes_itself_are_known_at_once(client: TestClient, world: World) -> None:
    world.submit()
    ahead = [post(client, world)["num_jobs_ahead"] for _ in range(3)]
    assert ahead == [1, 2, 3]
    world.submit()  # by somebody else: not seen yet
    assert post(client, world)["num_jobs_ahead"] == 4


def test_a_submission_far_from_the_limits_counts_nothing(
    client: TestClient, world: World, statements: list[str]
) -> None:
    post(client, world)
    statements.clear()
    post(client, world)
    counts = [statement for statement in statements if "count(" in statement or "FROM owners" in statement]
    assert counts == []


@pytest.mark.parametrize(
    ("limits", "has_room"),
    [
        ({}, True),  # the settings': ten thousand
        ({"queued_jobs": 2_000}, True),
        ({"queued_jobs": 1_999}, False),
        ({"stored_bytes": 2**50}, False),
    ],
)
def test_small_limits_and_limits_of_storage_are_checked_each_time(
    app: FastAPI, world: World, limits: dict[str, int], has_room: bool
) -> None:
    with world.database.session() as session:
        set_overrides(session, OWNER, Limits(**limits))
    assert look(app).has_room(OWNER) is has_room


def test_half_of_the_limit_must_be_free(app: FastAPI, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.api.glances.FEW", 4)
    with world.database.session() as session:
        set_overrides(session, OWNER, Limits(queued_jobs=4))
    world.submit_many(2)
    assert look(app).has_room(OWNER)
    world.submit_many(1)
    assert not look(app).has_room(OWNER)


def test_an_old_glance_says_nothing_of_limits(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    glance = look(app)
    assert glance.has_room(OWNER)
    monkeypatch.setattr("app.api.glances.MAX_SECONDS", 0.0)
    assert not glance.has_room(OWNER)


def test_a_submission_that_cannot_be_recorded_is_not_made(client: TestClient, world: World) -> None:
    with world.database.session() as session:
        session.execute(text("ALTER TABLE audit RENAME TO elsewhere"))
    answer = client.post("/v1/jobs", json={"model_id": world.model_id, "recipe": RECIPE})
    assert answer.status_code == 503
    assert client.get("/v1/jobs").json()["items"] == []


def look(app: FastAPI) -> Any:
    service: Service = app.state.service
    return Glances(service.settings, service.database).look(OWNER)
