"""What a user may do to a job, and when."""

import pytest
from sqlalchemy import select

from app import jobs
from app.db.tables import ArtifactRow, DatasetRow, EventRow, JobRow, LogRow, ModelRow, OutboxRow
from app.errors import Conflict, NotFound
from app.jobs import Claim
from app.jobs.uploads import delete_upload
from app.recipes.plan import ArtifactFile, EngineResult
from app.recipes.recipe import Recipe
from app.storage import Blob
from tests.app.jobs.world import World

BLOB = Blob("cd" * 32, 5)


def retry(world: World, job_id: str, owner: str = "local") -> JobRow:
    with world.database.session() as session:
        return jobs.retry_job(session, world.settings, owner, job_id)


def delete(world: World, job_id: str, owner: str = "local") -> None:
    with world.database.session() as session:
        jobs.delete_job(session, owner, job_id)


def finish(world: World, claim: Claim) -> None:
    artifact = ArtifactFile(name="a.onnx", media_type="application/onnx", size_bytes=5, sha256="cd" * 32)
    with world.database.session() as session:
        assert jobs.succeed(session, claim, EngineResult(artifacts=(artifact,)), {"a.onnx": BLOB}, [], BLOB)


def test_waiting_job_is_cancelled_at_once(world: World) -> None:
    job_id = world.submit()
    assert world.cancel(job_id) == "cancelled"
    assert world.job(job_id).finished_at is not None


def test_running_job_is_cancelled_by_its_worker_and_asking_again_changes_nothing(world: World) -> None:
    claim = world.start()
    assert [world.cancel(claim.job_id), world.cancel(claim.job_id)] == ["cancelling", "cancelling"]
    assert world.states(claim.job_id) == ["queued", "running", "cancelling"]
    assert world.job(claim.job_id).finished_at is None


def test_finished_job_stays_finished(world: World) -> None:
    claim = world.start()
    finish(world, claim)
    with pytest.raises(Conflict, match="already succeeded") as caught:
        world.cancel(claim.job_id)
    assert caught.value.code == "job_finished"
    with pytest.raises(Conflict, match="only failed and cancelled") as caught:
        retry(world, claim.job_id)
    assert caught.value.code == "job_not_retryable"
    assert world.job(claim.job_id).state == "succeeded"


@pytest.mark.parametrize("end", ["failed", "cancelled"])
def test_retry_starts_over_with_new_attempts_and_old_numbers(world: World, end: str) -> None:
    job_id = world.submit()
    for _ in range(3):
        claim = world.start(job_id)
        if end == "cancelled":
            world.cancel(job_id)
        world.fail(claim)
        if end == "cancelled":
            break
    assert world.job(job_id).state == end
    world.clear_outbox()
    job = retry(world, job_id)
    attempts = 3 if end == "failed" else 1
    assert (job.state, job.attempt, job.max_attempts) == ("queued", attempts, attempts + 3)
    assert (job.error, job.finished_at, job.started_at, job.stage) == (None, None, None, None)
    assert world.outbox() == [job_id]
    assert world.events(job_id)[-1].data["reason"] == "retry"
    claim = world.start(job_id)
    assert (claim.attempt, claim.max_attempts) == (attempts + 1, attempts + 3)
    finish(world, claim)


def test_running_job_cannot_be_retried_or_deleted(world: World) -> None:
    claim = world.start()
    with pytest.raises(Conflict):
        retry(world, claim.job_id)
    with pytest.raises(Conflict, match="is running") as caught:
        delete(world, claim.job_id)
    assert caught.value.code == "job_unfinished"


def test_delete_takes_everything_along(world: World) -> None:
    other = world.start()
    finish(world, other)
    claim = world.start()
    finish(world, claim)
    delete(world, claim.job_id)
    with world.database.read() as session:
        for column in (JobRow.id, EventRow.job_id, ArtifactRow.job_id, LogRow.job_id, OutboxRow.job_id):
            kept = set(session.scalars(select(column)))
            assert kept == {other.job_id}, column
    with pytest.raises(NotFound):
        delete(world, claim.job_id)
    assert world.claim(claim.job_id) is None


def test_others_and_checks_do_not_see_the_job(world: World) -> None:
    job_id = world.submit()
    check_id = world.check(model_id=world.add_model("checking"))
    for owner, wanted in (("stranger", job_id), ("local", check_id), ("local", "job_nothing")):
        with world.database.session() as session, pytest.raises(NotFound):
            jobs.get_job(session, owner, wanted)
        with world.database.session() as session, pytest.raises(NotFound):
            jobs.cancel_job(session, owner, wanted)
        with pytest.raises(NotFound):
            retry(world, wanted, owner)
        with pytest.raises(NotFound):
            delete(world, wanted, owner)
    assert world.job(job_id).state == "queued"


def test_job_whose_uploads_were_deleted_cannot_be_retried(world: World) -> None:
    dataset_id = world.add_dataset()
    data = {"dataset_id": dataset_id, "inputs": {"x": {"column": "image"}}}
    job_id = world.submit(Recipe.model_validate({"steps": [{"kind": "prune_magnitude"}], "data": data}))
    world.cancel(job_id)
    with world.database.session() as session:
        delete_upload(session, DatasetRow, "local", dataset_id)
    with pytest.raises(Conflict) as caught:
        retry(world, job_id)
    assert caught.value.code == "dataset_deleted"
    with world.database.session() as session:
        delete_upload(session, ModelRow, "local", world.model_id)
    with pytest.raises(Conflict) as caught:
        retry(world, job_id)
    assert caught.value.code == "model_deleted"
    assert world.job(job_id).state == "cancelled"
