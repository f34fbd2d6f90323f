"""A distillation as one job: its stages follow each other, whatever fails, crashes or is cancelled in between."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import update
from sqlalchemy.exc import IntegrityError

from app import jobs
from app.db.clock import db_now
from app.db.session import Database
from app.db.tables import JobRow, ModelRow
from app.errors import Conflict, InvalidRequest
from app.jobs import advance, parents
from app.jobs.checks import queue_job
from app.recipes.metrics import Metrics
from app.recipes.plan import EngineError
from app.settings import Settings
from app.storage import Storage
from tests.app.jobs.pipeline_world import PipelineWorld
from tests.app.jobs.world import CRASH, OWNER

TUNING = {"num_trials": 4, "reduction": 2, "temperature": [2.0, 8.0], "label_weight": [0.1, 0.5]}
TRIALS = [f"trial_0_{number}" for number in range(4)]


@pytest.fixture
def world(database: Database, settings: Settings, storage: Storage) -> PipelineWorld:
    world = PipelineWorld(database, settings)
    world.storage = storage
    return world


def train_teacher(world: PipelineWorld, parent: str) -> None:
    world.settle()
    world.finish(parent, "teacher", 0.9)
    world.settle()
    world.finish(parent, "teacher_check")
    world.settle()


def test_the_stages_follow_each_other_and_the_result_compares_all_three(world: PipelineWorld) -> None:
    parent = world.distill()
    assert world.job(parent).state == "running"
    assert world.outbox() == [], "no worker is called for a parent"
    train_teacher(world, parent)
    assert world.waiting(parent) == ["student", "student_alone"]
    teacher = world.parts(parent)["teacher_check"].model_id
    assert {world.parts(parent)[name].model_id for name in world.waiting(parent)} == {teacher}
    assert [step.kind for step in world.recipe(parent, "student").steps] == ["derive_student", "distill"]
    alone = world.recipe(parent, "student_alone").steps
    assert [step.kind for step in alone] == ["derive_student", "finetune"]
    assert alone[1].epochs == 9  # type: ignore[union-attr]

    world.finish(parent, "student", 0.85)
    world.settle()
    assert world.job(parent).state == "running"
    world.finish(parent, "student_alone", 0.75)
    world.settle()

    job = world.job(parent)
    assert (job.state, job.progress["fraction"], job.isolation) == ("succeeded", 1.0, ["bubblewrap"])
    metrics = Metrics.model_validate(job.metrics)
    assert metrics.distillation is not None
    table = {each.name: each.quality.value for each in metrics.distillation.candidates if each.quality}
    assert table == {"teacher": 0.9, "student_alone": 0.75, "student": 0.85}
    assert metrics.distillation.gain is not None
    assert metrics.distillation.gain.value == pytest.approx(0.1)
    assert metrics.distillation.gain.helped is True
    assert any("The teacher helped" in sentence for sentence in metrics.verdict.better)
    files = world.artifacts(parent)
    assert {"model.onnx", "model.pt2", "teacher.pt2", "report.md", "manifest.json"} <= set(files)
    assert files["teacher.pt2"] == world.artifacts(world.parts(parent)["teacher"].job_id)["model.pt2"]
    assert files["model.pt2"] == world.artifacts(world.parts(parent)["student"].job_id)["model.pt2"]
    report = world.read_text(parent, "report.md")
    assert "| student without teacher | accuracy 0.7500 +- 0.0100 |" in report
    assert "The teacher helped: accuracy +0.1000" in report


@pytest.mark.parametrize(
    ("quality", "words"), [(0.755, "No gain is proven"), (0.70, "The teacher did harm")], ids=["noise", "harm"]
)
def test_the_report_says_when_the_teacher_did_not_help(world: PipelineWorld, quality: float, words: str) -> None:
    parent = world.distill(world.describe(teacher_training=None))
    world.settle()
    world.finish(parent, "student_alone", 0.75)
    world.finish(parent, "student", quality)
    world.settle()
    assert words in world.read_text(parent, "report.md")
    assert not any("teacher" in sentence for sentence in world.job(parent).verdict["better"])


def test_trials_are_halved_by_rows_set_apart_and_the_best_trains_in_full(world: PipelineWorld) -> None:
    parent = world.distill(world.describe(teacher_training=None, tuning=TUNING))
    world.settle()
    assert world.waiting(parent) == TRIALS
    assert world.recipe(parent, "trial_0_0").steps[1].temperature == 4.0  # type: ignore[union-attr]
    assert {world.recipe(parent, name).steps[1].epochs for name in TRIALS} == {2}  # type: ignore[union-attr]
    # Held-out quality says the opposite of the rows set apart; only the latter may decide.
    for number, choosing in enumerate((0.5, 0.9, 0.6, 0.7)):
        world.finish(parent, f"trial_0_{number}", quality=1 - choosing, choosing=choosing)
    world.settle()
    assert world.waiting(parent) == ["trial_1_1", "trial_1_3"]
    world.finish(parent, "trial_1_1", choosing=0.91)
    world.finish(parent, "trial_1_3", choosing=0.95)
    world.settle()
    assert world.waiting(parent) == ["student", "student_alone"]
    wanted, tried = world.recipe(parent, "student").steps[1], world.recipe(parent, "trial_1_3").steps[1]
    assert wanted == tried.model_copy(update={"epochs": 9})
    world.finish(parent, "student", 0.8)
    world.finish(parent, "student_alone", 0.7)
    world.settle()
    found = Metrics.model_validate(world.job(parent).metrics).distillation
    assert found is not None
    outcomes = {(trial.rung, trial.number): trial.outcome for trial in found.trials}
    assert outcomes == {
        (0, 0): "stopped", (0, 1): "advanced", (0, 2): "stopped", (0, 3): "advanced", (1, 1): "stopped",
        (1, 3): "chosen",
    }  # fmt: skip
    assert "| 2 | 3 | 4 |" in world.read_text(parent, "report.md")


def test_a_failed_trial_loses_and_the_others_go_on(world: PipelineWorld) -> None:
    parent = world.distill(world.describe(teacher_training=None, tuning=TUNING))
    world.settle()
    for name, choosing in zip(TRIALS[1:], (0.1, 0.2, 0.3), strict=True):
        world.finish(parent, name, choosing=choosing)
    world.break_part(parent, "trial_0_0")
    world.settle()
    assert world.waiting(parent) == ["trial_1_2", "trial_1_3"]


def test_when_every_trial_fails_the_job_fails_with_the_first_error_and_retries_them(world: PipelineWorld) -> None:
    parent = world.distill(world.describe(teacher_training=None, tuning=TUNING))
    world.settle()
    for name in TRIALS:
        world.break_part(parent, name)
    world.settle()
    job = world.job(parent)
    assert (job.state, job.error["code"]) == ("failed", "step_failed")
    retry(world, parent)
    world.settle()
    assert world.waiting(parent) == TRIALS


def retry(world: PipelineWorld, parent: str) -> None:
    with world.database.session() as session:
        jobs.retry_job(session, world.settings, OWNER, parent)


def test_a_failed_teacher_fails_the_job_with_its_error_and_retry_goes_on_from_there(world: PipelineWorld) -> None:
    parent = world.distill()
    world.settle()
    world.break_part(parent, "teacher", EngineError(code="diverged", detail="the loss is nan", fix="lower it"))
    world.settle()
    job = world.job(parent)
    assert (job.state, job.error["code"], job.error["fix"]) == ("failed", "diverged", "lower it")
    assert "the loss is nan" in job.error["detail"]
    retry(world, parent)
    train_teacher(world, parent)
    assert world.waiting(parent) == ["student", "student_alone"]
    assert world.states(parent) == ["queued", "running", "failed", "queued", "running"]
    assert world.job(parent).attempt == 2


def test_a_refused_teacher_file_fails_the_job(world: PipelineWorld) -> None:
    parent = world.distill()
    world.settle()
    world.finish(parent, "teacher")
    world.settle()
    world.break_part(parent, "teacher_check")
    world.settle()
    assert world.job(parent).state == "failed"
    assert world.upload(world.parts(parent)["teacher_check"].model_id or "").state == "rejected"
    retry(world, parent)
    world.finish(parent, "teacher_check")
    world.settle()
    assert world.upload(world.parts(parent)["teacher_check"].model_id or "").state == "ready"
    assert world.waiting(parent) == ["student", "student_alone"]


def test_a_part_that_a_worker_lost_is_tried_again_without_the_parent_noticing(world: PipelineWorld) -> None:
    parent = world.distill()
    world.settle()
    world.fail(world.start(world.parts(parent)["teacher"].job_id), CRASH)
    world.settle()
    assert (world.job(parent).state, world.waiting(parent)) == ("running", ["teacher"])


def test_without_labels_there_is_no_student_alone_and_the_report_says_so(world: PipelineWorld) -> None:
    data = {"dataset_id": world.add_dataset(), "inputs": {"x": {"column": "image", "scale": 0.5}}}
    parent = world.distill(world.describe(teacher_training=None, data=data))
    world.settle()
    assert world.waiting(parent) == ["student"]
    world.finish(parent, "student")
    world.settle()
    assert world.job(parent).state == "succeeded"
    assert "no labels" in world.read_text(parent, "report.md")


def test_a_failed_student_alone_is_reported_and_does_not_fail_the_job(world: PipelineWorld) -> None:
    parent = world.distill(world.describe(teacher_training=None))
    world.settle()
    world.finish(parent, "student")
    world.break_part(parent, "student_alone")
    world.settle()
    assert world.job(parent).state == "succeeded"
    assert "student without teacher failed" in world.read_text(parent, "report.md")


def reach(world: PipelineWorld, parent: str, stage: str) -> None:
    world.settle()
    if stage in ("trials", "students"):
        world.finish(parent, "teacher")
        world.settle()
        world.finish(parent, "teacher_check")
        world.settle()
    if stage == "students":
        for name in TRIALS:
            world.finish(parent, name)
        world.settle()
        for name in world.waiting(parent):
            world.finish(parent, name)
        world.settle()


@pytest.mark.parametrize("stage", ["teacher", "trials", "students"])
def test_cancel_ends_every_part_at_any_stage_and_retry_goes_on(world: PipelineWorld, stage: str) -> None:
    parent = world.distill(world.describe(tuning=TUNING))
    reach(world, parent, stage)
    waiting = world.waiting(parent)
    running = world.start(world.parts(parent)[waiting[0]].job_id)
    assert world.cancel(parent) == "cancelling"
    world.settle()
    assert world.job(parent).state == "cancelling", "a worker still has a part"
    assert world.waiting(parent) == []
    with world.database.session() as session:
        assert jobs.confirm_cancelled(session, running)
    world.settle()
    assert world.job(parent).state == "cancelled"
    assert all(part.is_over for part in world.parts(parent).values())
    retry(world, parent)
    world.settle()
    assert world.waiting(parent) == waiting


def test_the_deadline_is_that_of_all_parts_together(world: PipelineWorld) -> None:
    parent = world.distill(deadline_seconds=100)
    world.settle()
    with world.database.session() as session:
        session.execute(update(JobRow).where(JobRow.id == parent).values(started_at=db_now(-101)))
    world.settle()
    assert (world.job(parent).state, world.job(parent).error["code"]) == ("failed", "deadline_exceeded")
    assert world.waiting(parent) == []


def test_deleting_a_parent_deletes_its_parts_and_what_they_made(world: PipelineWorld) -> None:
    parent = world.distill()
    train_teacher(world, parent)
    part, made = world.parts(parent)["student"].job_id, world.parts(parent)["teacher_check"].model_id
    for act in (jobs.cancel_job, jobs.delete_job):
        with world.database.session() as session, pytest.raises(Conflict, match="is a part of"):
            act(session, OWNER, part)
    world.cancel(parent)
    world.settle()
    with world.database.session() as session:
        jobs.delete_job(session, OWNER, parent)
    assert world.count_jobs() == 0
    with world.database.read() as session:
        assert session.get(ModelRow, made) is None


def test_events_tell_of_stages_and_trials(world: PipelineWorld) -> None:
    parent = world.distill(world.describe(teacher_training=None, tuning=TUNING))
    world.settle()
    for number, name in enumerate(TRIALS):
        world.finish(parent, name, choosing=0.1 * number)
    world.settle()
    progress = [event.data for event in world.events(parent) if event.kind == "progress"]
    assert [data["fraction"] for data in progress] == sorted(data["fraction"] for data in progress)
    messages = [data["message"] for data in progress]
    assert "trial 3 of rung 1 (temperature 8, label_weight 0.5): objective 0.3" in messages or any(
        message.startswith("trial 3 of rung 1 (") and message.endswith("objective 0.3") for message in messages
    )
    assert len({message for message in messages if message.startswith("trial ")}) == 4


def test_a_look_that_crashes_leaves_nothing_and_the_next_one_does_it(
    world: PipelineWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = world.distill(world.describe(teacher_training=None, tuning=TUNING))
    real, calls = parents.queue_part, []

    def crash_at_the_third(*arguments: Any) -> JobRow:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt("killed between two parts")
        return real(*arguments)

    monkeypatch.setattr(advance, "queue_part", crash_at_the_third)
    with pytest.raises(KeyboardInterrupt, match="killed"):
        world.advance()
    assert world.parts(parent) == {}
    world.settle()
    assert world.waiting(parent) == TRIALS
    assert world.outbox() == [world.parts(parent)[name].job_id for name in TRIALS]


def test_a_crash_between_the_report_and_the_end_is_made_good(
    world: PipelineWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = world.distill(world.describe(teacher_training=None))
    world.settle()
    world.finish(parent, "student")
    world.finish(parent, "student_alone")
    with monkeypatch.context() as patch:
        patch.setattr(advance, "_succeed", _crash)
        with pytest.raises(KeyboardInterrupt, match="killed"):
            world.settle()
    assert (world.job(parent).state, world.artifacts(parent)) == ("running", {})
    world.settle()
    assert world.job(parent).state == "succeeded"
    assert "report.md" in world.artifacts(parent)


def _crash(*_: Any) -> bool:
    raise KeyboardInterrupt("killed before the last transaction")


def test_a_parent_that_cannot_be_read_fails_and_the_others_go_on(world: PipelineWorld) -> None:
    broken, sound = (world.distill(world.describe(teacher_training=None)) for _ in range(2))
    with world.database.session() as session:
        session.execute(update(JobRow).where(JobRow.id == broken).values(recipe={"from": "another version"}))
    world.settle()
    assert (world.job(broken).state, world.job(broken).error["code"]) == ("failed", "pipeline_failed")
    assert world.waiting(sound) == ["student", "student_alone"]


def test_dispatchers_at_once_queue_each_part_once(world: PipelineWorld) -> None:
    parents = [world.distill(world.describe(teacher_training=None, tuning=TUNING)) for _ in range(3)]
    together(4, world.settle)
    for parent in parents:
        assert world.waiting(parent) == TRIALS
        for name in TRIALS:
            world.finish(parent, name)
    together(4, world.settle)
    for parent in parents:
        assert world.waiting(parent) == ["trial_1_0", "trial_1_1"]


def together(num_threads: int, act: Callable[[], None]) -> None:
    barrier, failures = threading.Barrier(num_threads), list[BaseException]()

    def run() -> None:
        barrier.wait(30)
        try:
            act()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []


def test_a_part_cannot_exist_twice(world: PipelineWorld) -> None:
    parent = world.distill()
    world.settle()
    with pytest.raises(IntegrityError), world.database.session() as session:
        queue_job(
            session,
            owner=OWNER,
            action="optimize",
            deadline_seconds=1,
            max_attempts=1,
            parent_id=parent,
            part="teacher",
        )
    assert list(world.parts(parent)) == ["teacher"]


def test_what_does_not_fit_is_refused_at_its_place_in_the_request(world: PipelineWorld) -> None:
    wrong = world.describe(
        student={"kind": "derive_student", "width": 0.5, "depth": 0.5},
        teacher_training={"kind": "finetune", "augmentations": ["flip"], "label_smoothing": 0.1},
    )
    wrong = wrong.model_copy(update={"data": wrong.data.model_copy(update={"label_column": "lable"})})
    with pytest.raises(InvalidRequest) as caught:
        world.distill(wrong)
    assert [problem.pointer for problem in caught.value.errors] == ["/distillation/data/label_column"]
    with pytest.raises(InvalidRequest) as caught:
        world.distill(world.describe(student={"kind": "derive_student", "depth": 0.5}))
    assert [problem.pointer for problem in caught.value.errors] == ["/distillation/student/depth"]
    assert world.count_jobs() == 0
