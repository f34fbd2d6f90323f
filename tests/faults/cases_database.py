"""C: the database, which is the truth. While it is away answers are 503, and what was said before still holds."""

import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx2
from sqlalchemy import make_url, select

from app.db.session import Database
from app.db.tables import JobRow
from tests.faults.cases import POSTGRESQL, case
from tests.faults.cases_jobs import WORKING, engines_of, kinds_of
from tests.faults.proxy import Proxy
from tests.faults.stack import Stack
from tests.postgres import PostgresServer


def server_of(stack: Stack) -> PostgresServer:
    assert stack.postgres is not None
    return stack.postgres


def submit_all(stack: Stack, model_id: str, num_jobs: int, meanwhile: Callable[[], None]) -> list[str]:
    """Submit jobs one after the other, each with its key until it is accepted, while something happens."""
    with ThreadPoolExecutor(1) as pool:
        submitting = pool.submit(_submit_each, stack, model_id, num_jobs)
        meanwhile()  # in this thread: PostgreSQL ends with the thread that has started it
        return submitting.result()


def _submit_each(stack: Stack, model_id: str, num_jobs: int) -> list[str]:
    job_ids = []
    for number in range(num_jobs):
        end = time.monotonic() + stack.patience
        while True:
            answer = stack.post_job(model_id, key=f"job-{number}")
            if answer.status_code == 202:
                break
            assert answer.status_code == 503, answer.text
            assert "retry-after" in answer.headers
            assert time.monotonic() < end, "still 503"
            time.sleep(0.2)
        job_ids.append(answer.json()["id"])
        time.sleep(0.1)
    return job_ids


def expect_each_once(stack: Stack, job_ids: list[str]) -> None:
    assert len(set(job_ids)) == len(job_ids)
    for job_id in job_ids:
        assert stack.wait(job_id).state == "succeeded"
    with stack.bench.database.read() as session:
        assert set(session.scalars(select(JobRow.id))) == set(job_ids), "a submission was made twice"


@case("C1", databases=(POSTGRESQL,))
def postgres_crashes_under_load(stack: Stack) -> None:
    stack.start_api()
    stack.start("worker.dispatch")
    stack.start()
    server = server_of(stack)

    def crash() -> None:
        time.sleep(1)
        server.stop(signal.SIGQUIT)
        time.sleep(2)
        server.start()

    job_ids = submit_all(stack, stack.add_model(["finish"]), 20, crash)

    expect_each_once(stack, job_ids)
    assert any(answer.status == 503 for answer in stack.history.answers), "nobody noticed the crash"


@case("C2", databases=(POSTGRESQL,))
def postgres_cuts_every_connection_again_and_again(stack: Stack) -> None:
    stack.start_api()
    stack.start("worker.dispatch")
    stack.start()
    server = server_of(stack)
    name = make_url(stack.bench.database.url).database

    def cut() -> None:
        for _ in range(15):
            server.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
            time.sleep(0.2)

    job_ids = submit_all(stack, stack.add_model(["sleep", 0.2], ["finish"]), 15, cut)

    expect_each_once(stack, job_ids)


@case("C3", databases=(POSTGRESQL,), fast=True)
def answer_to_the_commit_is_lost(stack: Stack) -> None:
    proxy = Proxy(server_of(stack).socket)
    try:
        url = make_url(stack.bench.database.url).set(host="127.0.0.1", port=proxy.port, query={})
        stack.start_api(PARE_DATABASE_URL=url.render_as_string(hide_password=False))
        model_id = stack.add_model(["finish"])
        proxy.cut_after(b"INSERT INTO jobs", b"COMMIT")
        answer = stack.post_job(model_id, key="once")
        assert answer.status_code == 503, answer.text
        assert proxy.num_cuts == 1

        answer = stack.post_job(model_id, key="once")

        assert answer.status_code == 202
        assert answer.headers.get("idempotency-replayed") == "true", "the first one was committed, and forgotten"
        stack.start("worker.dispatch")
        stack.start()
        expect_each_once(stack, [answer.json()["id"]])
        stack.stop_all()
    finally:
        proxy.close()


@contextmanager
def hold_row(stack: Stack, job_id: str) -> Iterator[None]:
    """Lock a job's row, and be as slow as one likes."""
    database = Database(stack.bench.database.url, idle_seconds=0)
    with database.session() as session:
        session.execute(select(JobRow).where(JobRow.id == job_id).with_for_update())
        yield
    database.dispose()


