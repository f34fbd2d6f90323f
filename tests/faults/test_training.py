"""All of it in one: upload, HTTP, dispatcher, Celery worker, the real engine that trains, kill -9, the same weights."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from app.db.tables import EventRow
from tests.engine.digits import Convolutions, make_uploads
from tests.faults.cases_jobs import engines_of
from tests.faults.stack import Stack, open_stack

MODEL_FORMATS = ["onnx", "pt2", "safetensors"]
PATIENCE_SECONDS = 240.0


def upload(stack: Stack, path: str, file: Path, **query: str) -> str:
    """Upload a file and wait until the real engine has checked it."""
    answer = stack.client.post(path, content=file.read_bytes(), params={"name": file.name, **query})
    assert answer.status_code == 201, answer.text
    place = f"{path}/{answer.json()['id']}"
    stack.wait_until(lambda: stack.client.get(place).json()["state"] != "checking", f"the check of {file.name}")
    assert stack.client.get(place).json()["state"] == "ready", stack.client.get(place).text
    return str(answer.json()["id"])


def submit(stack: Stack, model_id: str, dataset_id: str) -> str:
    recipe: dict[str, Any] = {
        "steps": [
            {"kind": "prune_magnitude", "sparsity": 0.5},
            {"kind": "finetune", "epochs": 12, "batch_size": 256},  # long enough to be met while it runs
        ],
        "data": {
            "dataset_id": dataset_id,
            "inputs": {"image": {"column": "image", "scale": 1 / 16}},
            "label_column": "label",
            "task": "classification",
        },
        "target": {"num_runs": 10},
        "outputs": {"formats": MODEL_FORMATS},
        "seed": 11,
    }
    answer = stack.post_job(model_id, recipe=recipe)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def weights_of(stack: Stack, job_id: str) -> dict[str, str]:
    """Return name -> SHA-256 of the model's files, as the API tells."""
    listed = stack.client.get(f"/v1/jobs/{job_id}/artifacts").json()["items"]
    return {each["name"]: each["sha256"] for each in listed if each["name"].startswith("model.")}


def count_checkpoints(stack: Stack, job_id: str) -> int:
    with stack.bench.database.read() as session:
        events = session.scalars(select(EventRow).where(EventRow.job_id == job_id, EventRow.kind == "checkpoint"))
        return sum(event.data["stage"] == "finetune" for event in events)


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_killed_training_ends_with_the_weights_of_an_undisturbed_one(sqlite_url: str, tmp_path: Path) -> None:
    (tmp_path / "uploads").mkdir()
    files = make_uploads(Convolutions(), tmp_path / "uploads", epochs=1)
    real: dict[str, Any] = {
        "lease_seconds": 30, "heartbeat_seconds": 5, "worker_seen_seconds": 30, "checkpoint_seconds": 0,
        "engine_memory_bytes": 8 * 2**30, "engine_threads": 1,
    }  # fmt: skip
    with open_stack(tmp_path, sqlite_url, patience=PATIENCE_SECONDS, real_engine=True, **real) as stack:
        stack.start_api()
        stack.start("worker.dispatch")
        stack.start(PARE_WORKER_STANDBY="false")
        model_id = upload(stack, "/v1/models", files.model, format="pt2")
        dataset_id = upload(stack, "/v1/datasets", files.data, format="npz")
        undisturbed = submit(stack, model_id, dataset_id)
        assert stack.wait(undisturbed).state == "succeeded", stack.read(undisturbed).error

        killed = submit(stack, model_id, dataset_id)
        stack.wait_until(lambda: count_checkpoints(stack, killed) >= 3, "checkpoints inside the training")
        for process in engines_of(stack):
            os.kill(process, signal.SIGKILL)

        job = stack.wait(killed)
        assert (job.state, job.attempt) == ("succeeded", 2), job.error
        assert job.resumed_from is not None
        assert job.resumed_from["stage"] == "finetune"
        assert sorted(weights_of(stack, killed)) == [f"model.{each}" for each in MODEL_FORMATS]
        assert weights_of(stack, killed) == weights_of(stack, undisturbed)
        stack.check()
