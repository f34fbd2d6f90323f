"""The oracle sees each kind of damage: a good history passes, and fails with any one thing changed in it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from app.db.clock import db_now
from app.db.session import Database
from app.db.tables import ArtifactRow, EventRow, JobRow, LogRow, ModelRow, OutboxRow
from app.jobs import cancel_job, claim, succeed
from app.jobs.lifecycle import State, move
from app.recipes.plan import ArtifactFile, EngineResult
from app.storage import Blob, Storage, owner_storage
from tests.faults.oracle import Answer, History, find_violations
from tests.worker.conftest import Bench
from tests.worker.conftest import bench as bench

SECRET = "a secret"
PROBLEM = json.dumps({"code": "not_found", "detail": "there is none"}).encode()


class Past:
    """One job that succeeded, one that was cancelled, and what was answered."""

    def __init__(self, bench: Bench) -> None:
        self.database: Database = bench.database
        self.storage: Storage = bench.storage
        self.log = bench.settings.data_dir / "worker.log"
        self.log.write_text("started\n")
        self.job_id = bench.queue(["finish"])
        self.cancelled_id = bench.queue(["finish"])
        self.artifact, log = self.store(b"artifact"), self.store(b"log of the engine")
        told = ArtifactFile(
            name="model.onnx", media_type="a/b", size_bytes=self.artifact.size_bytes, sha256=self.artifact.sha256
        )
        with self.database.session() as session:
            held = claim(session, self.job_id, "w", 30)
            assert held is not None
            assert succeed(session, held, EngineResult(artifacts=(told,)), {"model.onnx": self.artifact}, [], log)
            cancel_job(session, "local", self.cancelled_id)
            session.execute(delete(OutboxRow))
        answers = [Answer("GET", "/v1/jobs/x", 404, "application/problem+json", PROBLEM)]
        self.history = History({self.job_id, self.cancelled_id}, {self.cancelled_id}, answers)

    def store(self, data: bytes) -> Blob:
        with owner_storage(self.storage, "local").writer() as writer:
            writer.write(data)
            return writer.commit()

    def place(self, blob: Blob) -> Path:
        return self.log.parent / "store" / "blobs" / "owners" / "local" / blob.sha256[:2] / blob.sha256

    def find(self) -> list[str]:
        return find_violations(self.database, self.storage, self.history, secrets=[SECRET], logs=[self.log])


@pytest.fixture
def past(bench: Bench) -> Past:
    return Past(bench)


def test_a_good_history_passes(past: Past) -> None:
    assert past.find() == []


def of_job(past: Past, **values: object) -> Callable[[Session], object]:
    return lambda session: session.execute(update(JobRow).where(JobRow.id == past.job_id).values(**values))


def move_back(past: Past) -> Callable[[Session], object]:
    def act(session: Session) -> None:
        values = {"state": State.QUEUED.value, "last_seq": JobRow.last_seq + 1}
        session.execute(update(JobRow).where(JobRow.id == past.job_id).values(**values))
        seq = session.scalars(select(JobRow.last_seq).where(JobRow.id == past.job_id)).one()
        data = {"state": "queued", "attempt": 1}
        session.add(EventRow(job_id=past.job_id, seq=seq, kind="state", data=data, created_at=db_now()))
        session.flush()
        move(session, past.job_id, sources=[State.QUEUED], target=State.CANCELLED)

    return act


ROWS: dict[str, tuple[str, Callable[[Past], Callable[[Session], object]]]] = {
    "a job that is not over": ("I1", lambda past: of_job(past, state="running")),
    "a hint that is not sent": (
        "I1",
        lambda past: lambda session: session.add(OutboxRow(job_id=past.job_id, created_at=db_now())),
    ),
    "a lease that was not given back": ("I2", lambda past: of_job(past, lease_until=db_now())),
    "a second epoch that nobody claimed": ("I2", lambda past: of_job(past, epoch=2)),
    "a move out of an end": ("I2: it moved from succeeded", move_back),
    "artifacts of an older epoch": (
        "I3", lambda _: lambda session: session.execute(update(ArtifactRow).values(epoch=0)),
    ),
    "no artifacts": ("I3", lambda _: lambda session: session.execute(delete(ArtifactRow))),
    "artifacts of a failed job": ("I3", lambda past: of_job(past, state="failed")),
    "an artifact of another owner": (
        "I6", lambda _: lambda session: session.execute(update(ArtifactRow).values(owner="eve")),
    ),
    "a model of another owner": (
        "I6", lambda _: lambda session: session.execute(update(ModelRow).values(owner="eve")),
    ),
    "too many attempts": ("I7", lambda past: of_job(past, max_attempts=0)),
    "a gap in the events": (
        "I10", lambda _: lambda session: session.execute(delete(EventRow).where(EventRow.seq == 2)),
    ),
    "a size that is wrong": ("I4", lambda _: lambda session: session.execute(update(LogRow).values(size_bytes=1))),
    "a blob that is not there": (
        "I4", lambda _: lambda session: session.execute(update(LogRow).values(sha256="0" * 64)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", ROWS)
def test_damaged_rows_are_seen(past: Past, damage: str) -> None:
    expected, make = ROWS[damage]
    with past.database.session() as session:
        make(past)(session)

    assert any(violation.startswith(expected) for violation in past.find()), past.find()


def test_a_lost_job_is_seen(past: Past) -> None:
    past.history.accepted.add("job_" + "0" * 26)

    assert past.find() == [f"I1: accepted job job_{'0' * 26} is lost"]


def test_a_cancel_that_was_forgotten_is_seen(past: Past) -> None:
    past.history.cancelled.add(past.job_id)

    assert past.find() == [f"I2: its cancel was accepted, and it succeeded (job {past.job_id})"]


def test_other_bytes_are_seen(past: Past) -> None:
    past.place(past.artifact).write_bytes(b"artifice")

    assert [violation[:3] for violation in past.find()] == ["I4:"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (Answer("GET", "/v1/jobs", 500, "application/problem+json", PROBLEM), "I8"),
        (Answer("GET", "/v1/jobs", 404, "text/plain", b"Not Found"), "I8"),
        (Answer("GET", "/v1/jobs", 404, "application/problem+json", b"{}"), "I8"),
        (Answer("GET", "/v1/jobs", 200, "application/json", SECRET.encode()), "I11"),
    ],
)
def test_bad_answers_are_seen(past: Past, answer: Answer, expected: str) -> None:
    past.history.answers.append(answer)

    assert [violation[: len(expected)] for violation in past.find()] == [expected]


def test_paths_of_the_host_in_answers_are_seen(past: Past) -> None:
    body = f"cannot open {past.log.parent}/store".encode()
    past.history.answers.append(Answer("GET", "/v1/jobs", 200, "application/json", body))

    assert [violation[:4] for violation in past.find()] == ["I11:"]


def test_secrets_in_the_log_are_seen(past: Past) -> None:
    past.log.write_text(f"connecting with {SECRET}\n")

    assert past.find() == ["I11: worker.log tells a secret"]
