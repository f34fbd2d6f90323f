"""A distillation of digits, from uploads over HTTP through the real engine in its sandbox to the report."""

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from starlette.testclient import TestClient

from app.db.session import Database
from app.db.tables import JobRow
from app.jobs import State, advance_parents
from app.main import create_app
from app.settings import Settings
from app.storage import open_storage
from tests.engine.digits import Convolutions, make_uploads
from worker.settings import WorkerSettings
from worker.slot import Slot, open_slot


def work(slot: Slot, database: Database, settings: Settings) -> None:
    """Run waiting jobs, as a worker would, and let parents go on, as the dispatcher would, until nothing is left."""
    storage = open_storage(settings.storage_url)
    for _ in range(40):
        with database.read() as session:
            waiting = list(session.scalars(select(JobRow.id).where(JobRow.state == State.QUEUED)))
        for job_id in waiting:
            slot.supervisor.run(job_id)
        if not advance_parents(database, settings, storage) and not waiting:
            return
    raise AssertionError("the work never ends")


def upload(client: TestClient, path: str, file: Path) -> str:
    answer = client.post(path, content=file.read_bytes())
    assert answer.status_code == 201, answer.text
    found: str = answer.json()["id"]
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_distillation_of_digits_ends_with_a_student_that_loads_and_a_fair_comparison(
    sqlite_url: str, tmp_path: Path
) -> None:
    settings = Settings(data_dir=tmp_path, database_url=sqlite_url, engine_threads=1)
    uploads = make_uploads(Convolutions(), tmp_path, epochs=1)
    database, slot = Database(sqlite_url), open_slot(settings, WorkerSettings())
    try:
        with TestClient(create_app(settings)) as client:
            model = upload(client, "/v1/models?format=pt2", uploads.model)
            dataset = upload(client, "/v1/datasets?format=npz", uploads.data)
            work(slot, database, settings)
            job = start(client, model, dataset)
            work(slot, database, settings)
            check(client, job)
    finally:
        slot.close()
        database.dispose()


def start(client: TestClient, model: str, dataset: str) -> str:
    distillation: dict[str, Any] = {
        "teacher_training": {"kind": "finetune", "epochs": 1},
        "student": {"kind": "derive_student", "width": 0.25},
        "training": {"kind": "distill", "epochs": 2, "learning_rate": 0.005},
        "tuning": {"num_trials": 2, "reduction": 2, "temperature": [2.0], "label_weight": []},
        "data": {
            "dataset_id": dataset, "inputs": {"image": {"column": "image", "scale": 1 / 16}}, "label_column": "label",
            "task": "classification",
        },
        "target": {"num_runs": 10},
    }  # fmt: skip
    answer = client.post("/v1/distillations", json={"model_id": model, "distillation": distillation})
    assert answer.status_code == 202, answer.text
    job: str = answer.json()["id"]
    return job


def check(client: TestClient, job: str) -> None:
    shown = client.get(f"/v1/jobs/{job}").json()
    assert shown["status"] == "succeeded", shown["error"]
    metrics = client.get(f"/v1/jobs/{job}/metrics").json()
    table = {each["name"]: each for each in metrics["distillation"]["candidates"]}
    assert list(table) == ["teacher", "student_alone", "student"]
    assert table["student"]["parameters"] == table["student_alone"]["parameters"] < 0.3 * table["teacher"]["parameters"]
    assert table["teacher"]["quality"]["value"] > 0.8
    assert table["student"]["quality"]["value"] > 0.5
    assert {each["quality"]["num_examples"] for each in table.values()} == {359}
    assert {trial["outcome"] for trial in metrics["distillation"]["trials"]} == {"chosen", "stopped"}
    artifacts = {each["name"]: each for each in client.get(f"/v1/jobs/{job}/artifacts").json()["items"]}
    assert {"model.onnx", "model.pt2", "teacher.pt2", "load.py", "report.md"} <= set(artifacts)
    report = client.get(artifacts["report.md"]["links"]["self"]).text
    assert "| student with teacher | accuracy" in report
