"""Checkpoints belong to who holds the job: recorded by epoch, the newest two kept, dropped at a good end."""

import pytest
from sqlalchemy import select

from app import jobs
from app.db.tables import CheckpointRow, JobRow
from app.jobs import Place, StoredCheckpoint
from app.recipes.plan import ArtifactFile, EngineResult
from app.storage import Blob
from tests.app.jobs.world import REFUSAL, World

BLOB = Blob("cd" * 32, 5)


def checkpoint(number: int) -> StoredCheckpoint:
    return StoredCheckpoint(Place("finetune", 1, number / 10), Blob(f"{number:064d}", number))


def record(world: World, job_id: str, epoch: int, number: int) -> list[str] | None:
    with world.database.session() as session:
        return jobs.record_checkpoint(session, job_id, epoch, checkpoint(number))


def sizes(world: World, job_id: str) -> list[int]:
    with world.database.read() as session:
        query = select(CheckpointRow.size_bytes).where(CheckpointRow.job_id == job_id).order_by(CheckpointRow.seq)
        return list(session.scalars(query))


def test_the_newest_two_are_kept_and_the_next_claim_names_them(world: World) -> None:
    claim = world.start()
    assert claim.checkpoints == ()
    assert [record(world, claim.job_id, claim.epoch, number) for number in (1, 2)] == [[], []]
    assert record(world, claim.job_id, claim.epoch, 3) == [f"{1:064d}"]
    world.expire_lease(claim.job_id)
    world.reap()

    again = world.claim(claim.job_id)

    assert again is not None
    assert [each.blob.size_bytes for each in again.checkpoints] == [3, 2]
    assert again.checkpoints[0].place == Place("finetune", 1, 0.3)


def test_the_same_bytes_again_are_not_given_up(world: World) -> None:
    claim = world.start()
    for number in (1, 2):
        record(world, claim.job_id, claim.epoch, number)

    assert record(world, claim.job_id, claim.epoch, 1) == []


def test_who_lost_the_job_records_nothing(world: World) -> None:
    claim = world.start()
    world.expire_lease(claim.job_id)
    world.reap()
    assert record(world, claim.job_id, claim.epoch, 1) is None
    again = world.claim(claim.job_id)
    assert again is not None

    assert record(world, claim.job_id, claim.epoch, 2) is None

    with world.database.session() as session:
        assert not jobs.record_resumed(session, claim.job_id, claim.epoch, Place("finetune", 1, 0.5))
    assert sizes(world, claim.job_id) == []
    assert world.job(claim.job_id).resumed_from is None


def test_they_go_in_the_transaction_that_ends_the_job_well(world: World) -> None:
    claim = world.start()
    record(world, claim.job_id, claim.epoch, 1)
    artifact = ArtifactFile(name="a.onnx", media_type="application/onnx", size_bytes=5, sha256=BLOB.sha256)

    with world.database.session() as session:
        assert jobs.succeed(session, claim, EngineResult(artifacts=(artifact,)), {"a.onnx": BLOB}, [])

    assert sizes(world, claim.job_id) == []


@pytest.mark.parametrize(("fresh", "left"), [(False, [1]), (True, [])])
def test_a_failed_job_keeps_them_for_its_retry(world: World, fresh: bool, left: list[int]) -> None:
    claim = world.start()
    record(world, claim.job_id, claim.epoch, 1)
    with world.database.session() as session:
        jobs.record_resumed(session, claim.job_id, claim.epoch, Place("finetune", 1, 0.5))
    assert world.job(claim.job_id).resumed_from == {"stage": "finetune", "step": 1, "fraction": 0.5}
    world.fail(claim, REFUSAL)
    assert sizes(world, claim.job_id) == [1]

    with world.database.session() as session:
        jobs.retry_job(session, world.settings, "local", claim.job_id, fresh=fresh)

    assert sizes(world, claim.job_id) == left
    assert world.job(claim.job_id).resumed_from is None


def test_they_go_with_the_job(world: World) -> None:
    claim = world.start()
    record(world, claim.job_id, claim.epoch, 1)
    world.fail(claim, REFUSAL)

    with world.database.session() as session:
        jobs.delete_job(session, "local", claim.job_id)

    assert sizes(world, claim.job_id) == []


def test_of_several_jobs_each_has_its_newest(world: World) -> None:
    claims = [world.start() for _ in range(3)]
    for number, claim in enumerate(claims[:2], start=1):
        record(world, claim.job_id, claim.epoch, number)
        record(world, claim.job_id, claim.epoch, number + 4)

    with world.database.read() as session:
        newest = jobs.find_newest(session, [session.get_one(JobRow, claim.job_id) for claim in claims])

    assert {job_id: row.size_bytes for job_id, row in newest.items()} == {
        claims[0].job_id: 5,
        claims[1].job_id: 6,
    }
