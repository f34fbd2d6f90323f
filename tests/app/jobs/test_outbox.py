"""No accepted job is forgotten: hints are written with the job, sent later, and sent again when they get lost."""

import threading
from collections.abc import Callable
from datetime import timedelta

import pytest
from sqlalchemy import select, text

from app import jobs
from app.db.clock import db_now
from app.db.tables import JobRow
from app.jobs import Hint
from tests.app.jobs.world import World


def relay(world: World, publish: Callable[[Hint], None], limit: int = 100) -> int:
    return jobs.relay_outbox(world.database, publish, limit)


def sweep(world: World, older_than_seconds: float = 30, limit: int = 100) -> list[str]:
    with world.database.session() as session:
        return jobs.sweep_unpublished(session, "cpu", older_than_seconds, limit)


def age(world: World, seconds: float) -> None:
    with world.database.session() as session:
        for job in session.scalars(select(JobRow)):
            job.published_at = db_now(-seconds)


def test_hint_and_job_are_written_together(world: World) -> None:
    job_id = world.submit()
    assert world.outbox() == [job_id]

    def crash() -> None:
        with world.database.session() as session:
            jobs.queue_check(session, world.settings, owner="local", model_id=world.model_id)
            raise RuntimeError("crash before commit")

    with pytest.raises(RuntimeError):
        crash()
    assert world.outbox() == [job_id]


def test_hints_are_published_once_urgent_ones_first(world: World) -> None:
    ordinary, urgent = world.submit(), world.submit(priority=5)
    check = world.check(dataset_id=world.add_dataset("checking"))
    sent: list[Hint] = []
    assert relay(world, sent.append) == 3
    assert [(hint.job_id, hint.action, hint.priority, hint.device) for hint in sent] == [
        (check, "check_dataset", 100, "cpu"),
        (urgent, "optimize", 5, "cpu"),
        (ordinary, "optimize", 0, "cpu"),
    ]
    assert relay(world, sent.append) == 0


def test_hints_that_could_not_be_sent_stay(world: World) -> None:
    job_ids = [world.submit() for _ in range(3)]

    def publish(hint: Hint) -> None:
        if hint.job_id == job_ids[1]:
            raise ConnectionError("broker is gone")

    with pytest.raises(ConnectionError):
        relay(world, publish)
    assert world.outbox() == job_ids[1:]


def test_limit_bounds_one_round(world: World) -> None:
    for _ in range(3):
        world.submit()
    assert relay(world, lambda _hint: None, limit=2) == 2
    assert len(world.outbox()) == 1


def test_slow_broker_does_not_hold_up_submissions(world: World) -> None:
    world.submit()
    in_publish, go_on = threading.Event(), threading.Event()

    def publish(_hint: Hint) -> None:
        in_publish.set()
        assert go_on.wait(60)

    relaying = threading.Thread(target=relay, args=(world, publish))
    relaying.start()
    assert in_publish.wait(60)
    late = world.submit()  # would wait for the relay's lock and fail after 5 s
    go_on.set()
    relaying.join(20)
    assert world.outbox() == [late]


def test_two_relays_share_the_work(world: World) -> None:
    job_ids = sorted(world.submit() for _ in range(20))
    sent: list[str] = []
    barrier = threading.Barrier(2)

    def run() -> None:
        barrier.wait()
        while relay(world, lambda hint: sent.append(hint.job_id), limit=3):
            pass

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(set(sent)) == job_ids
    assert world.outbox() == []
    if world.database.dialect == "postgresql":
        assert sorted(sent) == job_ids, "a hint was sent twice"


def test_lost_hint_is_sent_again(world: World) -> None:
    job_id = world.submit()
    relay(world, lambda _hint: None)  # the broker takes it, and forgets it
    assert sweep(world) == []
    age(world, 31)
    assert sweep(world) == [job_id]
    assert world.outbox() == [job_id]
    assert sweep(world) == [], "one lost hint made two"


def test_sweep_waits_from_the_time_of_sending(world: World) -> None:
    job_id = world.submit()
    age(world, 100)
    relay(world, lambda _hint: None)
    assert sweep(world) == []
    assert world.now() - world.job(job_id).published_at < timedelta(seconds=20)


def test_sweep_leaves_unsent_hints_and_jobs_that_do_not_wait(world: World) -> None:
    world.submit()
    running = world.submit()
    with world.database.session() as session:
        session.execute(text("DELETE FROM outbox WHERE job_id = :id"), {"id": running})
    world.start(running)
    age(world, 100)
    assert sweep(world) == []


def test_sweep_works_through_a_flood_in_rounds(world: World) -> None:
    job_ids = {world.submit() for _ in range(5)}
    world.clear_outbox()
    age(world, 100)
    swept = [sweep(world, limit=2) for _ in range(4)]
    assert [len(part) for part in swept] == [2, 2, 1, 0]
    assert set().union(*swept) == job_ids


def test_relay_does_not_wait_for_what_another_is_sending(world: World) -> None:
    first, second = world.submit(), world.submit()
    in_publish, go_on = threading.Event(), threading.Event()

    def publish_slowly(_hint: Hint) -> None:
        in_publish.set()
        assert go_on.wait(60)

    relaying = threading.Thread(target=jobs.relay_outbox, args=(world.database, publish_slowly, 1))
    relaying.start()
    assert in_publish.wait(60)
    sent: list[Hint] = []
    relay(world, sent.append)  # would wait for the lock and fail after 5 s
    go_on.set()
    relaying.join(20)
    # On SQLite nothing is locked while a hint is sent, so the first goes out twice, which does no harm.
    assert [hint.job_id for hint in sent] == ([second] if world.database.dialect == "postgresql" else [first, second])
    assert world.outbox() == []
