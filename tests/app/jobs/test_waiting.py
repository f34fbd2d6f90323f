"""A job that no living worker can run says so; one that a worker can run is brought to it."""

from typing import Any

import pytest

from app import jobs
from app.db.clock import db_now
from app.db.tables import JobRow, WorkerRow
from app.jobs import JobNeeds
from app.recipes.needs import DeviceKind, Needs
from tests.app.jobs.world import World

SMALL: dict[str, Any] = {"accepts": ["cpu"], "memory_bytes": 4 * 2**30, "num_threads": 2}
BIG: dict[str, Any] = {"accepts": ["cpu"], "memory_bytes": 64 * 2**30, "num_threads": 16}
ONE_GPU: dict[str, Any] = {"accepts": ["gpu"], "devices": [{}], "memory_bytes": 16 * 2**30, "num_threads": 4}
NO_HINTS: dict[DeviceKind, int] = {"cpu": 0, "gpu": 0}


def register(world: World, worker_id: str, facts: dict[str, Any]) -> None:
    with world.database.session() as session:
        jobs.register_worker(session, worker_id, host="node", queue="pare.cpu", facts=facts)


def leave(world: World, worker_id: str) -> None:
    with world.database.session() as session:
        jobs.remove_worker(session, worker_id)


def explain(world: World, needs: JobNeeds) -> jobs.Wait | None:
    with world.database.read() as session:
        return jobs.explain_wait(needs, jobs.list_workers(session, 60))


def note(world: World, limit: int = 100) -> list[str]:
    return jobs.note_waits(world.database, 60, limit)


def told(world: World, job_id: str) -> list[str | None]:
    return [event.data["reason"] for event in world.events(job_id) if event.kind == "waiting"]


def wake(world: World, hints: dict[DeviceKind, int] = NO_HINTS, older_than_seconds: float = 1) -> list[str]:
    with world.database.session() as session:
        return jobs.wake_workers(session, jobs.list_workers(session, 60), hints, older_than_seconds)


def submit(world: World, age_seconds: float = 5, **needs: Any) -> str:
    """Submit a job whose first hint was sent some time ago, and is gone."""
    job_id = world.submit(needs=Needs(**needs))
    world.clear_outbox()
    with world.database.session() as session:
        session.get_one(JobRow, job_id).published_at = db_now(-age_seconds)
    return job_id


def test_a_worker_that_stops_or_has_no_space_on_its_disk_does_not_count(world: World) -> None:
    register(world, "a", SMALL | {"stopping": True})
    wait = explain(world, JobNeeds())
    assert wait is not None
    assert wait.reason == "no_worker"
    register(world, "b", SMALL | {"disk_problem": "its disk has 3 MiB left, of 256"})
    wait = explain(world, JobNeeds())
    assert wait is not None
    assert "the only worker, b, takes none now: its disk has 3 MiB left, of 256" in wait.detail
    register(world, "b", SMALL)
    assert explain(world, JobNeeds()) is None


@pytest.mark.parametrize(
    ("needs", "detail"),
    [
        (JobNeeds(memory_bytes=32 * 2**30), "a CPU worker, 32.0 GiB of memory"),
        (JobNeeds(memory_bytes=32 * 2**30), "closest of 2 workers, a, has 4.0 GiB of memory"),
        (JobNeeds(num_threads=3), "a, has 2 threads"),
        (JobNeeds("gpu", 2), "needs 2 GPUs"),
        (JobNeeds("gpu", 2), "b, has 1 GPU"),
    ],
)
def test_a_job_nobody_can_run_is_told_what_is_missing(world: World, needs: JobNeeds, detail: str) -> None:
    register(world, "a", SMALL)
    register(world, "b", ONE_GPU)
    wait = explain(world, needs)
    assert wait is not None
    assert wait.reason == "no_worker_can_run"
    assert detail in wait.detail
    register(world, "c", BIG | {"accepts": ["cpu", "gpu"], "devices": [{}, {}]})
    assert explain(world, needs) is None


def test_without_workers_or_with_such_as_take_no_jobs_there_is_no_worker(world: World) -> None:
    wait = explain(world, JobNeeds())
    assert wait is not None
    assert wait.reason == "no_worker"
    register(world, "a", SMALL)
    assert explain(world, JobNeeds()) is None
    register(world, "a", SMALL | {"accepts_jobs": False})
    assert explain(world, JobNeeds()) == wait


def test_events_tell_when_a_wait_begins_and_when_it_ends(world: World) -> None:
    register(world, "a", SMALL)
    fits, big = submit(world), submit(world, memory_bytes=32 * 2**30)
    assert note(world) == [big]
    assert note(world) == [], "the same wait was told twice"
    leave(world, "a")
    assert set(note(world)) == {fits, big}
    register(world, "b", BIG)
    assert set(note(world)) == {fits, big}
    assert told(world, fits) == ["no_worker", None]
    assert told(world, big) == ["no_worker_can_run", "no_worker", None]
    assert "a, has 4.0 GiB" in world.events(big)[1].data["detail"]


def test_a_claim_ends_the_wait(world: World) -> None:
    job_id = submit(world)
    assert note(world) == [job_id]
    claim = world.start(job_id)
    assert world.job(job_id).waiting_reason is None
    assert note(world) == []
    world.fail(claim)  # retryable: it waits again, and nobody can run it still
    assert note(world) == [job_id]
    assert told(world, job_id) == ["no_worker", "no_worker"]


def test_a_flood_is_noted_in_rounds(world: World) -> None:
    for _ in range(5):
        submit(world)
    assert [len(note(world, limit=2)) for _ in range(4)] == [2, 2, 1, 0]


def test_every_idle_worker_is_woken_where_one_can_run_a_job(world: World) -> None:
    register(world, "a", SMALL)
    register(world, "b", BIG)
    register(world, "g", ONE_GPU)
    job_id = submit(world, memory_bytes=32 * 2**30)
    assert wake(world) == [job_id]
    # A hint goes to whichever is next in line: one for each, so that the big one gets one.
    assert world.outbox() == [job_id, job_id]
    assert wake(world) == [], "hints that were not sent yet were written again"


def test_hints_that_wait_in_the_broker_are_not_added_to(world: World) -> None:
    register(world, "a", SMALL)
    submit(world)
    assert wake(world, {"cpu": 1, "gpu": 0}) == []
    assert len(wake(world, {"cpu": 0, "gpu": 1})) == 1


def test_nobody_is_woken_in_vain(world: World) -> None:
    register(world, "a", SMALL)
    submit(world, memory_bytes=32 * 2**30)
    assert wake(world) == [], "none of the idle can run it"
    register(world, "b", BIG)
    world.start(world.submit(), worker_id="b")
    world.clear_outbox()
    assert wake(world) == [], "the one that can is busy"


def test_a_hint_just_sent_is_given_time(world: World) -> None:
    register(world, "a", SMALL)
    submit(world, age_seconds=0)
    assert wake(world, older_than_seconds=30) == []


def test_running_jobs_are_counted_by_worker(world: World) -> None:
    world.start(worker_id="a")
    world.start(worker_id="a")
    world.start(worker_id="b")
    world.submit()
    with world.database.read() as session:
        assert jobs.count_running(session) == {"a": 2, "b": 1}


def test_a_worker_row_that_says_little_has_little(world: World) -> None:
    register(world, "old", {"device": "cpu"})
    with world.database.read() as session:
        capacity = jobs.capacity_of(session.get_one(WorkerRow, "old"))
    assert capacity == jobs.Capacity(("cpu",), 0, 0, 1)