@case("C4", databases=(POSTGRESQL,))
def row_of_a_job_is_locked(stack: Stack) -> None:
    stack.start_api()
    locked, free = stack.submit(["finish"]), stack.submit(["finish"])
    with hold_row(stack, locked):
        asked_at = time.monotonic()
        assert stack.cancel(locked).status_code == 503
        assert time.monotonic() - asked_at < 10, "no request waits longer for a dependency"
        assert stack.cancel(free).is_success
    assert stack.cancel(locked).is_success
    stack.start("worker.dispatch")  # what is left in the outbox is published


@case("C5", databases=(POSTGRESQL,))
def all_connections_wait_for_a_lock(stack: Stack) -> None:
    stack.start_api()
    job_id = stack.submit(["finish"])
    with ThreadPoolExecutor(60) as pool, hold_row(stack, job_id):

        def cancel() -> httpx2.Response:
            return stack.client.post(f"/v1/jobs/{job_id}/cancel", timeout=60)

        waiting = [pool.submit(cancel) for _ in range(50)]
        time.sleep(0.5)
        asked_at = time.monotonic()
        assert stack.client.get("/health/live").status_code == 200
        assert time.monotonic() - asked_at < 2, "the process looks dead while it waits"
        answers = [each.result() for each in waiting]
        assert {answer.status_code for answer in answers} == {503}
        assert max(answer.elapsed.total_seconds() for answer in answers) < 20
    assert stack.cancel(job_id).is_success
    stack.start("worker.dispatch")


@case("C7")
def sqlite_has_many_writers(stack: Stack) -> None:
    stack.start_api()
    stack.start("worker.dispatch")
    stack.start(PARE_WORKER_CONCURRENCY="2")
    model_id = stack.add_model(["count", 10, 0.02], ["finish"])

    def submit(number: int) -> httpx2.Response:
        # With a key the first statement writes; without one a transaction reads before it does.
        return stack.post_job(model_id, key=str(number % 15) if number % 2 else None)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(submit, range(60)))

    assert {answer.status_code for answer in answers} == {202}, "a writer failed at once instead of waiting"
    expect_each_once(stack, sorted({answer.json()["id"] for answer in answers}))


@case("B21", databases=(POSTGRESQL,))
def database_hangs_for_a_moment(stack: Stack) -> None:
    stack.start("worker.dispatch")
    stack.start()
    job_id = stack.queue(["say", "working"], ["sleep", 3], ["finish"])
    stack.wait_for_stage(job_id, "working")
    server_of(stack).signal_all(signal.SIGSTOP)
    time.sleep(1.5)
    server_of(stack).signal_all(signal.SIGCONT)

    job = stack.wait(job_id)

    assert (job.state, job.attempt) == ("succeeded", 1)


@case("B21b", databases=(POSTGRESQL,))
def database_hangs_longer_than_the_lease(stack: Stack) -> None:
    stack.start("worker.dispatch")
    stack.start(PARE_WORKER_STANDBY="false")
    job_id = stack.queue(["unless_resumed", [["checkpoint", "x"], *WORKING]], ["finish"])
    stack.wait_until(lambda: "checkpoint" in kinds_of(stack, job_id), "the checkpoint")
    time.sleep(1)
    frozen_at = time.monotonic()
    server_of(stack).signal_all(signal.SIGSTOP)
    try:
        lease = stack.bench.settings.lease_seconds
        stack.wait_until(lambda: not engines_of(stack), "the engine ends before its lease does", lease)
        assert time.monotonic() - frozen_at < lease
    finally:
        server_of(stack).signal_all(signal.SIGCONT)

    assert stack.wait(job_id).state == "succeeded"
    assert stack.count_runs(job_id) == 2


@case("B21c", databases=(POSTGRESQL,), lease_seconds=20)
def database_is_away_when_a_job_ends(stack: Stack) -> None:
    stack.start("worker.dispatch")
    stack.start(fault="after_blob_before_txn:hold")
    job_id = stack.queue(["finish"])
    stack.wait_for_fault("after_blob_before_txn")
    server_of(stack).stop(signal.SIGQUIT)

    stack.release_fault("after_blob_before_txn")
    time.sleep(1.5)
    server_of(stack).start()

    job = stack.wait(job_id, seconds=15)
    assert (job.state, job.attempt) == ("succeeded", 1), "what was done is not done again"
