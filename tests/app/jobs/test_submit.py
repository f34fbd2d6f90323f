"""A job is accepted only when it can run; what is accepted is written whole."""

from typing import Any

import pytest
from sqlalchemy import func, select

from app import jobs
from app.db.tables import Base, EventRow, JobRow, OutboxRow
from app.errors import Conflict, InvalidRequest, IsolationMissing, NotReady
from app.jobs.uploads import add_model
from app.recipes.recipe import Recipe
from app.storage.base import Blob
from tests.app.jobs.world import World, dataset_facts


def with_data(dataset_id: str, **data: Any) -> Recipe:
    bound = {"dataset_id": dataset_id, "inputs": {"x": {"column": "image"}}, **data}
    return Recipe.model_validate({"steps": [{"kind": "prune_magnitude"}], "data": bound})


def count(world: World, table: type[Base]) -> int:
    with world.database.read() as session:
        return session.scalar(select(func.count()).select_from(table)) or 0


def test_accepted_job_waits_with_its_request(world: World) -> None:
    dataset = world.add_dataset()
    recipe = with_data(dataset)
    job_id = world.submit(recipe, labels={"team": "vision"}, priority=3)
    job = world.job(job_id)
    assert job_id.startswith("job_")
    assert (job.state, job.attempt, job.max_attempts, job.epoch, job.last_seq) == ("queued", 0, 3, 0, 1)
    assert (job.owner, job.model_id, job.dataset_id, job.priority) == ("local", world.model_id, dataset, 3)
    assert job.labels == {"team": "vision"}
    assert job.deadline_seconds == world.settings.default_deadline_seconds
    assert Recipe.model_validate(job.recipe) == recipe
    assert [(event.seq, event.kind, event.data) for event in world.events(job_id)] == [
        (1, "state", {"state": "queued", "attempt": 0})
    ]
    assert world.outbox() == [job_id]


def test_unknown_and_foreign_uploads_are_named_with_their_places(world: World) -> None:
    foreign = world.add_dataset(owner="stranger")
    recipe = with_data(foreign, evaluation_dataset_id="dst_" + "z" * 26)
    with pytest.raises(InvalidRequest) as caught:
        world.submit(recipe, model_id=world.add_model(owner="stranger"), deadline_seconds=10**9)
    places = [problem.pointer for problem in caught.value.errors]
    assert places == ["/deadline_seconds", "/model_id", "/recipe/data/dataset_id", "/recipe/data/evaluation_dataset_id"]
    assert [count(world, table) for table in (JobRow, EventRow, OutboxRow)] == [0, 0, 0]


def test_upload_still_checked_is_a_conflict_worth_retrying(world: World) -> None:
    with pytest.raises(NotReady) as caught:
        world.submit(model_id=world.add_model("checking"))
    assert (caught.value.code, caught.value.retryable) == ("model_not_ready", True)
    with pytest.raises(NotReady) as caught:
        world.submit(with_data(world.add_dataset("checking")))
    assert caught.value.code == "dataset_not_ready"


def test_rejected_upload_is_refused_with_its_reason(world: World) -> None:
    with pytest.raises(Conflict, match="bad magic") as caught:
        world.submit(model_id=world.add_model("rejected"))
    assert (caught.value.code, caught.value.retryable) == ("model_rejected", False)


def test_recipe_is_checked_against_the_facts_of_both_datasets(world: World) -> None:
    fitting = world.add_dataset()
    unfitting = world.add_dataset(facts=dataset_facts(picture=("uint8", (3, 8, 8))))
    with pytest.raises(InvalidRequest) as caught:
        world.submit(with_data(unfitting))
    assert [problem.pointer for problem in caught.value.errors] == ["/recipe/data/inputs/x/column"]
    with pytest.raises(InvalidRequest) as caught:
        world.submit(with_data(fitting, evaluation_dataset_id=unfitting))
    assert [problem.pointer for problem in caught.value.errors] == ["/recipe/data/evaluation_dataset_id"]
    assert count(world, JobRow) == 0
    assert world.submit(with_data(fitting, evaluation_dataset_id=fitting))


def test_dry_run_checks_the_same_and_writes_nothing(world: World) -> None:
    request: dict[str, Any] = {"owner": "local", "model_id": world.model_id, "deadline_seconds": None}
    with world.database.read() as session:
        facts = jobs.validate_submission(
            session, world.settings, recipe=Recipe.model_validate({"steps": [{"kind": "prune_structured"}]}), **request
        )
        assert facts.inputs[0].name == "x"
        with pytest.raises(InvalidRequest):
            jobs.validate_submission(session, world.settings, recipe=with_data("dst_" + "z" * 26), **request)
    assert count(world, JobRow) == 0


def test_check_names_exactly_one_upload(world: World) -> None:
    with pytest.raises(AssertionError, match="of a model or of a dataset"):
        world.check()
    with pytest.raises(AssertionError, match="of a model or of a dataset"):
        world.check(model_id=world.model_id, dataset_id=world.add_dataset())


def test_work_is_refused_where_no_worker_can_isolate_it(world: World) -> None:
    def register(name: str, accepts: bool) -> None:
        with world.database.session() as session:
            jobs.register_worker(session, name, host="node", queue="pare", facts={"accepts_jobs": accepts})

    register("bare", False)
    with pytest.raises(IsolationMissing) as caught:
        world.submit()
    assert (caught.value.code, caught.value.retryable) == ("isolation_unavailable", True)
    blob = Blob("0" * 64, 1)
    with pytest.raises(IsolationMissing), world.database.session() as session:
        add_model(session, world.settings, owner="local", name="m", format="pt2", blob=blob)
    assert [count(world, table) for table in (JobRow, OutboxRow)] == [0, 0]
    register("walled", True)
    assert world.job(world.submit()).state == "queued"
