"""One waiting job goes to one worker, and only the newest claim can write."""

import multiprocessing
import random
from datetime import timedelta
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier

import pytest
from sqlalchemy import select

from app import jobs
from app.db.session import Database
from app.db.tables import EventRow, JobRow
from app.errors import NotFound
from app.jobs import Claim, State
from app.recipes.plan import EngineResult, Progress
from app.recipes.recipe import Recipe
from tests.app.jobs.world import World

PROGRESS = Progress(stage="finetune", step=0, fraction=0.5, eta_seconds=3.5, message="epoch 1", metrics={"loss": 0.5})


def test_claim_holds_what_the_attempt_needs(world: World) -> None:
    dataset, evaluation = world.add_dataset(), world.add_dataset()
    recipe = Recipe.model_validate(
        {
            "steps": [{"kind": "finetune"}],
            "data": {
                "dataset_id": dataset,
                "evaluation_dataset_id": evaluation,
                "inputs": {"x": {"column": "image"}},
                "label_column": "label",
                "task": "classification",
            },
        }
    )
    job_id = world.submit(recipe, deadline_seconds=77)
    claim = world.start(job_id, "w7")
    assert claim.model is not None
    assert (claim.job_id, claim.action, claim.epoch, claim.attempt, claim.max_attempts) == (job_id, "optimize", 1, 1, 3)
    assert claim.recipe == recipe
    assert claim.deadline_seconds == 77
    assert (claim.model.id, claim.model.format, claim.model.sha256) == (world.model_id, "pt2", "ab" * 32)
    assert [file.id for file in claim.datasets] == [dataset, evaluation]
    job = world.job(job_id)
    assert (job.state, job.worker_id, job.stage) == ("running", "w7", "claimed")
    assert job.started_at is not None


def test_same_dataset_twice_is_one_file(world: World) -> None:
    dataset = world.add_dataset()
    data = {"dataset_id": dataset, "evaluation_dataset_id": dataset, "inputs": {"x": {"column": "image"}}}
    claim = world.start(world.submit(Recipe.model_validate({"steps": [{"kind": "prune_magnitude"}], "data": data})))
    assert [file.id for file in claim.datasets] == [dataset]


def test_second_claim_gets_nothing(world: World) -> None:
    job_id = world.submit()
    assert world.claim(job_id) is not None
    assert world.claim(job_id) is None
    assert world.job(job_id).attempt == 1


def test_hint_for_a_job_that_is_gone_does_nothing(world: World) -> None:
    assert world.claim("job_" + "x" * 26) is None


def test_cancelled_job_is_never_claimed(world: World) -> None:
    job_id = world.submit()
    world.cancel(job_id)
    assert world.claim(job_id) is None
    assert world.states(job_id) == ["queued", "cancelled"]


def _claim_all(url: str, worker_id: str, barrier: Barrier, results: "Queue[list[str]]") -> None:
    database = Database(url, lock_timeout_seconds=60)
    with database.read() as session:
        job_ids = list(session.scalars(select(JobRow.id)))
    random.Random(worker_id).shuffle(job_ids)
    won = []
    for index, job_id in enumerate(job_ids):
        if index % 10 == 0:  # again and again: a slow starter must find jobs left
            barrier.wait(60)
        with database.session() as session:
            if jobs.claim(session, job_id, worker_id, 30):
                won.append(job_id)
    database.dispose()
    results.put(won)


def test_racing_processes_never_claim_a_job_twice(world: World) -> None:
    num_jobs, num_workers = 120, 4
    job_ids = set(world.submit_many(num_jobs))
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(num_workers), context.Queue()
    workers = [
        context.Process(target=_claim_all, args=(world.database.url, f"w{number}", barrier, results))
        for number in range(num_workers)
    ]
    for worker in workers:
        worker.start()
    won = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(60)
    assert sum(map(len, won)) == num_jobs, "a job was claimed twice or not at all"
    assert set().union(*won) == job_ids
    assert min(map(len, won)) > 0, "the workers did not race"
    with world.database.read() as session:
        assert {tuple(row) for row in session.execute(select(JobRow.attempt, JobRow.epoch, JobRow.last_seq))} == {
            (1, 1, 2)
        }
        assert len(session.scalars(select(EventRow.seq)).all()) == 2 * num_jobs


