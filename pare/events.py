"""Following a job: server-sent events, resumed after a break; plain polling where streams do not get through."""

import time
from collections.abc import Iterator
from typing import Any, cast

import httpx2

from pare.errors import PareError
from pare.records import Event
from pare.transport import Transport, problem_of

# The service writes a comment every 15 s; three missed ones mean that the stream is dead.
STREAM_TIMEOUT = httpx2.Timeout(connect=5.0, read=45.0, write=10.0, pool=5.0)
PATIENCE_SECONDS = 120.0
"""How long a service may be away before following gives up; a restart is much shorter."""
_MAX_BROKEN_STREAMS = 3
_MAX_PAUSE_SECONDS = 2.0


class _NoStream(Exception):
    """Something between us and the service does not pass event streams."""


def follow(transport: Transport, job_id: str, after: int = 0, *, deadline: float | None = None) -> Iterator[Event]:
    """Yield every event after `after`, each once and in order, until the job's last one or the (monotonic) deadline."""
    broken_streams = 0
    answered = time.monotonic()
    pause = 0.2
    while deadline is None or time.monotonic() < deadline:
        streaming = broken_streams < _MAX_BROKEN_STREAMS
        seen = after
        try:
            events = _stream(transport, job_id, after, deadline) if streaming else _poll(transport, job_id, after)
            for event in events:
                if event.seq > after:
                    after = event.seq
                    yield event
                    if event.finishes:
                        return
            answered = time.monotonic()
            if not streaming and after == seen and _is_over(transport, job_id, after):
                return
        except _NoStream:
            broken_streams = _MAX_BROKEN_STREAMS
            continue
        except (httpx2.TransportError, PareError) as error:
            if isinstance(error, PareError) and not error.retryable:
                raise
            if after > seen:
                answered = time.monotonic()
            if time.monotonic() - answered > PATIENCE_SECONDS:
                raise error if isinstance(error, PareError) else transport.unreachable(error) from error
        # A stream that ends before the last event was cut; one that brings nothing at all may never bring anything.
        broken_streams = 0 if streaming and after > seen else broken_streams + 1
        pause = 0.2 if after > seen else min(pause * 1.5, _MAX_PAUSE_SECONDS)
        time.sleep(pause)


def _stream(transport: Transport, job_id: str, after: int, deadline: float | None) -> Iterator[Event]:
    headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
    timeout = STREAM_TIMEOUT
    if deadline is not None:
        read = min(45.0, max(0.1, deadline - time.monotonic()))
        timeout = httpx2.Timeout(connect=5.0, read=read, write=10.0, pool=5.0)
    with transport.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers, timeout=timeout) as response:
        if not response.is_success:
            raise problem_of(response)
        if not response.headers.get("content-type", "").startswith("text/event-stream"):
            raise _NoStream
        for message in httpx2.EventSource(response):
            if message.id.isdigit():
                yield Event(int(message.id), message.event, cast("dict[str, Any]", message.json()))


def _poll(transport: Transport, job_id: str, after: int) -> Iterator[Event]:
    page = transport.get(f"/v1/jobs/{job_id}/events", after=after, limit=200)
    for item in page["items"]:
        yield Event(item["seq"], item["kind"], item["data"], item.get("created_at"))


def _is_over(transport: Transport, job_id: str, after: int) -> bool:
    page = transport.get(f"/v1/jobs/{job_id}/events", after=after, limit=1)
    return bool(page["finished"]) and not page["items"]
