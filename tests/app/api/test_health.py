"""Health tells the truth about each part."""

import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from fastapi import FastAPI
from sqlalchemy import text
from starlette.testclient import TestClient

from app.api.probes import Probes
from app.api.service import Service
from app.jobs import register_worker
from app.jobs.dispatchers import read_dispatch, remove_dispatcher, touch_dispatcher
from app.storage import Storage
from tests.app.api.conftest import wait_until
from tests.app.jobs.world import World

Both = tuple[TestClient, World]


def test_alive_even_when_nothing_works(both: Both) -> None:
    assert both[0].get("/health/live").json() == {"status": "ok"}


def test_without_workers_the_service_is_degraded(both: Both) -> None:
    answer = both[0].get("/health/ready")
    assert (answer.status_code, answer.json()["status"]) == (200, "degraded")
    checks = answer.json()["checks"]
    assert checks["database"] == checks["storage"] == {"ok": True, "detail": None}
    assert "no worker" in checks["workers"]["detail"]


def test_with_a_worker_it_is_ready_and_says_what_isolates_jobs(both: Both) -> None:
    client, world = both
    with world.database.session() as session:
        touch_dispatcher(session, "d1", broker_answers=True)
        facts = {"isolation": ["bubblewrap", "rlimits"], "accepts_jobs": True}
        register_worker(session, "w1", host="secret-host", queue="pare", facts=facts)
        facts = {"isolation": ["rlimits"], "accepts_jobs": True}
        register_worker(session, "w2", host="secret-host", queue="pare", facts=facts)
    answer = client.get("/health/ready").json()
    assert answer["status"] == "ready"
    workers = answer["checks"]["workers"]
    assert (workers["num_workers"], workers["isolation"]) == (2, ["rlimits"])  # what every worker has
    items = client.get("/v1/workers").json()["items"]
    assert [item["id"] for item in items] == ["w1", "w2"]
    assert "secret-host" not in str(items)


def test_without_a_dispatcher_or_its_broker_the_service_is_degraded(both: Both) -> None:
    client, world = both

    def read() -> tuple[str, dict[str, Any], dict[str, Any]]:
        answer = client.get("/health/ready").json()
        return answer["status"], answer["checks"]["dispatcher"], answer["checks"]["broker"]

    with world.database.session() as session:
        register_worker(session, "w1", host="h", queue="pare", facts={"isolation": [], "accepts_jobs": True})
    status, dispatcher, broker = read()
    assert (status, dispatcher["ok"], broker["ok"]) == ("degraded", False, False)
    assert "no dispatcher" in dispatcher["detail"]
    with world.database.session() as session:
        touch_dispatcher(session, "d1", broker_answers=False)
    status, dispatcher, broker = read()
    assert (status, dispatcher["ok"], broker["ok"]) == ("degraded", True, False)
    with world.database.session() as session:
        touch_dispatcher(session, "d1", broker_answers=True)
        touch_dispatcher(session, "d2", broker_answers=False)  # one that reaches it is enough
    assert read()[0] == "ready"
    with world.database.session() as session:
        remove_dispatcher(session, "d1")
        assert read_dispatch(session, 8).num_dispatchers == 1
    assert read()[0] == "degraded"


def test_workers_that_refuse_jobs_do_not_count(both: Both) -> None:
    client, world = both
    with world.database.session() as session:
        register_worker(session, "w1", host="h", queue="pare", facts={"isolation": [], "accepts_jobs": False})
    answer = client.get("/health/ready").json()
    assert answer["status"] == "degraded"
    assert "refuse" in answer["checks"]["workers"]["detail"]


def test_workers_not_seen_for_long_do_not_count(both: Both) -> None:
    client, world = both
    with world.database.session() as session:
        register_worker(session, "w1", host="h", queue="pare", facts={})
        session.execute(text("UPDATE workers SET seen_at = '2020-01-01 00:00:00.000000+00'"))
    assert client.get("/health/ready").json()["status"] == "degraded"
    assert client.get("/v1/workers").json()["items"] == []


def test_broken_storage_is_unavailable(client: TestClient, tmp_path: Path) -> None:
    (tmp_path / "store" / "incoming").rmdir()
    answer = client.get("/health/ready")
    assert (answer.status_code, answer.json()["status"]) == (503, "unavailable")
    assert answer.json()["checks"]["storage"]["ok"] is False
    assert answer.json()["checks"]["database"]["ok"] is True
    assert str(tmp_path) not in answer.text


def test_a_part_that_hangs_is_told_of_in_time_and_holds_one_thread(app: FastAPI, client: TestClient) -> None:
    service: Service = app.state.service
    answers = threading.Event()
    stuck = cast(Storage, SimpleNamespace(ping=lambda: answers.wait(30)))
    app.state.service = replace(service, storage=stuck, probes=Probes(patience_seconds=0.2))
    for _ in range(3):
        answer = client.get("/health/ready").json()
        assert (answer["status"], answer["checks"]["storage"]["ok"]) == ("unavailable", False)
        assert client.get("/health/live").json() == {"status": "ok"}
    assert [thread.name for thread in threading.enumerate()].count("probe-storage") == 1
    answers.set()
    wait_until(lambda: client.get("/health/ready").json()["checks"]["storage"]["ok"])


def test_techniques_bring_schema_and_defaults(client: TestClient) -> None:
    items = {item["kind"]: item for item in client.get("/v1/techniques").json()["items"]}
    assert {"prune_structured", "prune_magnitude", "finetune", "quantize_int8"} <= set(items)
    magnitude = items["prune_magnitude"]
    assert magnitude["defaults"].items() >= {"sparsity": 0.5, "scope": "global", "skip_layers": []}.items()
    assert magnitude["schema"]["properties"]["sparsity"]["exclusiveMaximum"] == 1
    assert (magnitude["family"], magnitude["needs"], magnitude["leaves"]) == ("pruning", "none", "module")
    assert items["finetune"]["needs"] == "labels" or items["finetune"]["needs"] == "inputs"
    assert items["quantize_int8"]["leaves"] == "integer"
