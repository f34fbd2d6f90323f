"""What a distillation says of itself while it runs: that nobody can run a part, how long it takes, what parts need."""

import pytest
from sqlalchemy import update

from app import jobs
from app.db.clock import db_now
from app.db.session import Database
from app.db.tables import JobRow
from app.errors import InvalidRequest
from app.settings import Settings
from app.storage import Storage
from tests.app.jobs.pipeline_world import PipelineWorld
from tests.app.jobs.world import OWNER


@pytest.fixture
def world(database: Database, settings: Settings, storage: Storage) -> PipelineWorld:
    world = PipelineWorld(database, settings)
    world.storage = storage
    return world


def register(world: PipelineWorld, num_threads: int = 2) -> None:
    facts = {"accepts": ["cpu"], "memory_bytes": 2**34, "num_threads": num_threads}
    with world.database.session() as session:
        jobs.register_worker(session, "w1", host="h", queue="pare.cpu", facts=facts)


def test_a_part_that_no_worker_can_run_is_told_of_by_its_parent(world: PipelineWorld) -> None:
    training = {"kind": "distill", "epochs": 9, "parallel": {"data": 4}}
    parent = world.distill(world.describe(teacher_training=None, training=training))
    register(world, num_threads=2)
    world.settle()
    wait = world.job(parent).progress["waiting"]
    assert (wait["reason"], wait["detail"].partition(":")[0]) == ("no_worker_can_run", "student")
    assert "4 threads; the only worker, w1, has 2 threads for a job" in wait["detail"]
    register(world, num_threads=4)
    world.settle()
    assert world.job(parent).progress["waiting"] is None
    told = [event.data["reason"] for event in world.events(parent) if event.kind == "waiting"]
    assert told == ["no_worker_can_run", None]


def test_the_time_left_is_that_of_the_pace_so_far(world: PipelineWorld) -> None:
    register(world)
    parent = world.distill(world.describe(teacher_training=None))
    world.settle()
    assert world.job(parent).progress["eta_seconds"] is None, "nothing is done yet"
    with world.database.session() as session:
        session.execute(update(JobRow).where(JobRow.id == parent).values(started_at=db_now(-60)))
    world.finish(parent, "student")
    world.settle()
    assert world.job(parent).progress["fraction"] == pytest.approx(0.5)
    assert world.job(parent).progress["eta_seconds"] == pytest.approx(60, abs=10)
    # What was done before a retry is no part of its pace.
    world.break_part(parent, "student_alone")
    with world.database.session() as session:
        session.execute(update(JobRow).where(JobRow.id == parent).values(state="failed"))
    with world.database.session() as session:
        jobs.retry_job(session, world.settings, OWNER, parent)
    world.settle()
    assert world.job(parent).progress["eta_seconds"] is None


def test_every_stage_needs_what_the_request_asks_for(world: PipelineWorld) -> None:
    parent = world.distill(world.describe(needs={"device": "gpu", "memory_bytes": 7}))
    world.settle()
    needs = world.parts(parent)["teacher"].needs
    assert (needs.device, needs.num_devices, needs.memory_bytes) == ("gpu", 1, 7)
    with pytest.raises(InvalidRequest) as caught:
        world.distill(
            world.describe(
                needs={"device": "gpu", "num_devices": 1},
                teacher_training={"kind": "finetune", "parallel": {"data": 2}},
            )
        )
    assert [problem.pointer for problem in caught.value.errors] == ["/distillation/needs/num_devices"]


@pytest.mark.parametrize(
    ("quality", "words", "is_warned"),
    [
        (0.95, "made it better: accuracy +0.0500", False),
        (0.9, "No gain of the teacher's training is proven: accuracy +0.0000", True),
        (0.5, "made it worse: accuracy -0.4000 +- 0.0277 (95 %) against the uploaded model. Leave it out.", True),
    ],
    ids=["better", "noise", "worse"],
)
def test_the_report_says_what_the_training_of_the_teacher_was_worth(
    world: PipelineWorld, quality: float, words: str, is_warned: bool
) -> None:
    parent = world.distill()
    for name, value in (("teacher", quality), ("teacher_check", 0.0), ("student", 0.8), ("student_alone", 0.7)):
        world.settle()
        world.finish(parent, name, value)
    world.settle()
    assert words in world.read_text(parent, "report.md")
    assert any(words in warning for warning in world.job(parent).verdict["warnings"]) is is_warned
    found = world.job(parent).metrics["distillation"]["teacher_gain"]
    assert found["value"] == pytest.approx(quality - 0.9)
