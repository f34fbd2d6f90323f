"""B: the job and those who run it. Whoever dies, stops or comes late, a job ends once and leaves no process."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

from sqlalchemy import select, update

from app.db.clock import db_now
from app.db.tables import ArtifactRow, EventRow, JobRow
from app.storage import owner_storage
from tests.faults.cases import POSTGRESQL, SQLITE, case
from tests.faults.stack import Stack
from tests.worker.conftest import find_processes
from worker.children import Child

BOTH = (SQLITE, POSTGRESQL)
GONE_SECONDS = 5.0
"""Promised: no process of a job this long after it is over."""
WORKING: tuple[list[object], ...] = (["say", "working"], ["sleep", 600])


def main_of(worker: Child) -> int:
    assert worker.process is not None
    return worker.process.pid


def children_of(process: int) -> list[int]:
    """Return the supervisors of a worker."""
    text = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(child) for child in text.split()]


def send(number: int, *processes: int) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def engines_of(stack: Stack) -> set[int]:
    return set(find_processes(stack.bench.marker))


def wait_for_end_of(stack: Stack, engines: set[int], what: str) -> None:
    stack.wait_until(lambda: not engines & engines_of(stack), what, GONE_SECONDS)


def reasons_of(stack: Stack, job_id: str) -> list[str]:
    with stack.bench.database.read() as session:
        query = select(EventRow.data).where(EventRow.job_id == job_id, EventRow.kind == "state")
        return [data["reason"] for data in session.scalars(query) if "reason" in data]


@case("B2", databases=BOTH)
def supervisor_is_killed(stack: Stack) -> None:
    _kill_and_recover(stack, main=False)


@case("B3", databases=BOTH)
def whole_worker_is_killed(stack: Stack) -> None:
    _kill_and_recover(stack, main=True)


def _kill_and_recover(stack: Stack, *, main: bool) -> None:
    stack.start("worker.dispatch")
    worker = stack.start(PARE_WORKER_STANDBY="false")
    job_id = stack.queue(["unless_resumed", [["checkpoint", "x"], ["leave_grandchild"], *WORKING]], ["finish"])
    stack.wait_for_stage(job_id, "working")
    stack.wait_until(lambda: "checkpoint" in kinds_of(stack, job_id), "the checkpoint")
    engines = engines_of(stack)
    assert len(engines) >= 2, "the engine and its grandchild"
    lease = stack.bench.settings.lease_seconds

    send(signal.SIGKILL, *children_of(main_of(worker)), *([main_of(worker)] if main else []))

    wait_for_end_of(stack, engines, "the end of the sandboxes")
    killed_at = time.monotonic()
    stack.wait_until(lambda: "worker_lost" in reasons_of(stack, job_id), "taken from the dead worker", lease + 15)
    assert time.monotonic() - killed_at < lease + 15
    if main:
        stack.start()
    assert stack.wait(job_id).state == "succeeded"
    assert stack.count_runs(job_id) == 2


def kinds_of(stack: Stack, job_id: str) -> list[str]:
    with stack.bench.database.read() as session:
        return list(session.scalars(select(EventRow.kind).where(EventRow.job_id == job_id)))


@case("B4", fast=True)
def owner_pauses_and_comes_back(stack: Stack) -> None:
    stack.start("worker.dispatch")
    first = stack.start(PARE_WORKER_STANDBY="false")
    again: list[list[object]] = [["checkpoint", "x"], *WORKING]
    job_id = stack.queue(["unless_resumed", again], ["say", "second"], ["sleep", 8], ["finish"])
    stack.wait_for_stage(job_id, "working")
    stack.wait_until(lambda: "checkpoint" in kinds_of(stack, job_id), "the checkpoint")
    engines = engines_of(stack)
    paused = children_of(main_of(first))
    with stack.bench.database.session():  # SQLite has one writer: stopped in a transaction, it would stop everybody
        send(signal.SIGSTOP, *paused)
    stack.start()
    stack.wait_for_stage(job_id, "second")

    send(signal.SIGCONT, *paused)

    wait_for_end_of(stack, engines, "the paused owner's engine")
    job = stack.wait(job_id)
    assert (job.state, job.attempt) == ("succeeded", 2)


@case("B4b", databases=(POSTGRESQL,))
def owner_stops_while_it_holds_the_row(stack: Stack) -> None:
    """SIGSTOP between the heartbeat's UPDATE and its COMMIT: the row is locked by somebody who does nothing."""
    stack.start_api()
    stack.start("worker.dispatch")
    stack.start(fault="mid_heartbeat:stop", PARE_WORKER_STANDBY="false")
    job_id = stack.submit(["unless_resumed", [["checkpoint", "x"], *WORKING]], ["finish"])
    stack.wait_for_fault("mid_heartbeat")
    stack.start()

    assert stack.wait(job_id, seconds=60).state == "succeeded"
    for child in stack.children:
        send(signal.SIGCONT, *(children_of(child.process.pid) if child.process else []))


