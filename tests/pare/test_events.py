"""Following a job: every event once and in order, over streams that break and wires that pass no streams."""

import threading
import time
from typing import Any

import pytest

from pare.client import Client
from pare.errors import JobFailed, JobNotFinished, NotFound, WaitTimeout
from pare.records import Event

RECIPE = {"steps": [{"kind": "prune_magnitude"}]}


@pytest.fixture
def running(client: Client, hands: Any, model_id: str) -> Any:
    """The id of a job that runs for about a second."""
    job = client.jobs.submit(model_id, RECIPE)
    thread = threading.Thread(target=hands.run, args=(job.id, {"model.onnx": b"x"}), kwargs={"pause_seconds": 0.3})
    thread.start()
    yield job.id
    thread.join()


def _complete(events: list[Event]) -> bool:
    return [event.seq for event in events] == list(range(1, len(events) + 1)) and events[-1].finishes


def test_events_come_while_the_job_runs(client: Client, running: str) -> None:
    arrived: list[tuple[float, Event]] = [(time.monotonic(), event) for event in client.jobs.follow(running)]

    assert _complete([event for _, event in arrived])
    assert [e.data["fraction"] for _, e in arrived if e.kind == "progress"] == [0.1, 0.5, 0.9]
    # They were not all handed over at the end.
    assert arrived[-1][0] - arrived[1][0] > 0.3


def test_a_stream_that_breaks_is_resumed_without_gap_or_repetition(wire: Any, running: str) -> None:
    wire.cut_after = [700, 500, 450]
    with Client(wire.url) as client:
        events = list(client.jobs.follow(running))

    assert _complete(events)
    assert wire.num_connections > 1
    assert any(b"Last-Event-ID: " in sent and b"Last-Event-ID: 0" not in sent for sent in wire.requests)


def test_where_streams_do_not_get_through_the_job_is_polled(wire: Any, running: str) -> None:
    wire.change = lambda piece: piece.replace(b"text/event-stream", b"text/event-streaX")
    with Client(wire.url) as client:
        events = list(client.jobs.follow(running))

    assert _complete(events)
    assert any(b"/events?after=" in sent for sent in wire.requests)


def test_following_can_begin_in_the_middle_and_ends_at_once_after_the_last_event(client: Client, running: str) -> None:
    events = list(client.jobs.follow(running))

    assert [event.seq for event in client.jobs.follow(running, after=events[1].seq)] == [e.seq for e in events[2:]]
    assert list(client.jobs.follow(running, after=events[-1].seq)) == []


def test_waiting_gives_up_after_its_time_and_the_job_goes_on(client: Client, model_id: str) -> None:
    job = client.jobs.submit(model_id, RECIPE)
    started = time.monotonic()
    with pytest.raises(WaitTimeout):
        client.jobs.wait(job.id, timeout_seconds=0.5)

    assert 0.4 < time.monotonic() - started < 5
    assert client.jobs.get(job.id).status == "queued"


def test_an_unknown_job_cannot_be_followed(client: Client) -> None:
    with pytest.raises(NotFound):
        list(client.jobs.follow("job_" + "a" * 26))


def test_result_of_an_unfinished_job_says_so(client: Client, model_id: str) -> None:
    from pare.result import Result

    job = client.jobs.submit(model_id, RECIPE)
    result = Result(client.jobs, job)
    with pytest.raises(JobNotFinished, match=job.id):
        _ = result.metrics


def test_result_of_a_failed_job_raises_its_error(client: Client, hands: Any, model_id: str) -> None:
    from app.recipes.plan import EngineError

    job = client.jobs.submit(model_id, RECIPE)
    hands.run(job.id, error=EngineError(code="loss_not_finite", detail="loss is nan at step 3", fix="Lower it."))
    with pytest.raises(JobFailed) as caught:
        _ = client.result(job.id).metrics

    assert (caught.value.code, caught.value.fix) == ("loss_not_finite", "Lower it.")
    assert "nan at step 3" in caught.value.detail
