"""Which waiting job a worker takes next, and how many stand before one."""

import multiprocessing
import random
from collections import Counter
from datetime import UTC, datetime, timedelta
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from typing import Any

import pytest
from sqlalchemy import event, select, text

from app import jobs
from app.db.session import Database
from app.db.tables import EventRow, JobRow
from app.errors import Unavailable
from app.jobs import Capacity, Claim, JobNeeds
from app.jobs.checks import queue_job
from app.jobs.places import know_standing, read_places
from tests.app.jobs.world import REFUSAL, World

CPU = Capacity(("cpu",), memory_bytes=8, num_threads=4)
GPU = Capacity(("gpu",), num_devices=2, memory_bytes=8, num_threads=4)
BOTH = Capacity(("gpu", "cpu"), num_devices=2, memory_bytes=8, num_threads=4)


def queue(world: World, *, age: int = 0, owner: str = "ann", **values: Any) -> str:
    """Queue a job that was submitted `age` minutes ago."""
    with world.database.session() as session:
        job = queue_job(
            session, owner=owner, action="optimize", model_id=world.model_id, deadline_seconds=60, max_attempts=3,
            recipe={"steps": [{"kind": "prune_magnitude"}]}, **values,
        )  # fmt: skip
        job.created_at = datetime(2026, 1, 1, tzinfo=UTC) - timedelta(minutes=age)
        return job.id


def take(world: World, capacity: Capacity = CPU) -> Claim | None:
    with world.database.session() as session:
        return jobs.claim_next(session, capacity, "w1", 30)


def take_ids(world: World, capacity: Capacity = CPU) -> list[str]:
    """Claim until nothing is left."""
    taken = []
    while (claim := take(world, capacity)) is not None:
        taken.append(claim.job_id)
    return taken


def count_ahead(world: World, job_id: str) -> int:
    with world.database.read() as session:
        job = session.get_one(JobRow, job_id)
        return read_places(session).count_ahead(job.needs_device, job.priority, job.owner, job_id)


def test_the_oldest_job_of_the_highest_priority_is_taken(world: World) -> None:
    late, early = queue(world, age=1), queue(world, age=5)
    urgent, later_urgent = queue(world, priority=3, age=2), queue(world, priority=3, age=1)
    assert take_ids(world) == [urgent, later_urgent, early, late]


def test_checks_of_uploads_go_before_every_job(world: World) -> None:
    urgent = queue(world, priority=10, age=5)
    check = world.check(dataset_id=world.add_dataset("checking"))
    assert take_ids(world) == [check, urgent]


def test_owners_take_turns_whoever_came_first(world: World) -> None:
    flood = [queue(world, owner="ann", age=100 - number) for number in range(4)]
    other = [queue(world, owner="bob", age=10 - number) for number in range(2)]
    third = queue(world, owner="cid", age=1)
    # None of them ends: the one with the fewest running jobs is next, then the one that has waited longest for a turn.
    assert take_ids(world) == [flood[0], other[0], third, flood[1], other[1], flood[2], flood[3]]


def test_turns_are_kept_when_jobs_end_before_the_next_claim(world: World) -> None:
    flood = [queue(world, owner="ann", age=100 - number) for number in range(3)]
    other = [queue(world, owner="bob", age=10 - number) for number in range(2)]
    order = []
    while (claim := take(world)) is not None:
        order.append(claim.job_id)
        with world.database.session() as session:
            jobs.fail(session, claim, REFUSAL)
    assert order == [flood[0], other[0], flood[1], other[1], flood[2]]


def test_a_higher_priority_goes_before_fairness(world: World) -> None:
    mine = [queue(world, owner="ann", priority=1, age=9 - number) for number in range(3)]
    other = queue(world, owner="bob", age=50)
    assert take_ids(world) == [*mine, other]


@pytest.mark.parametrize(
    ("needs", "runs_on"),
    [
        (JobNeeds(), {"cpu", "both"}),
        (JobNeeds(memory_bytes=8, num_threads=4), {"cpu", "both"}),
        (JobNeeds(memory_bytes=9), set()),
        (JobNeeds(num_threads=5), set()),
        (JobNeeds("gpu", 1), {"gpu", "both"}),
        (JobNeeds("gpu", 2), {"gpu", "both"}),
        (JobNeeds("gpu", 3), set()),
        (JobNeeds("gpu", 1, memory_bytes=9), set()),
    ],
)
def test_only_a_worker_that_has_what_it_needs_takes_a_job(world: World, needs: JobNeeds, runs_on: set[str]) -> None:
    capacities = {"cpu": CPU, "gpu": GPU, "both": BOTH}
    for name, capacity in capacities.items():
        job_id = queue(world, needs=needs)
        assert (take(world, capacity) is not None) == (name in runs_on), name
        assert (capacity.find_lacks(needs) == []) == (name in runs_on), name
        with world.database.session() as session:
            session.execute(text("UPDATE jobs SET state = 'cancelled' WHERE id = :id"), {"id": job_id})


