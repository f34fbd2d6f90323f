"""Checkpoints on their way from an engine into storage and back, against engines and workers that die or lie."""

import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from app.db.tables import CheckpointRow, EventRow, JobRow
from app.jobs import Place, StoredCheckpoint, record_checkpoint, retry_job
from app.storage import Blob, checkpoint_storage, owner_storage
from tests.worker.conftest import Bench, wait_until
from worker.slot import Slot

Slots = Callable[..., Slot]
KILLED: list[object] = ["kill_self", signal.SIGKILL]
DATA = {
    "dataset_id": "dst_" + "a" * 26,
    "label_column": "y",
    "task": "classification",
    "inputs": {"x": {"column": "x"}},
}
TRAINS = {"steps": [{"kind": "finetune"}], "data": DATA}


def rows_of(bench: Bench, job_id: str) -> list[CheckpointRow]:
    with bench.database.read() as session:
        query = select(CheckpointRow).where(CheckpointRow.job_id == job_id).order_by(CheckpointRow.seq)
        return list(session.scalars(query))


def events_of(bench: Bench, job_id: str, kind: str) -> list[dict[str, Any]]:
    with bench.database.read() as session:
        query = select(EventRow).where(EventRow.job_id == job_id, EventRow.kind == kind).order_by(EventRow.seq)
        return [row.data for row in session.scalars(query)]


def files_of(bench: Bench, job_id: str) -> list[Path]:
    folder = bench.settings.data_dir / "store" / "blobs" / "checkpoints" / job_id
    return [path for path in folder.rglob("*") if path.is_file()]


def messages_of(bench: Bench, job_id: str) -> list[str]:
    return [data["message"] for data in events_of(bench, job_id, "progress") if data["message"]]


def run(bench: Bench, slot: Slot, *acts: list[object], **job: Any) -> JobRow:
    job_id = bench.queue(*acts, **job)
    assert slot.supervisor.run(job_id)
    return bench.read(job_id)


def train_in(acts: list[list[object]]) -> list[object]:
    """Return an act that does these in the first attempt, and in the next tells what it found."""
    return ["unless_resumed", acts]


def test_the_next_attempt_gets_what_the_killed_one_wrote(bench: Bench, slot: Slot) -> None:
    job = run(bench, slot, train_in([["checkpoint", "one"], ["sleep", 0.5], ["checkpoint", "two"], KILLED]), ["finish"])
    assert (job.state, job.attempt) == ("queued", 1)
    first, second = rows_of(bench, job.id)
    assert (first.stage, first.step, first.fraction, first.epoch) == ("training", 0, 0.25, 1)
    assert first.seq < second.seq
    assert [data["size_bytes"] for data in events_of(bench, job.id, "checkpoint")] == [3, 3]

    assert slot.supervisor.run(job.id)

    job = bench.read(job.id)
    assert (job.state, job.attempt) == ("succeeded", 2)
    assert messages_of(bench, job.id) == ["two one"], "newest first"
    assert events_of(bench, job.id, "resumed") == [{"stage": "training", "step": 0, "fraction": 0.25}]
    assert job.resumed_from == {"stage": "training", "step": 0, "fraction": 0.25}
    assert rows_of(bench, job.id) == []
    assert files_of(bench, job.id) == []


def test_only_the_newest_two_are_kept(bench: Bench, slot: Slot) -> None:
    acts: list[list[object]] = []
    for text in ("one", "two", "three", "four"):
        acts += [["checkpoint", text], ["sleep", 0.5]]

    job = run(bench, slot, *acts, ["sleep", 1], KILLED)

    rows = rows_of(bench, job.id)
    assert len(rows) == 2
    wait_until(lambda: {path.name for path in files_of(bench, job.id)} >= {row.sha256 for row in rows})
    assert len(files_of(bench, job.id)) <= 3


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(bench: Bench, slot: Slot, damage: str) -> None:
    job = run(bench, slot, train_in([["checkpoint", "one"], ["sleep", 0.5], ["checkpoint", "two"], KILLED]), ["finish"])
    newest = rows_of(bench, job.id)[-1]
    path = next(path for path in files_of(bench, job.id) if path.name == newest.sha256)
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"tw" if damage == "truncated" else b"twp")

    assert slot.supervisor.run(job.id)

    assert bench.read(job.id).state == "succeeded"
    assert messages_of(bench, job.id) == ["one"]


def test_without_a_good_checkpoint_the_job_starts_from_the_beginning(bench: Bench, slot: Slot) -> None:
    job = run(bench, slot, ["checkpoint", "one"], ["unless_resumed", [["say", "from_the_begin"]]], KILLED, attempts=2)
    for path in files_of(bench, job.id):
        path.unlink()

    assert slot.supervisor.run(job.id)

    assert [data["stage"] for data in events_of(bench, job.id, "progress")].count("from_the_begin") == 2
    assert bench.read(job.id).resumed_from is None


LIES: dict[str, list[object]] = {
    "digest": ["checkpoint", "x", 0, {"sha256": "0" * 64}],
    "size": ["checkpoint", "x", 0, {"size_bytes": 7}],
    "name": ["checkpoint", "x", 0, {"name": "nobody"}],
    "path": ["checkpoint", "x", 0, {"name": "../../in/plan.json"}],
}


@pytest.mark.parametrize("lie", LIES)
def test_a_checkpoint_that_is_not_what_the_engine_says_is_not_taken(bench: Bench, slot: Slot, lie: str) -> None:
    job = run(bench, slot, LIES[lie], ["sleep", 0.3], ["finish"])

    assert job.state == "succeeded"
    assert events_of(bench, job.id, "checkpoint") == []


