"""A distillation of digits, from uploads over HTTP through the real engine in its sandbox to the report."""

from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.engine.digits import Convolutions, make_uploads
from tests.worker.real_service import real_service


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_distillation_of_digits_ends_with_a_student_that_loads_and_a_fair_comparison(
    sqlite_url: str, tmp_path: Path
) -> None:
    uploads = make_uploads(Convolutions(), tmp_path, epochs=1)
    with real_service(tmp_path, sqlite_url) as service:
        model = service.upload("/v1/models?format=pt2", uploads.model)
        dataset = service.upload("/v1/datasets?format=npz", uploads.data)
        job = start(service.client, model, dataset)
        service.work()
        check(service.client, job)


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
