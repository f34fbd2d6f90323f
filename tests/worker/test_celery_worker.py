"""Real Celery workers, a real dispatcher and a real broker: what is lost, killed or repeated, and what remains."""

import base64
import contextlib
import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from sqlalchemy import select

from app.db.tables import EventRow
from app.jobs import cancel_job, list_workers, relay_outbox
from app.jobs.workers import is_stopping
from tests.worker.conftest import Bench, Broker, Start, ids_of_workers, wait_until
from worker.children import Child
from worker.dispatch import make_publisher

BOTH = pytest.mark.parametrize("bench", [pytest.param("sqlite", marks=pytest.mark.faults), "postgresql"], indirect=True)


def count_runs(bench: Bench, job_id: str) -> int:
    with bench.database.read() as session:
        rows = session.scalars(select(EventRow).where(EventRow.job_id == job_id, EventRow.kind == "state"))
        return sum(row.data["state"] == "running" for row in rows)


def children_of(process: int) -> list[int]:
    text = Path(f"/proc/{process}/task/{process}/children").read_text()
    return [int(child) for child in text.split()]


def kill_worker(child: Child) -> None:
    """SIGKILL the main process and its Celery children, as the kernel does when memory is short."""
    assert child.process is not None
    victims = [*children_of(child.process.pid), child.process.pid]
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    child.process.wait()


@BOTH
def test_a_job_goes_from_the_outbox_through_the_broker_to_a_worker(bench: Bench, start: Start) -> None:
    start()
    start("worker.dispatch")

    job = bench.wait(bench.queue(["finish"]))

    assert (job.state, job.attempt) == ("succeeded", 1)


def test_a_message_holds_the_id_of_its_job_and_nothing_else_of_it(bench: Bench, broker: Broker) -> None:
    job_id = bench.queue(["finish"], owner="somebody")
    publisher, publish = make_publisher(broker.embedded.url)
    with publisher, broker.client() as client:
        assert relay_outbox(bench.database, publish) == 1
        (message,) = [json.loads(each) for each in client.lrange("pare.cpu", 0, -1)]
    arguments, named, _ = json.loads(base64.b64decode(message["body"]))
    assert (arguments, named) == ([job_id], {})
    # Celery's own: its id, repeated where the one of a chain would be, and which process of which machine sent it.
    told = {name: value for name, value in message["headers"].items() if value}
    assert told.pop("id") == told.pop("root_id")
    assert re.fullmatch(rf"gen{os.getpid()}@.+", told.pop("origin"))
    assert told == {
        "argsrepr": repr([job_id]), "ignore_result": True, "kwargsrepr": "{}", "lang": "py", "task": "pare.run_job",
        "timelimit": [None, None],
    }  # fmt: skip


@BOTH
def test_a_repeated_message_runs_once(bench: Bench, broker: Broker, start: Start) -> None:
    start(PARE_WORKER_CONCURRENCY="2")
    start()
    job_id = bench.queue(["sleep", 0.5], ["finish"])

    for _ in range(50):
        broker.send(job_id)

    assert bench.wait(job_id).state == "succeeded"
    with broker.client() as client:
        wait_until(lambda: client.llen("pare.cpu") == 0)
    other = bench.queue(["finish"])
    broker.send(other)
    bench.wait(other)
    assert (count_runs(bench, job_id), bench.read(job_id).attempt) == (1, 1)


@pytest.mark.long
def test_a_wiped_broker_loses_no_job(bench: Bench, broker: Broker, start: Start) -> None:
    start("worker.dispatch")
    job_ids = [bench.queue(["finish"]) for _ in range(3)]
    with broker.client() as client:
        wait_until(lambda: client.llen("pare.cpu") == 3)
        client.flushall()

    start()

    assert [bench.wait(job_id).state for job_id in job_ids] == ["succeeded"] * 3
    assert [count_runs(bench, job_id) for job_id in job_ids] == [1, 1, 1]


def test_hints_do_not_pile_up_while_no_worker_takes_them(bench: Bench, broker: Broker, start: Start) -> None:
    job_ids = [bench.queue(["finish"]) for _ in range(3)]
    start("worker.dispatch")
    with broker.client() as client:
        wait_until(lambda: client.llen("pare.cpu") == 3)
        # The last hints are older than the sweep tolerates (1 s), yet they are all there.
        wait_until(lambda: all(bench.age(job_id) > 2.5 for job_id in job_ids))
        assert client.llen("pare.cpu") == 3
        client.rpop("pare.cpu")
        wait_until(lambda: client.llen("pare.cpu") >= 3, what="a new hint for the one that was lost")