@case("B5", databases=BOTH)
def finish_comes_after_the_lease(stack: Stack) -> None:
    stack.start("worker.dispatch")
    stack.start(fault="after_blob_before_txn:hold", PARE_WORKER_STANDBY="false")
    first: list[list[object]] = [["checkpoint", "x"], ["sleep", 0.5], ["artifact", "of the first"], ["exit", 0]]
    job_id = stack.queue(["unless_resumed", first], ["say", "second"], ["sleep", 3], ["artifact", "of the second"])
    stack.wait_for_fault("after_blob_before_txn")
    stack.start()
    stack.wait_for_stage(job_id, "second")

    stack.release_fault("after_blob_before_txn")

    job = stack.wait(job_id)
    assert (job.state, job.attempt) == ("succeeded", 2), (job.state, job.attempt, job.error)
    assert artifact_of(stack, job_id) == b"of the second"


def artifact_of(stack: Stack, job_id: str) -> bytes:
    with stack.bench.database.read() as session:
        sha256 = session.scalars(select(ArtifactRow.sha256).where(ArtifactRow.job_id == job_id)).one()
    return b"".join(owner_storage(stack.bench.storage, "local").open(sha256))


@case("B9")
def worker_is_told_twice_to_stop(stack: Stack) -> None:
    stack.start("worker.dispatch")
    worker = stack.start()
    job_id = stack.queue(["unless_resumed", [["checkpoint", "x"], *WORKING]], ["finish"])
    stack.wait_for_stage(job_id, "working")
    assert worker.process is not None

    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGQUIT):
        send(number, main_of(worker))
        time.sleep(0.1)
    worker.process.wait(stack.patience)

    stack.wait_until(lambda: not engines_of(stack), "the end of the sandboxes", GONE_SECONDS)
    stack.start()
    assert stack.wait(job_id).state == "succeeded"


@case("B11", fast=True)
def running_job_is_cancelled(stack: Stack) -> None:
    stack.start_api()
    stack.start("worker.dispatch")
    stack.start(PARE_WORKER_STANDBY="false")
    job_id = stack.submit(*WORKING)
    stack.wait_for_stage(job_id, "working")

    _cancel_and_look(stack, job_id)


@case("B12", databases=BOTH)
def cancelled_job_resists(stack: Stack) -> None:
    stack.start_api()
    stack.start("worker.dispatch")
    stack.start(PARE_WORKER_STANDBY="false")
    job_id = stack.submit(["ignore_sigterm"], ["leave_grandchild"], *WORKING)
    stack.wait_for_stage(job_id, "working")

    _cancel_and_look(stack, job_id)


def _cancel_and_look(stack: Stack, job_id: str) -> None:
    asked_at = time.monotonic()
    answer = stack.cancel(job_id)
    assert answer.is_success
    assert time.monotonic() - asked_at < 2

    assert stack.wait(job_id, seconds=45).state == "cancelled"
    stack.wait_until(lambda: not engines_of(stack), "the end of the engine", GONE_SECONDS)
    answer = stack.client.post(f"/v1/jobs/{job_id}/cancel")
    assert (answer.status_code, answer.json()["code"]) == (409, "job_finished")


@case("B13", databases=BOTH)
def cancel_comes_between_the_last_byte_and_the_finish(stack: Stack) -> None:
    stack.start_api()
    stack.start("worker.dispatch")
    stack.start(fault="after_blob_before_txn:hold")
    job_id = stack.submit(["finish"])
    stack.wait_for_fault("after_blob_before_txn")
    assert stack.cancel(job_id).json()["status"] == "cancelling"

    stack.release_fault("after_blob_before_txn")

    assert stack.wait(job_id).state == "cancelled"


@case("B13b")
def cancels_race_with_finishes(stack: Stack) -> None:
    stack.start_api()
    stack.start("worker.dispatch")
    stack.start()
    for number in range(12):
        job_id = stack.submit(["say", "working"], ["sleep", 0.1], ["finish"])
        stack.wait_for_stage(job_id, "working")
        time.sleep(0.05 * number)
        stack.cancel(job_id)
        stack.wait(job_id)


@case("B15")
def deadline_passes(stack: Stack) -> None:
    stack.start("worker.dispatch")
    stack.start(PARE_WORKER_STANDBY="false")
    job_id = stack.queue(["ignore_sigterm"], ["leave_grandchild"], *WORKING, deadline_seconds=2)

    job = stack.wait(job_id, seconds=30)

    assert job.error is not None
    assert job.error["code"] == "deadline_exceeded"
    stack.wait_until(lambda: not engines_of(stack), "the end of the engine", GONE_SECONDS)


@case("B16")
def engine_lives_and_does_nothing(stack: Stack) -> None:
    stack.start("worker.dispatch")
    stack.start(PARE_WORKER_STANDBY="false", PARE_WORKER_PROGRESS_TIMEOUT_SECONDS="1")

    job = stack.wait(stack.queue(*WORKING), seconds=30)

    assert job.error is not None
    assert job.error["code"] == "engine_stuck"


