"""A: the broker and the way to the workers. A message is a hint: losing all of them costs time, never a job."""

import os
import signal
import time

import httpx2

from tests.faults.cases import POSTGRESQL, SQLITE, case
from tests.faults.network import PROGRAMS, Network
from tests.faults.proxy import Proxy
from tests.faults.stack import Stack

DISPATCH_SECONDS = 30.0
"""Promised from the broker's return to the dispatch of what waits."""
ANSWER_SECONDS = 2.0
"""No broker is waited for: its time limits are 2 s and more. The promise, 0.5 s, is measured by the benchmark."""


def submit_quickly(stack: Stack) -> str:
    """Submit while the broker is away; the answer does not wait for it."""
    model_id = stack.add_model(["finish"])
    assert stack.client.get("/v1/jobs").status_code == 200  # connections are made, code is loaded
    asked_at = time.monotonic()
    answer = stack.post_job(model_id)
    assert answer.status_code == 202, answer.text
    assert time.monotonic() - asked_at < ANSWER_SECONDS
    return str(answer.json()["id"])


@case("A1")
def broker_refuses_at_submit(stack: Stack) -> None:
    stack.start_api()
    stack.start("worker.dispatch")
    stack.broker.child.stop(lambda: False)
    job_id = submit_quickly(stack)
    assert stack.read(job_id).state == "queued"

    stack.broker.start()
    stack.start()

    assert stack.wait(job_id, seconds=DISPATCH_SECONDS).state == "succeeded"


@case("A2", fast=True)
def broker_frozen_at_submit(stack: Stack) -> None:
    stack.start_api()
    stack.start("worker.dispatch")
    stack.start()
    broker = stack.broker.child.process
    assert broker is not None
    os.kill(broker.pid, signal.SIGSTOP)
    job_id = submit_quickly(stack)

    os.kill(broker.pid, signal.SIGCONT)

    assert stack.wait(job_id, seconds=DISPATCH_SECONDS).state == "succeeded"
    assert stack.count_runs(job_id) == 1


@case("A3")
def broker_swallows_everything(stack: Stack) -> None:
    proxy = Proxy(stack.broker.embedded.socket)
    try:
        stack.broker_url = f"redis://127.0.0.1:{proxy.port}/0"
        stack.start("worker.dispatch")
        stack.start()
        first = stack.queue(["finish"])
        assert stack.wait(first).state == "succeeded"

        proxy.swallow()
        during = [stack.queue(["finish"]) for _ in range(2)]
        time.sleep(7)  # longer than every time limit of the broker's connections
        proxy.pass_on()

        for job_id in during:
            assert stack.wait(job_id, seconds=60).state == "succeeded"
            assert stack.count_runs(job_id) == 1
        stack.stop_all()
    finally:
        proxy.close()


@case("A4")
def broker_cuts_connections_in_a_storm(stack: Stack) -> None:
    stack.start("worker.dispatch")
    stack.start()
    running = stack.queue(["say", "working"], ["sleep", 4], ["finish"])
    stack.wait_for_stage(running, "working")
    with stack.broker.client() as client:
        for _ in range(15):
            client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            time.sleep(0.1)

    job_id = stack.queue(["finish"])

    assert stack.wait(running).state == "succeeded"
    assert stack.wait(job_id).state == "succeeded"
    assert (stack.count_runs(running), stack.count_runs(job_id)) == (1, 1)


@case("A6", databases=(SQLITE, POSTGRESQL))
def broker_wiped_while_a_job_runs(stack: Stack) -> None:
    stack.start("worker.dispatch")
    stack.start()
    running = stack.queue(["say", "working"], ["sleep", 2], ["finish"])
    stack.wait_for_stage(running, "working")
    waiting = [stack.queue(["finish"]) for _ in range(3)]
    with stack.broker.client() as client:
        stack.wait_until(lambda: client.llen("pare.cpu") == 3, "the hints")
        client.flushall()

    for job_id in (running, *waiting):
        assert stack.wait(job_id).state == "succeeded"
        assert stack.count_runs(job_id) == 1


@case("A7")
def broker_has_no_memory_left(stack: Stack) -> None:
    stack.start("worker.dispatch")
    with stack.broker.client() as client:
        client.config_set("maxmemory", "1")
        job_id = stack.queue(["finish"])
        time.sleep(2)
        with stack.bench.database.read() as session:
            sent = session.connection().exec_driver_sql("SELECT count(*) FROM outbox").scalar_one() == 0
        assert not sent, "a hint that could not be sent was marked as sent"
        client.config_set("maxmemory", "0")
    stack.start()

    assert stack.wait(job_id, seconds=DISPATCH_SECONDS).state == "succeeded"


