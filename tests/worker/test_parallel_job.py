"""A job with a parallel plan over HTTP: the service as users start it, a real worker, processes that die."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest

from tests.engine.digits import Convolutions, make_uploads
from tests.worker.conftest import find_descendants
from worker.sandbox.detect import detect

START = "import sys; from pathlib import Path; from worker.serve import serve; serve('127.0.0.1', 0, Path(sys.argv[1]))"
TIMEOUT_SECONDS = 400
RANK = "worker.engine.parallel.rank"
TERMINAL = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True)
class Service:
    """A running service with digits in it."""

    process: "subprocess.Popen[str]"
    client: httpx2.Client
    model_id: str
    dataset_id: str

    def submit(self, **step: Any) -> str:
        recipe = {
            "steps": [{"kind": "finetune", **step}],
            "data": {
                "dataset_id": self.dataset_id, "inputs": {"image": {"column": "image", "scale": 1 / 16}},
                "label_column": "label", "task": "classification",
            },
            "target": {"runtime": "torch", "num_runs": 10},
            "outputs": {"formats": ["pt2"]},
        }  # fmt: skip
        answer = self.client.post("/v1/jobs", json={"model_id": self.model_id, "recipe": recipe})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def wait(self, job_id: str, *, for_checkpoint: bool = False) -> dict[str, Any]:
        """Return the job once it is over, or has a checkpoint."""
        end = time.monotonic() + TIMEOUT_SECONDS
        while time.monotonic() < end:
            job: dict[str, Any] = self.client.get(f"/v1/jobs/{job_id}").json()
            if job["status"] in TERMINAL or (for_checkpoint and job["checkpoint"] is not None):
                return job
            time.sleep(0.1)
        raise AssertionError(f"{job}")

    def events(self, job_id: str, kind: str) -> list[dict[str, Any]]:
        items = self.client.get(f"/v1/jobs/{job_id}/events?limit=1000").json()["items"]
        return [event["data"] for event in items if event["kind"] == kind]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    if not detect("auto").isolates:
        pytest.skip("nothing isolates on this machine")
    directory = tmp_path_factory.mktemp("service")
    uploads = make_uploads(Convolutions(), directory, epochs=0)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PARE_")}
    process = subprocess.Popen(
        [sys.executable, "-c", START, str(directory / "data")],
        stdout=subprocess.PIPE,
        text=True,
        env={**environment, "PARE_CHECKPOINT_SECONDS": "0.5", "PARE_ENGINE_THREADS": "2"},
    )
    try:
        assert process.stdout is not None
        found = re.search(r"ready at (http://\S+) ", process.stdout.readline())
        assert found is not None
        with httpx2.Client(base_url=found[1], timeout=60) as client:
            model, dataset = (
                str(client.post(path, content=file.read_bytes()).json()["id"])
                for path, file in (
                    ("/v1/models?format=pt2", uploads.model),
                    ("/v1/datasets?format=npz", uploads.data),
                )
            )
            end = time.monotonic() + TIMEOUT_SECONDS
            for path in (f"/v1/models/{model}", f"/v1/datasets/{dataset}"):
                while client.get(path).json()["state"] != "ready":
                    assert time.monotonic() < end, client.get(path).text
                    time.sleep(0.2)
            yield Service(process, client, model, dataset)
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.mark.timeout(900)
def test_two_processes_fine_tune_and_the_metrics_say_so(service: Service) -> None:
    job_id = service.submit(max_steps=20, parallel={"data": 2})

    job = service.wait(job_id)

    assert (job["status"], job["attempt"]) == ("succeeded", 1), job["error"]
    assert job["needs"] == {"device": "cpu", "num_devices": 0, "memory_bytes": 2 * 2**30, "num_threads": 2}
    (step,) = service.client.get(f"/v1/jobs/{job_id}/metrics").json()["steps"]
    facts = step["facts"]
    assert (facts["parallel"], facts["ranks"], facts["steps_run"]) == ("data 2", 2, 20)
    assert facts["steps_per_second"] > 0
    assert 0 < facts["communication_share"] < 1
    assert len(facts["memory_per_rank"].split(",")) == 2
    assert find_descendants(service.process.pid, RANK) == []


@pytest.mark.timeout(900)
def test_a_job_goes_on_when_one_of_its_processes_is_killed(service: Service) -> None:
    job_id = service.submit(epochs=20, batch_size=64, parallel={"data": 2})
    job = service.wait(job_id, for_checkpoint=True)
    assert job["status"] == "running", job["error"]
    ranks = find_descendants(service.process.pid, RANK)
    assert len(ranks) == 1

    os.kill(ranks[0], signal.SIGKILL)

    job = service.wait(job_id)
    assert (job["status"], job["attempt"]) == ("succeeded", 2), job["error"]
    assert job["resumed_from"] is not None
    told = [data for data in service.events(job_id, "state") if "reason" in data]
    assert told == [{"state": "queued", "attempt": 1, "reason": "rank_lost"}], "one failure, one retry"
    (step,) = service.client.get(f"/v1/jobs/{job_id}/metrics").json()["steps"]
    assert (step["facts"]["ranks"], step["facts"]["epochs_run"]) == (2, 20)
    assert find_descendants(service.process.pid, RANK) == []