def test_a_link_to_another_file_is_not_taken(bench: Bench, slot: Slot) -> None:
    told = json.dumps({"name": "link", "size_bytes": 1, "sha256": "0" * 64})
    job = run(
        bench, slot, ["link", "/etc/hostname", "out/checkpoints/link"],
        ["print_raw", f'{{"stage": "training", "fraction": 0.1, "checkpoint": {told}}}\n'],
        ["sleep", 0.3], ["finish"],
    )  # fmt: skip

    assert job.state == "succeeded"
    assert events_of(bench, job.id, "checkpoint") == []


def test_an_attempt_that_lost_its_job_records_nothing(bench: Bench, slot: Slot) -> None:
    job = run(bench, slot, ["checkpoint", "one"], ["sleep", 0.3], KILLED)
    (row,) = rows_of(bench, job.id)
    slot.supervisor.run(job.id)
    stale = StoredCheckpoint(Place("training", 0, 0.9), Blob("f" * 64, 10))

    with bench.database.session() as session:
        assert record_checkpoint(session, job.id, row.epoch, stale) is None

    assert all(each.sha256 != "f" * 64 for each in rows_of(bench, job.id))


def test_a_stopping_worker_lets_the_engine_write_a_checkpoint(bench: Bench, open_slots: Slots) -> None:
    slot = open_slots(bench, checkpoint_grace_seconds=30)
    job_id = bench.queue(train_in([["say", "training"], ["wait_for_stop", "last"]]), ["finish"], attempts=1)
    thread = threading.Thread(target=slot.supervisor.run, args=(job_id,), daemon=True)
    thread.start()
    wait_until(lambda: bench.read(job_id).stage == "training")

    slot.supervisor.stopping.set()
    thread.join(60)

    job = bench.read(job_id)
    assert (job.state, job.max_attempts - job.attempt) == ("queued", 1)
    assert [row.size_bytes for row in rows_of(bench, job_id)] == [4]
    other = open_slots(bench)
    assert other.supervisor.run(job_id)
    assert bench.read(job_id).state == "succeeded"
    assert messages_of(bench, job_id) == ["last"]


def test_an_engine_that_does_not_hear_is_ended_within_the_grace(bench: Bench, open_slots: Slots) -> None:
    slot = open_slots(bench, checkpoint_grace_seconds=0.5)
    job_id = bench.queue(["ignore_sigterm"], ["say", "deaf"], ["sleep", 600])
    thread = threading.Thread(target=slot.supervisor.run, args=(job_id,), daemon=True)
    thread.start()
    wait_until(lambda: bench.read(job_id).stage == "deaf")

    slot.supervisor.stopping.set()
    thread.join(60)

    assert not thread.is_alive()
    assert bench.read(job_id).state == "queued"


def test_a_retry_goes_on_and_a_fresh_one_does_not(bench: Bench, slot: Slot) -> None:
    acts: list[list[object]] = [["unless_resumed", [["checkpoint", "one"], ["sleep", 0.3]]], ["exit", 3]]
    job = run(bench, slot, *acts)
    assert job.state == "failed"
    assert len(rows_of(bench, job.id)) == 1, "a failed job keeps its checkpoint"

    with bench.database.session() as session:
        retry_job(session, bench.settings, "local", job.id)
    slot.supervisor.run(job.id)
    assert len(events_of(bench, job.id, "resumed")) == 1
    with bench.database.session() as session:
        retry_job(session, bench.settings, "local", job.id, fresh=True)
    slot.supervisor.run(job.id)

    assert len(events_of(bench, job.id, "resumed")) == 1
    assert bench.read(job.id).resumed_from is None


def test_memory_that_runs_out_in_training_is_tried_once_with_smaller_parts(bench: Bench, slot: Slot) -> None:
    shortage: list[list[object]] = [["checkpoint", "before"], ["sleep", 0.3], ["out_of_memory"]]
    job = run(bench, slot, ["unless_split", shortage], ["unless_resumed", []], ["finish"], recipe=TRAINS)

    assert (job.state, job.attempt) == ("succeeded", 1)
    assert messages_of(bench, job.id) == ["before"], "the second engine goes on from the checkpoint of the first"


@pytest.mark.parametrize("kind", ["exception", "exit"])
def test_memory_that_runs_out_again_is_an_error_with_its_fix(bench: Bench, slot: Slot, kind: str) -> None:
    ends: list[list[object]] = [["out_of_memory"]]
    if kind == "exit":
        ends = [["print_error", "MemoryError"], ["exit", 1]]
    job = run(bench, slot, ["say", "finetune", 0.1, {"step": 0}], *ends, recipe=TRAINS)

    assert (job.state, job.attempt) == ("failed", 1), "not tried again blindly"
    assert job.error is not None
    assert job.error["code"] == "out_of_memory"
    assert "half as" in job.error["detail"]
    assert "batch_size" in job.error["fix"]


def test_memory_that_runs_out_elsewhere_is_not_tried_again(bench: Bench, slot: Slot) -> None:
    job = run(bench, slot, ["say", "prune_magnitude", 0.1, {"step": 0}], ["out_of_memory"])

    assert job.error is not None
    assert "half as" not in job.error["detail"]


def test_the_section_of_one_job_is_not_that_of_another(bench: Bench) -> None:
    one, other = (checkpoint_storage(bench.storage, name) for name in ("job_a", "job_b"))
    owned = owner_storage(bench.storage, "job_a")
    for section in (one, other, owned):
        with section.writer() as writer:
            writer.write(b"same")
            blob = writer.commit()

    one.clear()

    assert not checkpoint_storage(bench.storage, "job_a").exists(blob.sha256)
    assert other.exists(blob.sha256)
    assert owned.exists(blob.sha256)
