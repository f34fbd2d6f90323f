"""One attempt of a job against engines that act out every fault."""

import errno
import os
import signal
import threading
import time
from collections.abc import Callable

import pytest
from sqlalchemy import select, update

from app.db.tables import ArtifactRow, EventRow, JobRow, LogRow, ModelRow
from app.jobs import cancel_job
from app.storage import owner_storage
from tests.worker.conftest import Bench, wait_until
from worker import watch
from worker.sandbox.launch import remove_directory
from worker.slot import Slot

Slots = Callable[..., Slot]


def run_in_thread(slot: Slot, job_id: str) -> threading.Thread:
    thread = threading.Thread(target=slot.supervisor.run, args=(job_id,), daemon=True)
    thread.start()
    return thread


def run(bench: Bench, slot: Slot, *acts: list[object], **options: object) -> JobRow:
    job_id = bench.queue(*acts, **options)  # type: ignore[arg-type]
    assert slot.supervisor.run(job_id)
    return bench.read(job_id)


def read_log(bench: Bench, job_id: str, attempt: int = 1) -> bytes:
    with bench.database.read() as session:
        log = session.get(LogRow, (job_id, attempt))
        assert log is not None
    return b"".join(owner_storage(bench.storage, "local").open(log.sha256))


@pytest.mark.parametrize("isolation", ["bubblewrap", "namespaces", "none"])
def test_a_job_succeeds_in_each_isolation(bench: Bench, open_slots: Slots, isolation: str) -> None:
    slot = open_slots(bench, isolation, single_user=True)

    job = run(bench, slot, ["say", "step", 0.5], ["artifact", "the bytes"])

    assert (job.state, job.error, job.verdict["summary"]) == ("succeeded", None, "acted out")  # type: ignore[index]
    assert job.isolation == slot.supervisor.isolation.layers
    with bench.database.read() as session:
        artifact = session.scalars(select(ArtifactRow).where(ArtifactRow.job_id == job.id)).one()
        stages = [
            e.data["stage"] for e in session.scalars(select(EventRow).order_by(EventRow.seq)) if e.kind == "progress"
        ]
    assert b"".join(owner_storage(bench.storage, "local").open(artifact.sha256)) == b"the bytes"
    assert stages == ["started", "step"]


def test_an_accepted_upload_becomes_ready(bench: Bench, slot: Slot) -> None:
    job = run(bench, slot, ["finish"], action="check_model")

    with bench.database.read() as session:
        model = session.get(ModelRow, job.model_id)
    assert model is not None
    assert (job.state, model.state) == ("succeeded", "ready")


def test_a_finished_job_and_an_unknown_one_are_left_alone(bench: Bench, slot: Slot) -> None:
    job = run(bench, slot, ["finish"])

    assert not slot.supervisor.run(job.id)
    assert not slot.supervisor.run("job_" + "0" * 26)
    assert bench.read(job.id).attempt == 1


