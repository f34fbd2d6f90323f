"""The composed service from outside: a job over HTTP survives the death of its worker's container."""

import hashlib
import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy
import onnxruntime
import pytest
import torch
from sklearn.datasets import load_digits

from tests.docker.composed import START_SECONDS, Stack, call, wait_for

pytestmark = pytest.mark.docker

SERVICES = ("postgres", "broker", "api", "dispatcher", "worker")
# A lease must run out (30 s), then the other worker does all the work again.
JOB_SECONDS = 600.0


@pytest.fixture(scope="module")
def client(stack: Stack) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=stack.url, timeout=60) as client:
        wait_until_ready(client)
        assert client.get("/v1/jobs").status_code == 401
        (api,) = stack.containers("api")
        command = ("python", "-m", "app.access", "create", "--owner", "tester", "--scopes", "read,write,admin")
        client.headers["Authorization"] = f"Bearer {stack.execute(api, *command).strip()}"
        yield client


def wait_until_ready(client: httpx2.Client) -> None:
    def look() -> bool | None:
        try:
            answer = client.get("/health/ready")
        except httpx2.TransportError:
            return None
        return True if answer.status_code == 200 and answer.json()["status"] == "ready" else None

    wait_for("the service is ready", START_SECONDS, look)


def export_classifier() -> bytes:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 32, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.Conv2d(32, 64, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(64, 10),
    )
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(model, (torch.zeros(2, 1, 8, 8),), dynamic_shapes=({0: batch},))
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def save_digits() -> bytes:
    digits = load_digits()
    file = io.BytesIO()
    images = digits.images[:, None].astype(numpy.float32) / 16
    numpy.savez(file, image=images, label=digits.target.astype(numpy.int64))
    return file.getvalue()


def upload(client: httpx2.Client, noun: str, format: str, content: bytes) -> dict[str, Any]:
    answer = client.post(f"/v1/{noun}", params={"name": "digits", "format": format}, content=content)
    assert answer.status_code == 201, answer.text
    location = answer.headers["location"]

    def look() -> dict[str, Any] | None:
        found: dict[str, Any] = client.get(location).json()
        return found if found["state"] != "checking" else None

    found = wait_for(f"the check of {noun}", 120, look)
    assert found["state"] == "ready", found
    return found


def read_job(client: httpx2.Client, job_id: str) -> dict[str, Any]:
    answer = client.get(f"/v1/jobs/{job_id}")
    assert answer.status_code == 200, answer.text
    job: dict[str, Any] = answer.json()
    return job


def find_busy_worker(stack: Stack) -> str | None:
    """Return the container in which an engine works, told by the processor time it uses; None while it is not clear."""
    containers = stack.containers("worker")
    before = [read_cpu_seconds(stack, container) for container in containers]
    time.sleep(2)
    used = [read_cpu_seconds(stack, container) - start for container, start in zip(containers, before, strict=True)]
    ranked = sorted(zip(used, containers, strict=True), reverse=True)
    return ranked[0][1] if ranked[0][0] > 0.5 and ranked[0][0] > 2 * ranked[1][0] else None


def read_cpu_seconds(stack: Stack, container: str) -> float:
    """Return the processor time of all processes that live in a container."""
    code = (
        "from pathlib import Path; "
        "stats = [path.read_text().rsplit(')', 1)[1].split() for path in Path('/proc').glob('[0-9]*/stat')]; "
        "print(sum(int(stat[11]) + int(stat[12]) for stat in stats))"
    )
    return int(stack.execute(container, "python", "-c", code)) / 100


def test_containers_are_hardened(stack: Stack, client: httpx2.Client) -> None:
    assert client.get("/health/live").status_code == 200
    for service in SERVICES:
        for container in stack.containers(service):
            facts = stack.inspect(container)
            host = facts["HostConfig"]
            assert host["ReadonlyRootfs"], service
            assert host["CapDrop"] == ["ALL"], service
            assert not host["CapAdd"], service
            assert not host["Privileged"], service
            assert any(option.startswith("no-new-privileges") for option in host["SecurityOpt"]), service
            assert stack.execute(container, "id", "-u").strip() != "0", service
            assert host["Memory"] > 0, service
            assert host["PidsLimit"] > 0, service


