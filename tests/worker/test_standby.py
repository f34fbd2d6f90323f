"""The engine that is kept warm: whatever happens to it or to its start, the next job gets one."""

import contextlib
import os
import signal
from collections.abc import Callable

import pytest

from tests.worker.conftest import Bench, find_processes, wait_until
from worker.engine_process import EngineFactory, EngineProcess
from worker.slot import Slot


def finish_a_job(bench: Bench, slot: Slot) -> None:
    job_id = bench.queue(["finish"])
    assert slot.supervisor.run(job_id)
    assert bench.read(job_id).state == "succeeded"


def test_a_standby_that_died_is_replaced(bench: Bench, slot: Slot) -> None:
    wait_until(slot.supervisor.standby.is_warm)
    for process in find_processes(bench.marker):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)

    finish_a_job(bench, slot)


def test_what_nobody_expected_does_not_end_it(
    bench: Bench, open_slots: Callable[..., Slot], monkeypatch: pytest.MonkeyPatch
) -> None:
    failures, started = [RuntimeError("unexpected")], EngineFactory.start

    def fail_once(factory: EngineFactory, num_ranks: int = 1) -> EngineProcess:
        if failures:
            raise failures.pop()
        return started(factory, num_ranks)

    monkeypatch.setattr(EngineFactory, "start", fail_once)

    finish_a_job(bench, open_slots(bench))
    assert failures == []
