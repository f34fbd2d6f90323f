"""The dispatcher's rounds."""

import pytest

from app.jobs import Hint
from tests.worker.conftest import Bench
from worker.dispatch import Dispatcher


def test_only_a_full_round_of_hints_is_followed_by_another_at_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a stream of submissions costs a round for each hint."""
    sent: list[Hint] = []
    monkeypatch.setattr("worker.dispatch.make_publisher", lambda _url: (None, sent.append))
    dispatcher = Dispatcher(bench.database, bench.settings)
    first = bench.queue(["finish"])
    assert not dispatcher._relay(), "the next round comes after the interval"
    assert [hint.job_id for hint in sent] == [first]
    monkeypatch.setattr("worker.dispatch.MAX_HINTS", 1)
    bench.queue(["finish"])
    assert dispatcher._relay()
