"""Compiled packages over HTTP: the service as users start it, the compiler inside the sandbox."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.digits import Rows
from tests.worker.conftest import find_descendants, wait_until
from tests.worker.served import Service, open_service
from worker.sandbox.detect import detect

COMPILER = "cc1plus"
pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    if not detect("auto").isolates:
        pytest.skip("nothing isolates on this machine")
    with open_service(Rows(), tmp_path_factory.mktemp("service")) as service:
        yield service


def submit(service: Service, **step: Any) -> str:
    recipe = {"steps": [step], "target": {"runtime": "aotinductor", "num_runs": 10}}
    answer = service.client.post("/v1/jobs", json={"model_id": service.model_id, "recipe": recipe})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_integers_are_compiled_measured_and_load_alone(service: Service, tmp_path: Path, mode: str) -> None:
    job = service.wait(submit(service, kind="quantize_int8", mode=mode))

    assert job["status"] == "succeeded", job["error"]
    items = service.client.get(f"/v1/jobs/{job['id']}/artifacts").json()["items"]
    for item in items:
        (tmp_path / item["name"]).write_bytes(service.client.get(item["links"]["self"]).content)
    done = subprocess.run(
        [sys.executable, "-I", str(tmp_path / "load.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["model.aoti.pt2", "model.pt2"]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["metrics"]["environment"]["runtime"] == "aotinductor"
    for side in ("baseline", "result"):
        assert manifest["metrics"][side]["peak_memory_bytes"] > 0
    assert manifest["metrics"]["result"]["file_bytes"] == (tmp_path / "model.aoti.pt2").stat().st_size


def test_the_same_job_compiles_the_same_bytes(service: Service) -> None:
    step = {"kind": "prune_magnitude", "sparsity": 0.5}
    digests = set()
    for _ in range(2):
        job = service.wait(submit(service, **step))
        assert job["status"] == "succeeded", job["error"]
        digests.add(hashlib.sha256(service.artifact(job["id"], "model.aoti.pt2")).hexdigest())
    assert len(digests) == 1


def test_a_cancel_while_compiling_leaves_no_process(service: Service) -> None:
    job_id = submit(service, kind="prune_magnitude")
    wait_until(lambda: find_descendants(service.pid, COMPILER), 120, "the compiler")

    service.client.post(f"/v1/jobs/{job_id}/cancel")

    assert service.wait(job_id)["status"] == "cancelled"
    wait_until(lambda: find_descendants(service.pid, COMPILER) == [], 10, "the end of the compiler")
