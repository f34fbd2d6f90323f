"""The service as users start it, with `pare serve`'s own code in a process of its own, and digits in it."""

import os
import re
import subprocess
import sys
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

START = "import sys; from pathlib import Path; from worker.serve import serve; serve('127.0.0.1', 0, Path(sys.argv[1]))"
TIMEOUT_SECONDS = 400
RANK = "worker.engine.parallel.rank"
TERMINAL = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True)
class Service:
    """A running service with a model and digits in it."""

    process: "subprocess.Popen[str]"
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
        return find_descendants(self.process.pid, RANK)


@contextmanager
def open_service(module: nn.Module, directory: Path, **settings: str) -> Iterator[Service]:
    """Within it, the service runs; `settings` are environment variables."""
    uploads = make_uploads(module, directory, epochs=0)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PARE_")}
    process = subprocess.Popen(
        [sys.executable, "-c", START, str(directory / "data")],
        stdout=subprocess.PIPE,
        text=True,
        env={**environment, "PARE_CHECKPOINT_SECONDS": "0.5", "PARE_ENGINE_THREADS": "2", **settings},
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