def test_a_broker_killed_and_restarted_empty_loses_no_job(bench: Bench, broker: Broker, start: Start) -> None:
    start()
    start("worker.dispatch")
    running = bench.queue(["say", "working"], ["sleep", 3], ["finish"])
    bench.wait(running, "running")
    waiting = [bench.queue(["finish"]) for _ in range(2)]
    assert broker.child.process is not None
    os.kill(broker.child.process.pid, signal.SIGKILL)
    broker.child.process.wait()
    for path in (broker.embedded.socket.parent / "appendonlydir").iterdir():
        path.unlink()

    broker.start()

    assert [bench.wait(job_id).state for job_id in (running, *waiting)] == ["succeeded"] * 3
    assert [count_runs(bench, job_id) for job_id in (running, *waiting)] == [1, 1, 1]


@pytest.mark.short_leases
@BOTH
def test_the_job_of_a_killed_worker_finishes_on_another(bench: Bench, start: Start) -> None:
    start("worker.dispatch")
    first = start()
    job_id = bench.queue(["leave_grandchild"], ["say", "working"], ["sleep", 4], ["finish"])
    wait_until(lambda: bench.read(job_id).stage == "working")

    kill_worker(first)

    wait_until(lambda: bench.processes() == [], 15, "the end of the dead worker's sandboxes")
    start()
    job = bench.wait(job_id)
    assert (job.state, job.attempt) == ("succeeded", 2)
    with bench.database.read() as session:
        reasons = [row.data.get("reason") for row in session.scalars(select(EventRow)) if row.kind == "state"]
    assert "worker_lost" in reasons
    assert list((bench.settings.data_dir / "work").iterdir()) != []


@pytest.mark.short_leases
@pytest.mark.parametrize("victim", ["main", pytest.param("child", marks=pytest.mark.long)])
def test_nothing_is_left_when_either_process_of_a_worker_is_killed(bench: Bench, start: Start, victim: str) -> None:
    start("worker.dispatch")
    worker = start()
    assert worker.process is not None
    job_id = bench.queue(["say", "working"], ["sleep", 2], ["finish"])
    wait_until(lambda: bench.read(job_id).stage == "working")
    before = set(bench.processes())
    children = children_of(worker.process.pid)

    os.kill(worker.process.pid if victim == "main" else children[0], signal.SIGKILL)

    wait_until(lambda: not before & set(bench.processes()), 60, "the end of its sandboxes")
    if victim == "main":
        worker.process.wait()
        wait_until(lambda: not any(Path(f"/proc/{child}").exists() for child in children), 60)
        start()
    assert bench.wait(job_id).state == "succeeded"


@pytest.mark.short_leases
@pytest.mark.parametrize(
    "victim",
    ["engine", pytest.param("child", marks=pytest.mark.long), pytest.param("main", marks=pytest.mark.long), "tree"],
)
def test_a_job_goes_on_from_its_checkpoint_whoever_was_killed(bench: Bench, start: Start, victim: str) -> None:
    start("worker.dispatch")
    worker = start()
    assert worker.process is not None
    first: list[list[object]] = [["checkpoint", "halfway"], ["say", "working"], ["sleep", 600]]
    job_id = bench.queue(["unless_resumed", first], ["finish"])
    wait_until(lambda: bench.read(job_id).stage == "working")
    wait_until(lambda: "checkpoint" in list_kinds(bench, job_id), what="the checkpoint")
    engines, children = bench.processes(), children_of(worker.process.pid)

    victims = {"engine": engines, "child": children, "main": [worker.process.pid]}
    for process in victims.get(victim, [worker.process.pid, *children, *engines]):
        with contextlib.suppress(ProcessLookupError):  # the death of one takes others with it
            os.kill(process, signal.SIGKILL)
    if victim in ("main", "tree"):
        worker.process.wait()
        start()

    job = bench.wait(job_id)
    assert (job.state, job.attempt) == ("succeeded", 2)
    assert list_kinds(bench, job_id).count("resumed") == 1


def list_kinds(bench: Bench, job_id: str) -> list[str]:
    with bench.database.read() as session:
        return list(session.scalars(select(EventRow.kind).where(EventRow.job_id == job_id)))


def test_cancel_before_the_message_arrives(bench: Bench, broker: Broker, start: Start) -> None:
    start()
    job_id = bench.queue(["finish"])
    with bench.database.session() as session:
        cancel_job(session, "local", job_id)

    broker.send(job_id)
    other = bench.queue(["finish"])
    broker.send(other)

    assert bench.wait(other).state == "succeeded"
    assert (bench.read(job_id).state, bench.read(job_id).attempt) == ("cancelled", 0)


@BOTH
def test_cancel_while_running_frees_the_slot(bench: Bench, start: Start) -> None:
    start(PARE_WORKER_STANDBY="false")
    start("worker.dispatch")
    job_id = bench.queue(["ignore_sigterm"], ["leave_grandchild"], ["say", "resisting"], ["sleep", 600])
    wait_until(lambda: bench.read(job_id).stage == "resisting")

    with bench.database.session() as session:
        cancel_job(session, "local", job_id)

    assert bench.wait(job_id).state == "cancelled"
    assert bench.processes() == []
    assert bench.wait(bench.queue(["finish"])).state == "succeeded"