@case("B19")
def checkpoint_rots(stack: Stack) -> None:
    stack.start("worker.dispatch")
    worker = stack.start()
    write: list[list[object]] = [["checkpoint", "one"], ["sleep", 0.5], ["checkpoint", "two"], *WORKING]
    job_id = stack.queue(["unless_resumed", write], ["finish"])
    stack.wait_until(lambda: kinds_of(stack, job_id).count("checkpoint") == 2, "the checkpoints")
    send(signal.SIGKILL, *children_of(main_of(worker)), main_of(worker))
    folder = stack.directory / "store" / "blobs" / "checkpoints" / job_id
    rotten = next(path for path in folder.rglob("*") if path.is_file() and path.read_bytes() == b"two")
    rotten.write_bytes(b"twp")
    stack.start()

    assert stack.wait(job_id).state == "succeeded"
    with stack.bench.database.read() as session:
        query = select(EventRow.data).where(EventRow.job_id == job_id, EventRow.kind == "progress")
        told = [data["message"] for data in session.scalars(query) if data["message"]]
    assert told == ["one"], "the engine was given bytes that are not the checkpoint"


@case("B20", databases=BOTH)
def worker_dies_between_bytes_and_row(stack: Stack) -> None:
    _die_at(stack, "after_blob_before_txn", runs=2)


@case("B20b", databases=BOTH)
def worker_dies_right_after_its_claim(stack: Stack) -> None:
    _die_at(stack, "after_claim", runs=2)


@case("B20c", databases=BOTH)
def worker_dies_right_after_the_finish(stack: Stack) -> None:
    _die_at(stack, "after_txn_before_ack", runs=1)


@case("B20d", databases=BOTH)
def worker_dies_inside_a_heartbeat(stack: Stack) -> None:
    _die_at(stack, "mid_heartbeat", runs=2)


def _die_at(stack: Stack, point: str, *, runs: int) -> None:
    stack.start("worker.dispatch")
    stack.start(fault=f"{point}:kill")
    job_id = stack.queue(["sleep", 1], ["artifact", "always the same"])
    stack.wait_for_fault(point)

    assert stack.wait(job_id).state == "succeeded"
    assert stack.count_runs(job_id) == runs
    assert artifact_of(stack, job_id) == b"always the same"


@case("B22")
def clocks_of_workers_are_wrong(stack: Stack) -> None:
    stack.start("worker.dispatch")
    ahead = stack.start(under="clock_ahead", PARE_WORKER_STANDBY="false")
    job_id = stack.queue(["unless_resumed", [["checkpoint", "x"], ["sleep", 6], *WORKING]], ["finish"])
    stack.wait_until(lambda: "checkpoint" in kinds_of(stack, job_id), "the checkpoint")
    stack.wait_for_stage(job_id, "working")
    assert stack.count_runs(job_id) == 1, "taken from a worker that was alive"
    send(signal.SIGKILL, *children_of(main_of(ahead)), main_of(ahead))
    stack.start(under="clock_behind")

    assert stack.wait(job_id, seconds=stack.bench.settings.lease_seconds + 30).state == "succeeded"
    assert stack.count_runs(job_id) == 2


@case("B25")
def engine_breaks_its_device(stack: Stack) -> None:
    stack.start("worker.dispatch")
    stack.start()
    broken = stack.queue(["print_error", "CUDA error: device-side assert triggered"], ["exit", 1])
    following = stack.queue(["finish"])

    job = stack.wait(broken)

    assert job.error is not None
    assert (job.state, job.error["code"]) == ("failed", "engine_failed")
    assert stack.wait(following).state == "succeeded", "in a process of its own"


@case("B27", needs_root=True, programs=("mount", "umount"))
def disk_of_the_job_is_full(stack: Stack) -> None:
    work = stack.directory / "work"
    work.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(work)], check=True)
    try:
        stack.start("worker.dispatch")
        stack.start()
        full = stack.queue(["write_bytes", "out/big", 16 * 2**20], ["finish"])

        job = stack.wait(full)

        assert job.error is not None
        assert (job.state, job.error["code"]) == ("failed", "storage_full")
        assert stack.wait(stack.queue(["finish"])).state == "succeeded"
        stack.stop_all()
        left = [path for path in work.glob("*/*") if path.name != "lock"]
        assert left == []
    finally:
        stack.stop_all()
        subprocess.run(["umount", "--lazy", str(work)], check=True)


@case("B14")
def cancelled_job_loses_its_worker(stack: Stack) -> None:
    stack.start_api()
    worker = stack.start()
    job_id = stack.submit(*WORKING)
    stack.broker.send(job_id)
    stack.wait_for_stage(job_id, "working")
    send(signal.SIGKILL, *children_of(main_of(worker)), main_of(worker))
    assert stack.cancel(job_id).json()["status"] == "cancelling"
    with stack.bench.database.session() as session:
        session.execute(update(JobRow).where(JobRow.id == job_id).values(lease_until=db_now(-1)))

    stack.start("worker.dispatch")
    stack.start()

    assert stack.wait(job_id).state == "cancelled"
    assert stack.count_runs(job_id) == 1
