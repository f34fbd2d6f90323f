"""Many jobs over many real Celery workers: who runs what, in which order, and what is said when nobody can.

There is no GPU here. The workers are told that they have some, which is all that the service side ever knows of one.
"""

from typing import Any

import pytest
from sqlalchemy import select

from app.db.tables import EventRow, JobRow, WorkerRow
from app.jobs import JobNeeds, cancel_job, list_workers
from tests.worker.conftest import Bench, Start, wait_until

BOTH = pytest.mark.parametrize("bench", [pytest.param("sqlite", marks=pytest.mark.faults), "postgresql"], indirect=True)
HOLD: tuple[list[object], ...] = (["show_devices"], ["sleep", 600])
SMALL = {"PARE_WORKER_MEMORY_BYTES": str(512 * 2**20)}
BIG = {"PARE_WORKER_MEMORY_BYTES": str(2**31)}
GPUS = {"PARE_WORKER_DEVICES": "0,1;2,3"}


def cancel(bench: Bench, *job_ids: str) -> None:
    for job_id in job_ids:
        with bench.database.session() as session:
            cancel_job(session, bench.read(job_id).owner, job_id)
    for job_id in job_ids:
        bench.wait(job_id, "cancelled")


def events(bench: Bench, job_id: str, kind: str) -> list[dict[str, Any]]:
    with bench.database.read() as session:
        query = select(EventRow).where(EventRow.job_id == job_id, EventRow.kind == kind).order_by(EventRow.seq)
        return [row.data for row in session.scalars(query)]


def workers(bench: Bench) -> dict[str, WorkerRow]:
    with bench.database.read() as session:
        return {row.id: row for row in list_workers(session, 60)}


def devices_of(bench: Bench, job_id: str) -> str:
    """Return the GPUs that the job's engine sees."""
    wait_until(lambda: bench.read(job_id).stage == "devices", what="the engine's first line")
    return next(str(data["message"]) for data in events(bench, job_id, "progress") if data["stage"] == "devices")


def test_each_slot_runs_one_job_on_devices_of_its_own(bench: Bench, start: Start) -> None:
    start("worker.dispatch")
    start(**GPUS)
    pair = JobNeeds("gpu", 2)
    first, second = bench.queue(*HOLD, needs=pair), bench.queue(*HOLD, needs=JobNeeds("gpu", 1))
    assert {devices_of(bench, first), devices_of(bench, second)} == {"0,1", "2,3"}

    third = bench.queue(*HOLD, needs=pair)
    # A slot may run a job before its first word about itself is written.
    wait_until(lambda: len(workers(bench)) == 2, what="both slots at once")
    facts = [row.facts for row in workers(bench).values()]
    assert sorted((fact["slot"], fact["concurrency"], len(fact["devices"])) for fact in facts) == [(0, 2, 2), (1, 2, 2)]
    freed = devices_of(bench, first)
    cancel(bench, first)

    assert devices_of(bench, third) == freed
    cancel(bench, second, third)


def test_a_cpu_worker_shows_its_engines_no_gpu(bench: Bench, start: Start) -> None:
    start("worker.dispatch")
    start(CUDA_VISIBLE_DEVICES="0,1")
    job_id = bench.queue(*HOLD)
    assert devices_of(bench, job_id) == ""
    cancel(bench, job_id)


@BOTH
def test_a_job_gets_to_the_worker_that_can_run_it(bench: Bench, start: Start) -> None:
    start("worker.dispatch")
    start(**SMALL)
    start(**SMALL)
    start(**BIG)

    job_ids = [bench.queue(["finish"], needs=JobNeeds(memory_bytes=2**30)) for _ in range(3)]
    ended = [bench.wait(job_id) for job_id in job_ids]

    assert [job.state for job in ended] == ["succeeded"] * 3
    memory = {worker_id: row.facts["memory_bytes"] for worker_id, row in workers(bench).items()}
    assert [memory[str(job.worker_id)] for job in ended] == [2**31] * 3
    assert [job.attempt for job in ended] == [1, 1, 1]


@pytest.mark.long
@BOTH
def test_owners_share_a_worker_and_urgent_jobs_go_first(bench: Bench, start: Start) -> None:
    start()
    start("worker.dispatch")
    blocker = bench.queue(["say", "working"], ["sleep", 600], owner="cid")
    wait_until(lambda: bench.read(blocker).stage == "working")
    flood = [bench.queue(["finish"], owner="ann") for _ in range(4)]
    other = [bench.queue(["finish"], owner="bob") for _ in range(2)]
    urgent = bench.queue(["finish"], owner="ann", priority=5)
    check = bench.queue(["finish"], action="check_model", owner="bob", priority=100)
    everything = [*flood, *other, urgent, check]

    cancel(bench, blocker)

    assert {bench.wait(job_id).state for job_id in everything} == {"succeeded"}
    with bench.database.read() as session:
        order = session.scalars(select(JobRow.id).where(JobRow.id != blocker).order_by(JobRow.claimed_at)).all()
    # The check, the urgent one; then in turn: bob's last turn is longer ago than ann's.
    assert order == [check, urgent, other[0], flood[0], other[1], flood[1], flood[2], flood[3]]


def test_a_job_nobody_can_run_says_so_until_somebody_can(bench: Bench, start: Start) -> None:
    start("worker.dispatch")
    start()
    job_id = bench.queue(["finish"], needs=JobNeeds("gpu", 1))

    wait_until(lambda: events(bench, job_id, "waiting"), what="the event")
    (told,) = events(bench, job_id, "waiting")
    assert told["reason"] == "no_worker_can_run"
    assert "needs 1 GPU" in told["detail"]
    assert bench.read(job_id).state == "queued"

    start(**GPUS)
    assert bench.wait(job_id).state == "succeeded"
    assert bench.read(job_id).waiting_reason is None


@pytest.mark.long
def test_a_worker_with_gpus_leaves_cpu_jobs_alone_unless_told(bench: Bench, start: Start) -> None:
    start("worker.dispatch")
    start(**GPUS)
    job_id = bench.queue(["finish"])
    wait_until(lambda: events(bench, job_id, "waiting"), what="the event")
    assert bench.read(job_id).attempt == 0

    start(PARE_WORKER_DEVICES="7", PARE_WORKER_TAKES_CPU_JOBS="true")

    worker_id = str(bench.wait(job_id).worker_id)
    assert workers(bench)[worker_id].facts["accepts"] == ["gpu", "cpu"]
    assert workers(bench)[worker_id].queue == "pare.gpu,pare.cpu"