@case("A8")
def broker_became_a_replica(stack: Stack) -> None:
    stack.start("worker.dispatch")
    worker = stack.start()
    with stack.broker.client() as client:
        client.execute_command("REPLICAOF", "127.0.0.1", "1")
        job_id = stack.queue(["finish"])
        time.sleep(2)
        client.execute_command("REPLICAOF", "NO", "ONE")

    # Celery gives up on a broker that refuses to be read from; whoever runs workers starts them again.
    def is_done() -> bool:
        worker.revive()
        return stack.read(job_id).state == "succeeded"

    stack.wait_until(is_done, "the end", DISPATCH_SECONDS)
    assert stack.count_runs(job_id) == 1


@case("A9", databases=(SQLITE, POSTGRESQL))
def api_dies_between_commit_and_answer(stack: Stack) -> None:
    stack.start_api(fault="after_commit_before_publish:kill")
    stack.start("worker.dispatch")
    stack.start()
    model_id = stack.add_model(["finish"])
    try:
        stack.post_job(model_id, key="once")
    except httpx2.TransportError:
        pass
    else:
        raise AssertionError("the API answered")
    stack.start_api()

    answer = stack.post_job(model_id, key="once")

    assert answer.status_code == 202
    assert answer.headers["idempotency-replayed"] == "true"
    assert len(stack.client.get("/v1/jobs").json()["items"]) == 1
    assert stack.wait(answer.json()["id"]).state == "succeeded"


@case("A10", databases=(SQLITE, POSTGRESQL))
def dispatcher_dies_between_publish_and_mark(stack: Stack) -> None:
    dying = stack.start("worker.dispatch", fault="after_publish_before_mark:kill")
    job_id = stack.queue(["sleep", 0.5], ["finish"])
    stack.wait_for_fault("after_publish_before_mark")
    assert dying.process is not None
    dying.process.wait()
    with stack.broker.client() as client:
        assert client.llen("pare.cpu") == 1
        stack.start("worker.dispatch")
        stack.wait_until(lambda: client.llen("pare.cpu") >= 2, "the second message")

    stack.start()
    stack.start()

    assert stack.wait(job_id).state == "succeeded"
    assert stack.count_runs(job_id) == 1


@case("A11")
def message_comes_fifty_times(stack: Stack) -> None:
    stack.start(PARE_WORKER_CONCURRENCY="2")
    stack.start()
    job_id = stack.queue(["say", "working"], ["sleep", 2], ["finish"])
    for _ in range(50):
        stack.broker.send(job_id)
    stack.wait_for_stage(job_id, "working")
    with stack.broker.client() as client:
        stack.wait_until(lambda: client.llen("pare.cpu") == 0, "the end of the messages")

    assert stack.wait(job_id).state == "succeeded"
    assert stack.count_runs(job_id) == 1
    with stack.bench.database.session() as session:
        session.connection().exec_driver_sql("DELETE FROM outbox")  # no dispatcher here; the messages were its work


@case("A15")
def broker_gives_long_jobs_to_the_next_worker(stack: Stack) -> None:
    for _ in range(2):
        stack.start(under="short_visibility")
    stack.start("worker.dispatch")
    job_id = stack.queue(["say", "working"], ["sleep", 6], ["finish"])
    stack.wait_for_stage(job_id, "working")

    assert stack.wait(job_id).state == "succeeded"
    assert stack.count_runs(job_id) == 1


@case("A16", needs_root=True, programs=PROGRAMS)
def broker_hears_nothing_of_a_worker_any_more(stack: Stack) -> None:
    """Half open: the connection stands for both, but nothing that the worker sends arrives."""
    with Network(stack.broker.embedded.socket) as network:
        stack.start("worker.dispatch")
        stack.broker_url = network.url
        stack.start(prefix=network.prefix)
        first = stack.queue(["finish"])
        assert stack.wait(first).state == "succeeded"

        network.lose_what_open_connections_send()
        time.sleep(3)  # what the worker had asked for before is answered by now
        job_id = stack.queue(["finish"])

        assert stack.wait(job_id, seconds=60).state == "succeeded"
        assert stack.count_runs(job_id) == 1
        stack.stop_all()
