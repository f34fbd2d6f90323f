"""An engine that has been taken over: it uses up what it can, and the jobs beside it go on."""

import signal
import threading

import pytest
from sqlalchemy import select

from app.db.tables import ArtifactRow
from tests.worker.conftest import Bench, wait_until
from tests.worker.test_supervisor import Slots, run
from worker.slot import Slot

BOMBS: dict[str, tuple[list[list[object]], str]] = {
    "processes": ([["fork_bomb"], ["exit", 1]], "engine_failed"),
    "open files": ([["open_files"], ["exit", 1]], "engine_failed"),
    "memory": ([["allocate", 2**33]], "out_of_memory"),
    "a file": ([["take_signals"], ["write_bytes", "out/big", 64 * 2**20]], "file_too_large"),
    "the processor": ([["spin"]], "deadline_exceeded"),
    "output": ([["flood", 1, 64], ["flood", 2, 64], ["exit", 1]], "engine_failed"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_has_a_code_of_its_own_and_its_neighbour_goes_on(bench: Bench, open_slots: Slots, name: str) -> None:
    acts, code = BOMBS[name]
    hostile, honest = open_slots(bench), open_slots(bench)
    job_id = bench.queue(*acts, deadline_seconds=3 if name == "the processor" else 60, attempts=1)
    thread = threading.Thread(target=hostile.supervisor.run, args=(job_id,), daemon=True)
    thread.start()
    wait_until(lambda: bench.read(job_id).state == "running", what="the bomb")

    neighbour = run(bench, honest, ["allocate", 2**24], ["write_bytes", "out/some", 2**20], ["finish"])

    assert neighbour.state == "succeeded", neighbour.error
    job = bench.wait(job_id)
    thread.join(60)
    assert (job.state, job.error["code"] if job.error else None) == ("failed", code), job.error


LIES: dict[str, tuple[list[list[object]], str]] = {
    "a name of another job": ([["artifact", "x", "../../other/out/artifacts/model.onnx"]], "bad_result"),
    "an absolute name": ([["artifact", "x", "/etc/hostname"]], "bad_result"),
    "a name of control characters": ([["artifact", "x", "a\nb.onnx"]], "bad_result"),
    "a very long name": ([["artifact", "x", "a" * 300]], "bad_result"),
    "ten thousand artifacts": ([["many_artifacts", 10_000]], "bad_result"),
    "an artifact named twice": ([["many_artifacts", 2, "same"]], "bad_result"),
    "a deep result": ([["write", "out/result.json", "[" * 100_000]], "bad_result"),
    "an artifact with a second name": ([["hard_link"], ["artifact"]], "bad_artifact"),
    "an artifact that is a pipe": ([["pipe"], ["artifact"]], "bad_artifact"),
    "a job that is not its own": ([["result", {"job_id": "job_x", "metrics": None, "artifacts": []}]], "bad_result"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_result_that_lies_publishes_nothing(bench: Bench, slot: Slot, name: str) -> None:
    acts, code = LIES[name]
    job = run(bench, slot, *acts)
    assert (job.state, job.error["code"] if job.error else None) == ("failed", code), job.error
    with bench.database.read() as session:
        assert session.scalars(select(ArtifactRow)).all() == []


def test_signals_that_end_it_are_named(bench: Bench, slot: Slot) -> None:
    for number in (signal.SIGBUS, signal.SIGSYS, signal.SIGXCPU):
        job = run(bench, slot, ["kill_self", number], attempts=1)
        assert job.error is not None
        assert job.error["code"] == "engine_crashed"
        assert number.name in job.error["detail"]