def test_heartbeat_renews_the_lease_by_the_clock_of_the_database(world: World) -> None:
    claim = world.start(lease_seconds=1)
    with world.database.session() as session:
        assert jobs.heartbeat(session, claim.job_id, claim.epoch, 300, PROGRESS) is State.RUNNING
    job = world.job(claim.job_id)
    assert timedelta(seconds=290) < job.lease_until - world.now() < timedelta(seconds=301)
    assert (job.stage, job.progress["fraction"]) == ("finetune", 0.5)


def test_heartbeat_tells_of_a_cancellation(world: World) -> None:
    claim = world.start()
    world.cancel(claim.job_id)
    with world.database.session() as session:
        assert jobs.heartbeat(session, claim.job_id, claim.epoch, 30) is State.CANCELLING


def _stale_claim(world: World) -> Claim:
    stale = world.start()
    world.expire_lease(stale.job_id)
    assert world.reap() == [stale.job_id]
    return stale


def _assert_powerless(world: World, stale: Claim) -> None:
    before = world.job(stale.job_id)
    with world.database.session() as session:
        assert jobs.heartbeat(session, stale.job_id, stale.epoch, 30) is None
    with world.database.session() as session:
        assert not jobs.record_progress(session, stale.job_id, stale.epoch, PROGRESS)
    with world.database.session() as session:
        assert not jobs.succeed(session, stale, EngineResult(), {}, ["none"])
    assert not world.fail(stale)
    with world.database.session() as session:
        assert not jobs.confirm_cancelled(session, stale)
    with world.database.session() as session:
        assert not jobs.release(session, stale, "worker_stopped")
    after = world.job(stale.job_id)
    names = ("state", "epoch", "last_seq", "lease_until", "progress", "error", "max_attempts")
    assert [getattr(before, name) for name in names] == [getattr(after, name) for name in names]


def test_stale_owner_cannot_write_while_the_job_waits_again(world: World) -> None:
    _assert_powerless(world, _stale_claim(world))


@pytest.mark.parametrize("cancelled", [False, True])
def test_stale_owner_cannot_write_while_another_runs_the_job(world: World, cancelled: bool) -> None:
    stale = _stale_claim(world)
    assert world.start(stale.job_id, "w2").epoch == stale.epoch + 1
    if cancelled:
        world.cancel(stale.job_id)
    _assert_powerless(world, stale)


def test_progress_is_shown_and_kept_as_an_event(world: World) -> None:
    claim = world.start()
    for fraction in (0.25, 0.5):
        with world.database.session() as session:
            progress = PROGRESS.model_copy(update={"fraction": fraction})
            assert jobs.record_progress(session, claim.job_id, claim.epoch, progress)
    job = world.job(claim.job_id)
    assert (job.stage, job.progress["fraction"], job.progress["eta_seconds"]) == ("finetune", 0.5, 3.5)
    events = world.events(claim.job_id)
    assert [(event.seq, event.kind) for event in events] == [
        (1, "state"),
        (2, "state"),
        (3, "progress"),
        (4, "progress"),
    ]
    assert Progress.model_validate(events[3].data) == PROGRESS
    assert job.last_seq == 4


def test_events_are_read_after_a_number_up_to_a_limit(world: World) -> None:
    claim = world.start()
    with world.database.session() as session:
        assert jobs.append_event(session, claim.job_id, "log", {"line": "hello"}) == 3
        with pytest.raises(NotFound):
            jobs.append_event(session, "job_none", "log", {})
    with world.database.read() as session:
        assert [event.seq for event in jobs.list_events(session, claim.job_id, after=1, limit=1)] == [2]
        assert [event.seq for event in jobs.list_events(session, claim.job_id, after=2)] == [3]


def test_rolled_back_event_leaves_no_gap(world: World) -> None:
    claim = world.start()

    def crash() -> None:
        with world.database.session() as session:
            jobs.append_event(session, claim.job_id, "log", {})
            raise RuntimeError("crash before commit")

    with pytest.raises(RuntimeError):
        crash()
    with world.database.session() as session:
        assert jobs.append_event(session, claim.job_id, "log", {}) == 3


def test_job_without_attempts_left_is_not_claimed(world: World) -> None:
    job_id = world.submit()
    with world.database.session() as session:
        session.get_one(JobRow, job_id).max_attempts = 0
    assert world.claim(job_id) is None
    assert world.states(job_id) == ["queued"]
