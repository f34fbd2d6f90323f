"""A job with a parallel plan over HTTP: the service as users start it, a real worker, processes that die."""

from collections.abc import Iterator

import pytest

from tests.engine.digits import Convolutions
from tests.worker.conftest import wait_until
from tests.worker.served import Service, open_service
from worker.sandbox.detect import detect


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    if not detect("auto").isolates:
        pytest.skip("nothing isolates on this machine")
    with open_service(Convolutions(), tmp_path_factory.mktemp("service")) as service:
        yield service


@pytest.mark.timeout(900)
@pytest.mark.long
def test_two_processes_fine_tune_and_the_metrics_say_so(service: Service) -> None:
    job_id = service.submit(max_steps=20, parallel={"data": 2})

    job = service.wait(job_id)

    assert (job["status"], job["attempt"]) == ("succeeded", 1), job["error"]
    assert job["needs"] == {"device": "cpu", "num_devices": 0, "memory_bytes": 2 * 2**30, "num_threads": 2}
    facts = service.facts(job_id)
    assert (facts["parallel"], facts["ranks"], facts["steps_run"]) == ("data 2", 2, 20)
    assert facts["steps_per_second"] > 0
    assert 0 < facts["communication_share"] < 1
    assert len(facts["memory_per_rank"].split(",")) == 2
    told = [data["message"] for data in service.events(job_id, "progress")]
    assert "starting 2 processes: data 2" in told, "what a rank takes to start is no silence"
    assert service.ranks() == []


@pytest.mark.timeout(900)
def test_a_cancel_ends_every_process(service: Service) -> None:
    job_id = service.submit(epochs=1000, batch_size=64, parallel={"data": 2})
    assert service.wait(job_id, for_checkpoint=True)["status"] == "running"
    assert len(service.ranks()) == 1

    service.client.post(f"/v1/jobs/{job_id}/cancel")

    assert service.wait(job_id)["status"] == "cancelled"
    wait_until(lambda: service.ranks() == [], 5, "the end of the ranks")
