"""Every parallel plan over HTTP: a rank is killed, the job goes on, and ends with the weights of one process."""

import os
import shutil
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from tests.engine.digits import Rows
from tests.worker.served import Service, open_service

TOLERANCE = 1e-4
"""Of every tensor's norm, after two hundred steps: sums in another order."""
TRAINING: dict[str, Any] = {
    "epochs": 10, "batch_size": 64, "optimizer": "sgd", "learning_rate": 0.01, "keep_best": False,
}  # fmt: skip
PLANS = [{"data": 2}, {"data": 2, "shard": True}, {"tensor": 2}, {"pipeline": 2}]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with open_service(Rows(), tmp_path_factory.mktemp("service"), PARE_CHECKPOINT_SECONDS="0.2") as service:
        yield service


@pytest.fixture(scope="module")
def expected(service: Service) -> dict[str, Tensor]:
    """Return the weights that one process leaves."""
    job_id = service.submit("safetensors", **TRAINING)
    job = service.wait(job_id)
    assert job["status"] == "succeeded", job["error"]
    return load(service.artifact(job_id, "model.safetensors"))


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_killed_rank_changes_nothing(plan: dict[str, Any], service: Service, expected: dict[str, Tensor]) -> None:
    job_id = service.submit("safetensors", **TRAINING, parallel=plan)
    job = service.wait(job_id, for_checkpoint=True)
    assert job["status"] == "running", job["error"]
    (rank,) = service.ranks()

    os.kill(rank, signal.SIGKILL)

    job = service.wait(job_id)
    assert (job["status"], job["attempt"]) == ("succeeded", 2), job["error"]
    assert job["resumed_from"]["stage"] == "finetune"
    told = [data for data in service.events(job_id, "state") if "reason" in data]
    (loss,) = told  # one failure, one retry
    assert (loss["state"], loss["reason"], loss["detail"]) == (
        "queued", "rank_lost", "rank 1 of 2 was killed by signal 9"
    )  # fmt: skip
    facts = service.facts(job_id)
    assert (facts["ranks"], facts["epochs_run"]) == (2, TRAINING["epochs"])
    assert service.ranks() == []
    found = load(service.artifact(job_id, "model.safetensors"))
    assert found.keys() == expected.keys()
    apart = {name: float((found[name] - each).norm() / each.norm()) for name, each in expected.items()}
    assert max(apart.values()) < TOLERANCE, apart


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_hung_rank_ends_by_the_deadline_and_the_job_goes_on(service: Service, expected: dict[str, Tensor]) -> None:
    job_id = service.submit("safetensors", **TRAINING, parallel={"data": 2, "timeout_seconds": 3})
    assert service.wait(job_id, for_checkpoint=True)["status"] == "running"
    (rank,) = service.ranks()

    os.kill(rank, signal.SIGSTOP)

    job = service.wait(job_id)
    assert (job["status"], job["attempt"]) == ("succeeded", 2), job["error"]
    told = [data["reason"] for data in service.events(job_id, "state") if "reason" in data]
    assert told == ["rank_stuck"]
    found = load(service.artifact(job_id, "model.safetensors"))
    assert all(torch.allclose(found[name], each, rtol=1e-3, atol=1e-5) for name, each in expected.items())


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_a_compiled_job_ends_where_the_others_do(service: Service, expected: dict[str, Tensor]) -> None:
    job_id = service.submit("safetensors", **TRAINING, compile=True)
    job = service.wait(job_id)
    assert job["status"] == "succeeded", job["error"]
    found = load(service.artifact(job_id, "model.safetensors"))
    apart = {name: float((found[name] - each).norm() / each.norm()) for name, each in expected.items()}
    assert 0 < max(apart.values()) < TOLERANCE, apart