MAX_ENTRIES = 5_000
FAULTS: dict[str, tuple[list[list[object]], str]] = {
    "exit 0 without a result": ([["exit", 0]], "no_result"),
    "exit 1": ([["exit", 1]], "engine_failed"),
    "sys.exit in a thread": ([["exit_in_thread"]], "no_result"),
    "segmentation fault": ([["kill_self", signal.SIGSEGV]], "engine_crashed"),
    "memory": ([["allocate", 2**33]], "out_of_memory"),
    "result is not JSON": ([["write", "out/result.json", "{"]], "bad_result"),
    "result is a link": ([["link", "/etc/hostname", "out/result.json"]], "bad_result"),
    "result of another action": ([["result", {"error": None}]], "bad_result"),
    "artifact name climbs out": ([["artifact", "x", "../model.onnx"]], "bad_result"),
    "artifact is missing": ([["artifact", "x", "other.onnx"]], "bad_artifact"),
    "artifact is a link": ([["link", "/usr/bin/env", "out/artifacts/model.onnx"], ["artifact"]], "bad_artifact"),
    "artifacts folder is a link": ([["link", "/usr/bin", "out/artifacts"], ["result", None]], "bad_result"),
    "media type too long": ([["artifact", "x", "model.onnx", {"media_type": "a/" + "b" * 99}]], "bad_result"),
    "artifact digest": ([["artifact", "x", "model.onnx", {"sha256": "0" * 64}]], "bad_artifact"),
    "artifact size": ([["artifact", "x", "model.onnx", {"size_bytes": 7}]], "bad_artifact"),
    "artifact does not verify": ([["artifact", "broken"]], "verification_failed"),
    "folders nested too deep": ([["nest", "out", 3000], ["sleep", 600]], "disk_limit_exceeded"),
    "too many folders": ([["many_folders", "tmp", MAX_ENTRIES + 1], ["sleep", 600]], "disk_limit_exceeded"),
    "file too large": ([["write_bytes", "out/big", 64 * 2**20], ["finish"]], "engine_failed"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_has_its_code_and_publishes_nothing(
    bench: Bench, slot: Slot, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.job_files._MAX_ENTRIES", MAX_ENTRIES)  # a hundred thousand folders take their time
    acts, code = FAULTS[fault]

    job = run(bench, slot, *acts)

    assert job.state == "failed"
    assert job.error is not None
    assert job.error["code"] == code, job.error
    assert job.error["fix"]
    with bench.database.read() as session:
        assert session.scalars(select(ArtifactRow)).all() == []


def test_an_engine_killed_from_outside_is_tried_again_but_not_forever(bench: Bench, slot: Slot) -> None:
    job = run(bench, slot, ["kill_self", signal.SIGKILL], attempts=2)
    assert (job.state, job.attempt) == ("queued", 1)

    assert slot.supervisor.run(job.id)

    job = bench.read(job.id)
    assert (job.state, job.attempt) == ("failed", 2)
    assert job.error is not None
    assert job.error["code"] == "engine_killed"


@pytest.mark.parametrize("isolation", ["bubblewrap", "namespaces", "none"])
def test_cancel_ends_an_engine_that_resists_with_all_its_children(
    bench: Bench, open_slots: Slots, isolation: str
) -> None:
    slot = open_slots(bench, isolation, single_user=True, standby=False)
    job_id = bench.queue(["ignore_sigterm"], ["leave_grandchild"], ["say", "resisting"], ["sleep", 600])
    thread = run_in_thread(slot, job_id)
    wait_until(lambda: bench.read(job_id).stage == "resisting")
    assert len(bench.processes()) >= 3

    with bench.database.session() as session:
        cancel_job(session, "local", job_id)
    thread.join(15)

    assert bench.read(job_id).state == "cancelled"
    assert bench.processes() == []
    assert run(bench, slot, ["finish"]).state == "succeeded", "the slot is free again"


def test_cancel_lets_an_engine_that_obeys_end_at_once(bench: Bench, open_slots: Slots) -> None:
    bench = Bench(**{**vars(bench), "settings": bench.settings.model_copy(update={"cancel_grace_seconds": 20})})
    slot = open_slots(bench)
    job_id = bench.queue(["say", "working"], ["sleep", 600])
    thread = run_in_thread(slot, job_id)
    wait_until(lambda: bench.read(job_id).stage == "working")

    with bench.database.session() as session:
        cancel_job(session, "local", job_id)
    thread.join(10)

    assert bench.read(job_id).state == "cancelled"


def test_a_job_past_its_deadline_fails_and_is_gone(bench: Bench, open_slots: Slots) -> None:
    slot = open_slots(bench, standby=False)

    job = run(bench, slot, ["ignore_sigterm"], ["leave_grandchild"], ["sleep", 600], deadline_seconds=1)

    assert job.error is not None
    assert job.error["code"] == "deadline_exceeded"
    assert bench.processes() == []


def test_an_engine_that_says_nothing_for_long_is_stuck(bench: Bench, open_slots: Slots) -> None:
    job = run(bench, open_slots(bench, progress_timeout_seconds=0.5), ["sleep", 600])

    assert job.error is not None
    assert job.error["code"] == "engine_stuck"


def test_an_engine_that_fills_the_disk_is_ended(bench: Bench, open_slots: Slots) -> None:
    slot = open_slots(bench, max_disk_bytes=5 * 2**20)

    job = run(bench, slot, ["write_bytes", "tmp/a", 8 * 2**20], ["sleep", 600])

    assert job.error is not None
    assert job.error["code"] == "disk_limit_exceeded"


def test_files_in_a_locked_folder_count(bench: Bench, open_slots: Slots) -> None:
    slot = open_slots(bench, max_disk_bytes=5 * 2**20)

    job = run(bench, slot, ["hide", "tmp/locked", 8 * 2**20], ["sleep", 600])

    assert job.error is not None
    assert job.error["code"] == "disk_limit_exceeded"


def test_a_file_of_holes_is_not_turned_into_bytes(bench: Bench, open_slots: Slots) -> None:
    slot = open_slots(bench, max_disk_bytes=5 * 2**20)

    job = run(bench, slot, ["hole", 30 * 2**20])

    assert job.error is not None
    assert job.error["code"] == "artifact_too_large"


def test_folders_nested_beyond_every_path_are_removed(
    bench: Bench, slot: Slot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "DISK_LOOK_SECONDS", 600)  # the look at the disk would end it, if it came in time
    job = run(bench, slot, ["nest", "out", 3000], ["nest", "tmp", 1500], ["finish"])

    assert job.state == "succeeded"
    wait_until(lambda: len([p for p in slot.workspace.path.iterdir() if p.is_dir()]) <= 1)


def test_a_full_disk_fails_the_job_by_its_name_and_not_the_worker(
    bench: Bench, slot: Slot, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(watch, "write_plan", full)
        job = run(bench, slot, ["finish"], attempts=1)

    assert job.error is not None
    assert job.error["code"] == "storage_full"
    assert run(bench, slot, ["finish"]).state == "succeeded"


def test_a_stale_owner_ends_its_engine_and_writes_nothing(bench: Bench, open_slots: Slots) -> None:
    slot = open_slots(bench, standby=False)
    job_id = bench.queue(["say", "working"], ["sleep", 1], ["say", "late", 0.9], ["sleep", 600])
    thread = run_in_thread(slot, job_id)
    wait_until(lambda: bench.read(job_id).stage == "working")

    with bench.database.session() as session:  # what a reaper and a second owner do
        session.execute(update(JobRow).where(JobRow.id == job_id).values(epoch=JobRow.epoch + 1, worker_id="other"))
    thread.join(15)

    job = bench.read(job_id)
    assert (job.state, job.worker_id, job.stage, job.error) == ("running", "other", "working", None)
    assert bench.processes() == []


def test_a_finish_that_comes_too_late_publishes_nothing(bench: Bench, open_slots: Slots) -> None:
    slot = open_slots(bench, cancel_poll_seconds=60)
    job_id = bench.queue(["say", "working"], ["sleep", 0.5], ["finish"])
    bench_epoch = JobRow.epoch + 1
    thread = run_in_thread(slot, job_id)
    wait_until(lambda: bench.read(job_id).stage == "working")
    with bench.database.session() as session:
        session.execute(update(JobRow).where(JobRow.id == job_id).values(epoch=bench_epoch))
    thread.join(15)

    with bench.database.read() as session:
        assert session.scalars(select(ArtifactRow)).all() == []
    assert bench.read(job_id).state == "running"


@pytest.mark.short_leases
def test_a_worker_without_its_database_ends_its_engine_before_the_lease_does(bench: Bench, open_slots: Slots) -> None:
    slot = open_slots(bench, standby=False)
    job_id = bench.queue(["say", "working"], ["sleep", 600])
    thread = run_in_thread(slot, job_id)
    wait_until(lambda: bench.read(job_id).stage == "working")
    started_at = time.monotonic()
    with bench.database.session() as session:  # SQLite: a held writer blocks every heartbeat
        session.execute(update(JobRow).where(JobRow.id == job_id).values(stage="held"))
        wait_until(lambda: bench.processes() == [], 10, "self-fencing")
        waited = time.monotonic() - started_at

    assert waited < bench.settings.lease_seconds
    thread.join(20)
    assert not thread.is_alive()


def test_a_stopping_worker_gives_its_job_back_without_counting_the_attempt(bench: Bench, slot: Slot) -> None:
    job_id = bench.queue(["say", "working"], ["sleep", 600], attempts=1)
    thread = run_in_thread(slot, job_id)
    wait_until(lambda: bench.read(job_id).stage == "working")

    slot.supervisor.stopping.set()
    thread.join(10)

    job = bench.read(job_id)
    assert job.state == "queued"
    assert job.max_attempts - job.attempt == 1


def test_floods_of_output_are_capped(bench: Bench, slot: Slot) -> None:
    job = run(bench, slot, ["flood", 2, 64], ["flood", 1, 16], ["print_raw", "\x1b[2Jfake\n", 2000], ["finish"])

    assert job.state == "succeeded"
    log = read_log(bench, job.id)
    assert len(log) < bench.settings.max_log_bytes + 1000
    assert b"bytes left out" in log
    assert b"\x1b" not in log
    with bench.database.read() as session:
        assert len(session.scalars(select(EventRow)).all()) < 10


def test_a_flood_of_progress_becomes_few_events(bench: Bench, slot: Slot) -> None:
    line = '{"stage":"train","fraction":0.5,"message":"\\u001b[1mhi"}\n'

    job = run(bench, slot, ["print_raw", line, 20_000], ["finish"])

    with bench.database.read() as session:
        progress = [event.data for event in session.scalars(select(EventRow)) if event.kind == "progress"]
    assert job.state == "succeeded"
    assert 1 <= len(progress) < 200
    assert progress[-1]["message"] == "?[1mhi"


def test_progress_never_falls_and_lies_are_not_believed(bench: Bench, slot: Slot) -> None:
    lies = ['{"stage":"x","fraction":7}', '{"stage":"../x","fraction":0}', '{"stage":"x"}', "[" * 60_000, "y" * 200_000]

    prints: list[list[object]] = [["print_raw", lie + "\n"] for lie in lies]

    job = run(bench, slot, *prints, ["say", "a", 0.6], ["say", "b", 0.2], ["finish"])

    with bench.database.read() as session:
        rows = session.scalars(select(EventRow).order_by(EventRow.seq))
        told = [(row.data["stage"], row.data["fraction"]) for row in rows if row.kind == "progress"]
    assert job.state == "succeeded"
    assert told == [("started", 0.0), ("a", 0.6), ("b", 0.6)]


def test_a_corrupt_upload_is_not_run(bench: Bench, slot: Slot) -> None:
    job_id = bench.queue(["finish"])
    with bench.database.session() as session:
        session.execute(update(ModelRow).values(sha256="0" * 64))

    slot.supervisor.run(job_id)

    job = bench.read(job_id)
    assert job.state == "failed"
    assert job.error is not None
    assert job.error["code"] == "blob_missing"


def test_an_upload_that_rotted_fails_the_job_and_is_put_aside(bench: Bench, slot: Slot) -> None:
    job_id = bench.queue(["finish"])
    (path,) = (bench.settings.data_dir / "store" / "blobs" / "owners").rglob("*/" + "?" * 64)
    path.write_bytes(path.read_bytes()[:-1] + b"x")

    slot.supervisor.run(job_id)

    job = bench.read(job_id)
    assert (job.state, job.error and job.error["code"]) == ("failed", "integrity")
    assert not path.exists()
    assert len(list((bench.settings.data_dir / "store" / "quarantine").rglob(path.name))) == 1


def test_directories_that_the_engine_locked_are_removed(bench: Bench, slot: Slot) -> None:
    job = run(bench, slot, ["lock_directory", "out/locked"], ["lock_directory", "tmp/locked"], ["finish"])

    assert job.state == "succeeded"
    wait_until(lambda: len([p for p in slot.workspace.path.iterdir() if p.is_dir()]) <= 1)


def test_what_a_removal_cut_short_has_left_goes_away(bench: Bench, open_slots: Slots) -> None:
    work = bench.settings.data_dir / "work"
    for name in ("old", "new"):
        (work / name / "job").mkdir(parents=True)
    (work / "stray").touch()
    os.utime(work / "old", (0, 0))

    open_slots(bench)

    assert not (work / "old").exists()
    assert (work / "new").exists()
    remove_directory(work / "new")


def test_without_isolation_jobs_stay_queued_unless_for_a_single_user(bench: Bench, open_slots: Slots) -> None:
    slot = open_slots(bench, "none")
    job_id = bench.queue(["finish"])

    assert not slot.supervisor.run(job_id)

    assert bench.read(job_id).state == "queued"
    assert slot.presence._facts["accepts_jobs"] is False
    assert bench.processes() == []
