"""The service as users start it, with `pare serve`'s own code in a process of its own, and digits in it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from torch import nn

from tests.engine.digits import make_uploads
from tests.worker.conftest import find_descendants
from tests.worker.serving import clean_environment, serve

TIMEOUT_SECONDS = 400
RANK = "worker.engine.parallel.rank"
TERMINAL = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True)
class Service:
    """A running service with a model and digits in it."""

    pid: int
    client: httpx2.Client
    model_id: str
    dataset_id: str

    def submit(self, *formats: str, **step: Any) -> str:
        """Submit a job that fine-tunes; return its id."""
        recipe = {
            "steps": [{"kind": "finetune", **step}],
            "data": {
                "dataset_id": self.dataset_id, "inputs": {"image": {"column": "image", "scale": 1 / 16}},
                "label_column": "label", "task": "classification",
            },
            "target": {"runtime": "torch", "num_runs": 10},
            "outputs": {"formats": ["pt2", *formats]},
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
        """Return what the job's events of a kind say."""
        items = self.client.get(f"/v1/jobs/{job_id}/events?limit=1000").json()["items"]
        return [event["data"] for event in items if event["kind"] == kind]

    def facts(self, job_id: str) -> dict[str, Any]:
        """Return the facts of the only step."""
        (step,) = self.client.get(f"/v1/jobs/{job_id}/metrics").json()["steps"]
        found: dict[str, Any] = step["facts"]
        return found

    def artifact(self, job_id: str, name: str) -> bytes:
        """Return a file that the job made."""
        items = self.client.get(f"/v1/jobs/{job_id}/artifacts").json()["items"]
        (link,) = [each["links"]["self"] for each in items if each["name"] == name]
        return self.client.get(link).content

    def ranks(self) -> list[int]:
        """Return the processes of all ranks but the engines themselves."""
        return find_descendants(self.pid, RANK)


@contextmanager
def open_service(module: nn.Module, directory: Path, **settings: str) -> Iterator[Service]:
    """Within it, the service runs; `settings` are environment variables."""
    uploads = make_uploads(module, directory, epochs=0)
    ours = {"PARE_CHECKPOINT_SECONDS": "0.5", "PARE_ENGINE_THREADS": "2"}
    with (
        serve(clean_environment(**(ours | settings)), directory) as serving,
        httpx2.Client(base_url=serving.url, timeout=60) as client,
    ):
        model, dataset = (
            str(client.post(path, content=file.read_bytes()).json()["id"])
            for path, file in (("/v1/models?format=pt2", uploads.model), ("/v1/datasets?format=npz", uploads.data))
        )
        end = time.monotonic() + TIMEOUT_SECONDS
        for path in (f"/v1/models/{model}", f"/v1/datasets/{dataset}"):
            while client.get(path).json()["state"] != "ready":
                assert time.monotonic() < end, client.get(path).text
                time.sleep(0.2)
        yield Service(serving.pid, client, model, dataset)