def test_only_the_api_is_published_and_only_on_loopback(stack: Stack) -> None:
    for service in SERVICES:
        for container in stack.containers(service):
            ports = stack.inspect(container)["NetworkSettings"]["Ports"] or {}
            published = [binding for bindings in ports.values() for binding in bindings or []]
            assert {binding["HostIp"] for binding in published} == ({"127.0.0.1"} if service == "api" else set())


def test_workers_isolate_their_engines(client: httpx2.Client) -> None:
    def look() -> list[dict[str, Any]] | None:
        workers: list[dict[str, Any]] = client.get("/v1/workers").json()["items"]
        return workers if len(workers) == 2 else None

    for worker in wait_for("both workers are there", 60, look):
        facts = worker["facts"]
        assert {"bubblewrap", "pid_namespace", "network_namespace", "landlock", "seccomp"} <= set(facts["isolation"])
        assert worker["accepts_jobs"] is True


def test_job_survives_the_death_of_its_workers_container(stack: Stack, client: httpx2.Client, tmp_path: Path) -> None:
    model = upload(client, "models", "pt2", export_classifier())
    dataset = upload(client, "datasets", "npz", save_digits())
    input_name = model["facts"]["inputs"][0]["name"]
    recipe = {
        "steps": [
            {"kind": "prune_structured", "ratio": 0.5},
            {"kind": "finetune", "epochs": 100, "batch_size": 32, "learning_rate": 0.003},
            {"kind": "quantize_int8", "mode": "static"},
        ],
        "data": {
            "dataset_id": dataset["id"],
            "inputs": {input_name: {"column": "image"}},
            "label_column": "label",
            "task": "classification",
        },
    }
    answer = client.post("/v1/jobs", json={"model_id": model["id"], "recipe": recipe})
    assert answer.status_code == 202, answer.text
    job_id = answer.json()["id"]

    def training() -> dict[str, Any] | None:
        job = read_job(client, job_id)
        assert job["status"] in ("queued", "running"), job
        return job if "finetune" in (job["stage"] or "") else None

    wait_for("the job trains", 180, training)
    victim = wait_for("one worker is busy", 60, lambda: find_busy_worker(stack))
    call("docker", "kill", "--signal", "KILL", victim)
    killed = read_job(client, job_id)
    assert killed["status"] == "running", f"the worker was killed too late for this test: {killed}"
    assert killed["attempt"] == 1

    def ended() -> dict[str, Any] | None:
        job = read_job(client, job_id)
        return job if job["status"] in ("succeeded", "failed", "cancelled") else None

    job = wait_for("the job ends", JOB_SECONDS, ended)
    assert job["status"] == "succeeded", job
    assert job["attempt"] == 2
    assert "bubblewrap" in job["isolation"]

    events = client.get(f"/v1/jobs/{job_id}/events", params={"limit": 200}).json()["items"]
    states = [event["data"]["state"] for event in events if event["kind"] == "state"]
    assert states == ["queued", "running", "queued", "running", "succeeded"]

    metrics = client.get(f"/v1/jobs/{job_id}/metrics").json()
    assert metrics["result"]["file_bytes"] < metrics["baseline"]["file_bytes"]
    artifacts = client.get(f"/v1/jobs/{job_id}/artifacts").json()["items"]
    for artifact in artifacts:
        content = client.get(f"/v1/artifacts/{artifact['id']}").content
        assert len(content) == artifact["size_bytes"]
        assert hashlib.sha256(content).hexdigest() == artifact["sha256"]
        (tmp_path / Path(artifact["name"]).name).write_bytes(content)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    digits = load_digits()
    images = digits.images[:, None].astype(numpy.float32) / 16
    scores = numpy.asarray(session.run(None, {session.get_inputs()[0].name: images})[0])
    assert (scores.argmax(axis=1) == digits.target).mean() > 0.8
