"""GET /metrics: what a scraper reads is what stands in the database and what the process answered."""

from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import update
from starlette.testclient import TestClient

from app.db.clock import db_now
from app.db.tables import JobRow
from app.jobs import register_worker
from app.jobs.dispatchers import touch_dispatcher
from tests.app.jobs.test_finish import METRICS, succeed
from tests.app.jobs.world import REFUSAL, World

Both = tuple[TestClient, World]


def scrape(client: TestClient) -> dict[tuple[str, ...], float]:
    """Return every sample by its name and the values of its labels, in the order of the labels' names."""
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_queue_by_device_with_the_age_of_the_oldest(both: Both) -> None:
    client, world = both
    old, _ = world.submit(), world.submit()
    world.start()
    with world.database.session() as session:
        session.execute(update(JobRow).where(JobRow.id == old).values(created_at=db_now(-500)))
    found = scrape(client)
    assert (found["pare_jobs_waiting", "cpu"], found["pare_jobs_waiting", "gpu"]) == (2, 0)
    assert (found["pare_jobs_running", "cpu"], found["pare_jobs_running", "gpu"]) == (1, 0)
    assert 500 <= found["pare_oldest_waiting_seconds", "cpu"] < 600
    assert found["pare_oldest_waiting_seconds", "gpu"] == 0
    assert found["pare_hints_unsent",] == 3


def test_ends_of_jobs_by_code_and_time_by_technique(both: Both) -> None:
    client, world = both
    step = {"kind": "prune_magnitude", "seconds": 2.5}
    done = world.start()
    assert succeed(world, done)
    with world.database.session() as session:
        metrics = {**METRICS.model_dump(mode="json"), "steps": [step, step]}
        session.execute(update(JobRow).where(JobRow.id == done.job_id).values(metrics=metrics))
    world.fail(world.start(), REFUSAL)
    long_ago = world.start()
    world.fail(long_ago, REFUSAL)
    with world.database.session() as session:
        session.execute(update(JobRow).where(JobRow.id == long_ago.job_id).values(finished_at=db_now(-7200)))
    found = scrape(client)
    assert found["pare_recent_jobs", "optimize", "", "succeeded"] == 1
    assert found["pare_recent_jobs", "optimize", "step_failed", "failed"] == 1
    assert found["pare_recent_step_seconds", "prune_magnitude"] == 5.0
    assert found["pare_recent_steps", "prune_magnitude"] == 2


def test_workers_their_gpus_and_dispatchers(both: Both) -> None:
    client, world = both
    gpu = {"index": 0, "name": "H100", "memory_bytes": 85_899_345_920, "uuid": None}
    silent = {"index": 1, "name": "declared", "memory_bytes": None, "uuid": None}
    with world.database.session() as session:
        register_worker(session, "w1", host="h", queue="pare", facts={"accepts_jobs": True, "devices": [gpu, silent]})
        register_worker(session, "w2", host="h", queue="pare", facts={"accepts_jobs": False})
        touch_dispatcher(session, "d1", broker_answers=True)
        touch_dispatcher(session, "d2", broker_answers=False)
    world.start(worker_id="w1")
    found = scrape(client)
    assert [found[f"pare_workers{name}",] for name in ("", "_accepting", "_busy")] == [2, 1, 1]
    memory = {key[1:]: value for key, value in found.items() if key[0] == "pare_gpu_memory_bytes"}
    assert memory == {("0", "H100", "w1"): 85_899_345_920}
    assert (found["pare_dispatchers",], found["pare_dispatchers_reaching_broker",]) == (2, 1)


def test_stored_bytes_by_kind(both: Both) -> None:
    client, world = both
    assert succeed(world, world.start())
    found = scrape(client)
    assert found["pare_stored_bytes", "models"] == 10
    assert found["pare_stored_bytes", "artifacts"] == 1234
    assert found["pare_stored_bytes", "datasets"] == 0


def test_requests_by_route_and_never_by_what_a_client_makes_up(client: TestClient, world: World) -> None:
    job_id = world.submit()
    for _ in range(3):
        client.get(f"/v1/jobs/{job_id}")
    client.head(f"/v1/jobs/{job_id}")
    client.get("/v1/jobs/job_" + "a" * 26)
    client.get("/made-up/1")
    client.get("/made-up/2")
    client.request("BREW", "/v1/jobs")
    found = scrape(client)
    route = "/v1/jobs/{job_id}"
    assert found["pare_http_requests_total", "GET", route, "200"] == 3
    assert found["pare_http_requests_total", "HEAD", route, "200"] == 1
    assert found["pare_http_requests_total", "GET", route, "404"] == 1
    assert found["pare_http_requests_total", "GET", "unmatched", "404"] == 2
    assert found["pare_http_request_seconds_count", "GET", route] == 4
    labels = {value for key in found for value in key[1:]}
    assert not [value for value in labels if "made-up" in value or value == "BREW" or job_id in value]


def test_two_applications_count_for_themselves(client: TestClient) -> None:
    assert scrape(client)["pare_workers",] == 0
    assert scrape(client)["pare_http_requests_total", "GET", "/metrics", "200"] == 1


def test_without_a_database_it_is_503(client: TestClient, world: World) -> None:
    with world.database.session() as session:
        session.connection().exec_driver_sql("ALTER TABLE jobs RENAME TO gone")
    assert client.get("/metrics").status_code == 503
