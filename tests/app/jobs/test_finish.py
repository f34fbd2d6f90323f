"""The end of an attempt: what it made is visible exactly when the job succeeded."""

import threading
from typing import Any

import pytest
from sqlalchemy import select

from app import jobs
from app.db.tables import ArtifactRow, Base, LogRow
from app.errors import Conflict
from app.jobs import Claim
from app.recipes.facts import DatasetFacts, ModelFacts
from app.recipes.metrics import Metrics
from app.recipes.plan import ArtifactFile, EngineResult
from app.storage import Blob
from tests.app.jobs.world import REFUSAL, World, dataset_facts, model_facts

BLOB = Blob("cd" * 32, 1234)
LOG = Blob("ef" * 32, 99)
ARTIFACT = ArtifactFile(name="model.onnx", media_type="application/onnx", size_bytes=1, sha256="00" * 32)
TIMES = {"p50_ms": 1.0, "p90_ms": 1.0, "p99_ms": 1.0, "mean_ms": 1.0}
LATENCY = {"batch_size": 1, "num_threads": 1, "num_runs": 10, **TIMES}
MEASUREMENT: dict[str, Any] = {
    "quality": None,
    "latency": LATENCY,
    "throughput_per_second": 1000.0,
    "peak_memory_bytes": 1,
    "file_bytes": 1,
    "parameters": 1,
    "nonzero_parameters": 1,
    "macs": None,
}
METRICS = Metrics.model_validate(
    {
        "baseline": MEASUREMENT,
        "result": MEASUREMENT,
        "comparison": {
            "latency_ratio": {"value": 1.0, "low": 0.9, "high": 1.1},
            "file_ratio": 1.0,
            "parameters_ratio": 1.0,
            "macs_ratio": None,
            "peak_memory_ratio": None,
            "quality_change": None,
            "equivalence": [],
        },
        "steps": [],
        "layers": [],
        "verdict": {"outcome": "no_difference", "summary": "nothing changed"},
        "environment": {"processor": "x", "num_cores": 1, "runtime": "torch", "num_threads": 1, "versions": {}},
    }
)
RESULT = EngineResult(metrics=METRICS, artifacts=(ARTIFACT,))


def succeed(world: World, claim: Claim, result: EngineResult = RESULT) -> bool:
    with world.database.session() as session:
        return jobs.succeed(session, claim, result, {"model.onnx": BLOB}, ["bubblewrap", "rlimits"], LOG)


def rows(world: World, table: type[Base]) -> list[Any]:
    with world.database.read() as session:
        return list(session.scalars(select(table)))


def test_success_shows_artifacts_metrics_and_log_together(world: World) -> None:
    claim = world.start()
    assert rows(world, ArtifactRow) == []
    assert succeed(world, claim)
    job = world.job(claim.job_id)
    assert job.state == "succeeded"
    assert job.finished_at is not None
    assert job.lease_until is None
    assert Metrics.model_validate(job.metrics) == METRICS
    assert job.verdict["outcome"] == "no_difference"
    assert job.isolation == ["bubblewrap", "rlimits"]
    assert job.progress["fraction"] == 1
    artifact = rows(world, ArtifactRow)[0]
    assert artifact.id.startswith("art_")
    assert (artifact.name, artifact.epoch, artifact.owner) == ("model.onnx", 1, "local")
    assert (artifact.sha256, artifact.size_bytes) == (BLOB.sha256, BLOB.size_bytes), "the engine's word was believed"
    assert [(log.attempt, log.sha256) for log in rows(world, LogRow)] == [(1, LOG.sha256)]
    assert world.states(claim.job_id) == ["queued", "running", "succeeded"]


def test_second_success_changes_nothing(world: World) -> None:
    claim = world.start()
    assert succeed(world, claim)
    assert not succeed(world, claim)
    assert len(rows(world, ArtifactRow)) == 1


def test_artifacts_of_a_lost_attempt_are_never_visible(world: World) -> None:
    stale = world.start()
    world.expire_lease(stale.job_id)
    world.reap()
    fresh = world.start(stale.job_id)
    assert not succeed(world, stale)
    assert rows(world, ArtifactRow) == []
    assert rows(world, LogRow) == []
    assert succeed(world, fresh)
    assert [artifact.epoch for artifact in rows(world, ArtifactRow)] == [2]


def test_cancellation_that_came_first_wins_over_success(world: World) -> None:
    claim = world.start()
    world.cancel(claim.job_id)
    assert not succeed(world, claim)
    with world.database.session() as session:
        assert jobs.confirm_cancelled(session, claim, LOG)
    assert world.states(claim.job_id) == ["queued", "running", "cancelling", "cancelled"]
    assert rows(world, ArtifactRow) == []
    assert len(rows(world, LogRow)) == 1


def test_nobody_confirms_what_nobody_cancelled(world: World) -> None:
    claim = world.start()
    with world.database.session() as session:
        assert not jobs.confirm_cancelled(session, claim)
    assert world.job(claim.job_id).state == "running"


def test_crash_after_the_artifacts_undoes_all(world: World) -> None:
    claim = world.start()

    def crash() -> None:
        with world.database.session() as session:
            jobs.succeed(session, claim, RESULT, {"model.onnx": BLOB}, [])
            raise RuntimeError("crash before commit")

    with pytest.raises(RuntimeError):
        crash()
    assert rows(world, ArtifactRow) == []
    assert world.states(claim.job_id) == ["queued", "running"]