def test_a_worker_that_is_stopped_gives_its_job_back_at_once(bench: Bench, start: Start) -> None:
    start("worker.dispatch")
    worker = start()
    job_id = bench.queue(["say", "working"], ["sleep", 600], attempts=1)
    wait_until(lambda: bench.read(job_id).stage == "working")
    assert worker.process is not None

    worker.process.terminate()

    assert worker.process.wait(60) == 0
    job = bench.read(job_id)
    assert (job.state, job.max_attempts - job.attempt) == ("queued", 1), worker.tail(6000)
    assert bench.processes() == []
    assert ids_of_workers(bench) == set()


@pytest.mark.faults
def test_a_worker_that_stops_says_so_while_its_job_goes_on(bench: Bench, start: Start) -> None:
    start("worker.dispatch")
    worker = start(PARE_WORKER_STOP_SECONDS="6")
    job_id = bench.queue(["say", "working"], ["sleep", 600])
    wait_until(lambda: bench.read(job_id).stage == "working")
    assert worker.process is not None

    worker.process.terminate()

    def is_told() -> bool:
        with bench.database.read() as session:
            return [is_stopping(each) for each in list_workers(session, 60)] == [True]

    wait_until(is_told, what="the worker to say that it stops")
    assert bench.read(job_id).state == "running"
    with bench.database.session() as session:
        cancel_job(session, "local", job_id)
    assert worker.process.wait(60) == 0
    assert bench.read(job_id).state == "cancelled"


def test_poison_messages_harm_nothing(bench: Bench, broker: Broker, start: Start) -> None:
    worker = start()
    marker = bench.settings.data_dir / "executed"
    pickled = {
        "body": "Y3Bvc2l4CnN5c3RlbQo=",
        "content-type": "application/x-python-serialize",
        "content-encoding": "binary",
        "headers": {"task": "pare.run_job", "id": "1", "lang": "py"},
        "properties": {"delivery_info": {"exchange": "", "routing_key": "pare.cpu"}, "delivery_tag": "1",
                       "body_encoding": "base64"},
    }  # fmt: skip
    with broker.client() as client:
        client.lpush("pare.cpu", json.dumps(pickled))
    for arguments in ([], ["x", "y"], [7], [None], [{"a": 1}], ["job_x; touch " + str(marker)], ["job_" + "0" * 26]):
        broker.send(*arguments)
    broker.send("x", name="os.system")

    job_id = bench.queue(["finish"])
    broker.send(job_id)

    assert bench.wait(job_id).state == "succeeded"
    assert worker.process is not None
    assert worker.process.poll() is None
    assert not marker.exists()


@pytest.mark.long
def test_a_short_job_does_not_wait_behind_a_long_one(bench: Bench, start: Start) -> None:
    start()
    start()
    start("worker.dispatch")
    long = bench.queue(["say", "working"], ["sleep", 600])
    bench.wait(long, "running")

    assert [bench.wait(bench.queue(["finish"])).state for _ in range(3)] == ["succeeded"] * 3
    assert bench.read(long).state == "running"


@pytest.mark.long
def test_two_dispatchers_publish_without_loss(bench: Bench, start: Start) -> None:
    start("worker.dispatch")
    second = start("worker.dispatch")
    start()
    job_ids = [bench.queue(["finish"]) for _ in range(5)]
    assert second.process is not None
    second.process.kill()

    assert [bench.wait(job_id).state for job_id in job_ids] == ["succeeded"] * 5
    assert [count_runs(bench, job_id) for job_id in job_ids] == [1] * 5


@pytest.mark.long
def test_torch_is_in_no_process_of_the_service_side(bench: Bench, start: Start) -> None:
    worker = start(wait=True)
    dispatcher = start("worker.dispatch")
    assert bench.wait(bench.queue(["finish"])).state == "succeeded"
    assert worker.process is not None
    assert dispatcher.process is not None

    processes = [worker.process.pid, dispatcher.process.pid, *children_of(worker.process.pid)]

    maps = [Path(f"/proc/{process}/maps").read_text() for process in processes if process not in bench.processes()]
    assert len(maps) >= 3
    for name in ("torch", "numpy", "onnx"):
        assert not any(f"/{name}" in text for text in maps), name


def test_a_dispatcher_ends_cleanly_on_sigterm(start: Start) -> None:
    dispatcher = start("worker.dispatch")
    wait_until(lambda: "dispatching" in dispatcher.tail())
    assert dispatcher.process is not None

    dispatcher.process.terminate()

    assert dispatcher.process.wait(60) == 0


def test_a_dispatcher_keeps_hints_while_the_broker_is_away(bench: Bench, broker: Broker, start: Start) -> None:
    broker.child.stop(lambda: False)
    start("worker.dispatch")
    job_id = bench.queue(["finish"])
    subprocess.run(["sleep", "1"], check=True)

    broker.start()
    start()

    assert bench.wait(job_id).state == "succeeded"
