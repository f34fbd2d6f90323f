"""A silent worker loses its job, by the clock of the database alone."""

import threading
import time

from app import jobs
from tests.app.jobs.world import World


def test_live_job_is_left_alone(world: World) -> None:
    claim = world.start(lease_seconds=30)
    assert world.reap() == []
    assert world.job(claim.job_id).state == "running"


def test_lease_runs_out_by_the_clock_of_the_database(world: World) -> None:
    claim = world.start(lease_seconds=0.3)
    with world.database.session() as session:
        jobs.heartbeat(session, claim.job_id, claim.epoch, 0.6)
    assert world.reap() == []
    time.sleep(0.7)
    assert world.reap() == [claim.job_id]


def test_lost_job_waits_again_until_attempts_are_used_up(world: World) -> None:
    job_id = world.submit()
    for attempt in (1, 2, 3):
        world.clear_outbox()
        assert world.start(job_id).attempt == attempt
        world.expire_lease(job_id)
        assert world.reap() == [job_id]
        assert world.outbox() == ([job_id] if attempt < 3 else [])
    job = world.job(job_id)
    assert (job.state, job.error["code"], job.error["retryable"]) == ("failed", "worker_lost", True)
    assert "w1" in job.error["detail"]
    assert job.finished_at is not None
    assert world.states(job_id) == ["queued", "running", "queued", "running", "queued", "running", "failed"]
    assert world.reap() == []


def test_lost_job_that_was_cancelled_does_not_wait_again(world: World) -> None:
    claim = world.start()
    world.cancel(claim.job_id)
    world.clear_outbox()
    world.expire_lease(claim.job_id)
    assert world.reap() == [claim.job_id]
    assert world.job(claim.job_id).state == "cancelled"
    assert world.outbox() == []


def test_upload_whose_check_is_lost_for_good_is_rejected(world: World) -> None:
    dataset_id = world.add_dataset("checking")
    job_id = world.check(dataset_id=dataset_id)
    for _ in range(3):
        world.start(job_id)
        world.expire_lease(job_id)
        world.reap()
    dataset = world.upload(dataset_id)
    assert (dataset.state, dataset.error["code"]) == ("rejected", "worker_lost")


def test_a_limit_bounds_one_round(world: World) -> None:
    claims = [world.start() for _ in range(3)]
    for claim in claims:
        world.expire_lease(claim.job_id)
    with world.database.session() as session:
        assert len(jobs.reap_expired(session, limit=2)) == 2
    assert len(world.reap()) == 1


def test_many_reapers_take_each_job_once(world: World) -> None:
    job_ids = {world.start().job_id for _ in range(12)}
    for job_id in job_ids:
        world.expire_lease(job_id)
    world.clear_outbox()
    reaped: list[str] = []
    barrier = threading.Barrier(4)

    def reap() -> None:
        barrier.wait()
        reaped.extend(world.reap())

    threads = [threading.Thread(target=reap) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(reaped) == sorted(job_ids)
    assert sorted(world.outbox()) == sorted(job_ids)


def test_reaper_passes_over_a_job_whose_heartbeat_is_in_flight(world: World) -> None:
    """On SQLite the reaper comes after the heartbeat; on PostgreSQL it skips the locked row."""
    claim = world.start()
    world.expire_lease(claim.job_id)
    reaped: list[list[str]] = []
    with world.database.session() as session:
        assert jobs.heartbeat(session, claim.job_id, claim.epoch, 30) == "running"
        reaper = threading.Thread(target=lambda: reaped.append(world.reap()))
        reaper.start()
        if world.database.dialect == "postgresql":
            reaper.join(3)
            assert not reaper.is_alive(), "the reaper waits for a locked row"
    reaper.join(10)
    assert reaped == [[]]
    assert world.job(claim.job_id).state == "running"