def test_a_job_that_this_worker_cannot_run_does_not_keep_it_from_the_next(world: World) -> None:
    big = queue(world, needs=JobNeeds(memory_bytes=100), priority=10, age=9)
    small = queue(world, age=1)
    assert take_ids(world) == [small]
    assert take_ids(world, Capacity(("cpu",), memory_bytes=100)) == [big]


def test_a_worker_for_both_kinds_goes_by_priority_across_them(world: World) -> None:
    gpu = JobNeeds("gpu", 1)
    old, young = queue(world, age=9), queue(world, needs=gpu, age=1)
    urgent = queue(world, needs=gpu, priority=1, age=0)
    assert take_ids(world, BOTH) == [urgent, old, young]


def test_a_job_without_attempts_left_does_not_block_the_queue(world: World) -> None:
    stuck, next_one = queue(world, age=9), queue(world, age=1)
    with world.database.session() as session:
        session.get_one(JobRow, stuck).max_attempts = 0
    assert take_ids(world) == [next_one]


@pytest.mark.parametrize("seed", range(3))
def test_the_number_of_jobs_ahead_is_that_of_the_claims_before_it(world: World, seed: int) -> None:
    """Positions told beforehand, against the order in which a worker then takes the jobs."""
    chance = random.Random(seed)
    owners = ["ann", "bob", "cid"]
    for owner in owners[: chance.randrange(3)]:
        queue(world, owner=owner, priority=9)
        assert take(world) is not None
    job_ids = [
        queue(world, owner=chance.choice(owners), priority=chance.randrange(3), age=chance.randrange(1000))
        for _ in range(25)
    ]
    queue(world, needs=JobNeeds("gpu", 1), priority=10)  # in another queue
    told = {job_id: count_ahead(world, job_id) for job_id in job_ids}
    order = take_ids(world)
    assert told == {job_id: order.index(job_id) for job_id in job_ids}


def test_a_new_job_would_stand_behind_the_older_ones_of_its_owner(world: World) -> None:
    for number in range(3):
        queue(world, owner="ann", age=number)
    with world.database.read() as session:
        places = read_places(session)
        know_standing(session, places, "bob")
    assert places.count_ahead("cpu", 0, "ann") == 3
    assert places.count_ahead("cpu", 0, "bob") == 1  # after one of ann's: their turns are equally old
    assert places.count_ahead("cpu", 1, "ann") == 0
    assert places.count_ahead("gpu", 0, "ann") == 0


def test_an_owner_may_come_while_the_queue_is_read(world: World) -> None:
    ann = queue(world, owner="ann")
    came: list[str] = []

    def come(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("SELECT jobs.needs_device"):  # the lines, which are read after the turns
            came.append(queue(world, owner="bob", age=1))

    event.listen(world.database.reader, "before_cursor_execute", come)
    try:
        with world.database.read() as session:
            places = read_places(session)
    finally:
        event.remove(world.database.reader, "before_cursor_execute", come)
    assert len(came) == 1
    assert places.count_ahead("cpu", 0, "ann", ann) == 0


def _claim_all(url: str, worker_id: str, barrier: Barrier, results: "Queue[list[str]]") -> None:
    database = Database(url, lock_timeout_seconds=5)
    won: list[str] = []
    barrier.wait(120)
    while True:
        try:
            with database.session() as session:
                claim = jobs.claim_next(session, CPU, worker_id, 300)
        except Unavailable:  # SQLite lets one wait too long while others come and go; a worker tries again as well
            continue
        if claim is None:
            break
        won.append(claim.job_id)
    database.dispose()
    results.put(won)


def test_racing_processes_take_every_job_once_and_fairly(world: World) -> None:
    num_jobs, num_workers = 200, 4
    with world.database.session() as session:
        for number in range(num_jobs):
            queue_job(
                session, owner="bob" if number % 10 == 9 else "ann", action="optimize", model_id=world.model_id,
                deadline_seconds=60, max_attempts=3, recipe={"steps": [{"kind": "prune_magnitude"}]},
            )  # fmt: skip
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(num_workers), context.Queue()
    workers = [
        context.Process(target=_claim_all, args=(world.database.url, f"w{number}", barrier, results))
        for number in range(num_workers)
    ]
    for worker in workers:
        worker.start()
    won = [results.get(timeout=240) for _ in workers]
    for worker in workers:
        worker.join(60)

    times = Counter(job_id for part in won for job_id in part)
    assert len(times) == num_jobs
    assert max(times.values()) == 1, "a job was claimed twice"
    assert sum(bool(part) for part in won) > 1, "the workers did not race"
    with world.database.read() as session:
        assert set(session.scalars(select(JobRow.epoch))) == {1}
        assert len(session.scalars(select(EventRow.seq)).all()) == 2 * num_jobs
        owners = list(session.scalars(select(JobRow.owner).order_by(JobRow.claimed_at, JobRow.id)))
    # Of ann's 180 and bob's 20 jobs, the first 40 claims are shared, though four processes look at once.
    assert abs(Counter(owners[:40])["bob"] - 20) <= 1