def test_retryable_failure_waits_again_until_attempts_are_used_up(world: World) -> None:
    job_id = world.submit()
    world.clear_outbox()
    for attempt in (1, 2):
        claim = world.start(job_id)
        assert claim.attempt == attempt
        assert world.fail(claim)
        job = world.job(job_id)
        assert (job.state, job.lease_until, job.worker_id, job.error) == ("queued", None, None, None)
        assert world.outbox() == [job_id]
        world.clear_outbox()
    claim = world.start(job_id)
    assert claim.is_last_attempt
    assert world.fail(claim)
    job = world.job(job_id)
    assert (job.state, job.attempt, job.error["code"]) == ("failed", 3, "engine_crashed")
    assert job.finished_at is not None
    assert world.outbox() == []
    assert world.states(job_id) == ["queued", *["running", "queued"] * 2, "running", "failed"]
    assert world.events(job_id)[2].data == {
        "state": "queued", "attempt": 1, "reason": "engine_crashed", "detail": "exit code -11",
    }  # fmt: skip


def test_refusal_fails_at_once(world: World) -> None:
    claim = world.start()
    assert world.fail(claim, REFUSAL)
    assert world.job(claim.job_id).state == "failed"


def test_cancel_wins_over_retry(world: World) -> None:
    claim = world.start()
    world.cancel(claim.job_id)
    world.clear_outbox()
    assert world.fail(claim)
    assert world.job(claim.job_id).state == "cancelled"
    assert world.outbox() == []
    assert world.claim(claim.job_id) is None


def test_released_attempt_does_not_count(world: World) -> None:
    job_id = world.submit()
    for _ in range(5):
        claim = world.start(job_id)
        world.clear_outbox()
        with world.database.session() as session:
            assert jobs.release(session, claim, "worker_stopped")
        assert world.outbox() == [job_id]
    job = world.job(job_id)
    assert job.max_attempts - job.attempt == world.settings.max_attempts


def test_released_job_that_was_cancelled_ends(world: World) -> None:
    claim = world.start()
    world.cancel(claim.job_id)
    with world.database.session() as session:
        assert jobs.release(session, claim, "worker_stopped")
    assert world.job(claim.job_id).state == "cancelled"


def test_checks_make_uploads_ready_with_their_facts(world: World) -> None:
    model_id, dataset_id = world.add_model("checking"), world.add_dataset("checking")
    for upload, result, action in (
        ({"model_id": model_id}, EngineResult(model=model_facts()), "check_model"),
        ({"dataset_id": dataset_id}, EngineResult(dataset=dataset_facts()), "check_dataset"),
    ):
        claim = world.start(world.check(**upload))
        assert claim.action == action
        assert [claim.model.id] if claim.model else [file.id for file in claim.datasets] == list(upload.values())
        with world.database.session() as session:
            assert jobs.succeed(session, claim, result, {}, [])
    model, dataset = world.upload(model_id), world.upload(dataset_id)
    assert (model.state, ModelFacts.model_validate(model.facts)) == ("ready", model_facts())
    assert (dataset.state, DatasetFacts.model_validate(dataset.facts)) == ("ready", dataset_facts())


def test_failed_check_rejects_the_upload_with_the_reason(world: World) -> None:
    model_id = world.add_model("checking")
    claim = world.start(world.check(model_id=model_id))
    assert world.fail(claim, REFUSAL)
    model = world.upload(model_id)
    assert (model.state, model.error["code"], model.facts) == ("rejected", "step_failed", None)


def test_check_that_crashed_is_tried_again_before_the_upload_is_rejected(world: World) -> None:
    dataset_id = world.add_dataset("checking")
    job_id = world.check(dataset_id=dataset_id)
    for expected in ("checking", "checking", "rejected"):
        assert world.fail(world.start(job_id))
        assert world.upload(dataset_id).state == expected


def test_cancel_and_success_at_once_end_in_one_of_the_two(world: World) -> None:
    for _ in range(15):
        claim = world.start()
        barrier = threading.Barrier(2)
        conflicts: list[str] = []
        threads = [
            threading.Thread(target=_finish, args=(world, claim, barrier)),
            threading.Thread(target=_cancel, args=(world, claim, barrier, conflicts)),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        state = world.job(claim.job_id).state
        num_artifacts = [artifact.job_id for artifact in rows(world, ArtifactRow)].count(claim.job_id)
        assert (state, num_artifacts) in {("succeeded", 1), ("cancelled", 0)}
        assert conflicts == (["job_finished"] if state == "succeeded" else [])


def _finish(world: World, claim: Claim, barrier: threading.Barrier) -> None:
    barrier.wait()
    if not succeed(world, claim):
        with world.database.session() as session:
            assert jobs.confirm_cancelled(session, claim)


def _cancel(world: World, claim: Claim, barrier: threading.Barrier, conflicts: list[str]) -> None:
    barrier.wait()
    try:
        world.cancel(claim.job_id)
    except Conflict as conflict:
        conflicts.append(conflict.code)


def test_last_number_equals_the_newest_event(world: World) -> None:
    claim = world.start()
    succeed(world, claim)
    last_seq = world.job(claim.job_id).last_seq
    assert [event.seq for event in world.events(claim.job_id)] == list(range(1, last_seq + 1))
