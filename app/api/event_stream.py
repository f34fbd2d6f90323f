"""Events as a stream (SSE): replayed from the database, then followed; ends after the last event of a finished job."""

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import structlog
from anyio import sleep
from starlette.concurrency import run_in_threadpool

from app.api.service import Service
from app.db.tables import EventRow
from app.errors import PareError
from app.jobs import TERMINAL, State, get_job, list_events

POLL_SECONDS = 0.25
KEEP_ALIVE_SECONDS = 15.0
PAGE = 200

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class EventPage:
    """Events above a number, and how the job stood when they were read."""

    events: list[EventRow]
    last_seq: int
    terminal: bool


def read_events(service: Service, owner: str, job_id: str, after: int, limit: int) -> EventPage:
    """Read one page in one transaction."""
    with service.database.read() as session:
        job = get_job(session, owner, job_id)
        return EventPage(list_events(session, job_id, after, limit), job.last_seq, State(job.state) in TERMINAL)


async def stream_events(
    service: Service, owner: str, job_id: str, after: int, *, keep_alive_seconds: float = KEEP_ALIVE_SECONDS
) -> AsyncIterator[str]:
    """Yield every event above `after`, each once and in order, and comments while nothing happens."""
    yield "retry: 1000\n\n"
    spoken = time.monotonic()
    while not service.stopping.is_set():
        try:
            page = await run_in_threadpool(read_events, service, owner, job_id, after, PAGE)
        except PareError as error:
            # The job was deleted, or the database is away: the client comes back and gets a proper answer.
            log.info("event stream ends early", job_id=job_id, code=error.code)
            return
        for event in page.events:
            yield render_event(event)
            after = event.seq
        if page.terminal and after >= page.last_seq:
            return
        if page.events:
            spoken = time.monotonic()
        elif time.monotonic() - spoken >= keep_alive_seconds:
            yield ": keep-alive\n\n"
            spoken = time.monotonic()
        if len(page.events) < PAGE:
            await sleep(POLL_SECONDS)


def render_event(event: EventRow) -> str:
    """Return one event as the lines of a stream."""
    return f"id: {event.seq}\nevent: {event.kind}\ndata: {json.dumps(event.data, separators=(',', ':'))}\n\n"
