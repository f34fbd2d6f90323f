"""The end of a worker's child: what a signal may do, and that one thread alone closes."""

import os
import signal
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from tests.worker.conftest import Bench
from worker.slot import Slot, give_back_on_signals, open_slot


@pytest.fixture
def slot(bench: Bench) -> Iterator[Slot]:
    found = open_slot(bench.settings, bench.worker)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGQUIT)}
    yield found
    for number, handler in before.items():
        signal.signal(number, handler)
    if not found.ending.begun.locked():
        found.close()


@pytest.mark.timeout(60)
def test_a_signal_is_heard_whatever_it_interrupts(slot: Slot) -> None:
    give_back_on_signals(slot)
    # The moment in which this very thread has the lock of the event that will be set.
    with slot.supervisor.stopping._cond:  # type: ignore[attr-defined]
        os.kill(os.getpid(), signal.SIGTERM)
    assert slot.ending.told


def test_of_two_that_end_it_one_does(slot: Slot, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    done = threading.Event()

    def note(status: int) -> None:
        ended.append(status)
        done.set()

    monkeypatch.setattr(os, "_exit", note)
    for status in (0, 1):
        threading.Thread(target=slot.end, args=(status,), daemon=True).start()
    assert done.wait(30)
    assert len(ended) == 1


def test_of_two_that_close_it_one_does(slot: Slot, monkeypatch: pytest.MonkeyPatch) -> None:
    slot.close()

    def wait(_seconds: float) -> None:
        raise InterruptedError

    monkeypatch.setattr("worker.slot.time", SimpleNamespace(sleep=wait))
    with pytest.raises(InterruptedError):
        slot.close()
