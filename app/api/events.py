"""Events of a job: one page as JSON, or a stream that can be resumed."""

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse

from app.api.event_stream import read_events, stream_events
from app.api.frame import HEAD_ONLY
from app.api.jobs import JobId
from app.api.openapi import problems
from app.api.owner import Owner
from app.api.service import Parts
from app.api.views import View, answer_view

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

STREAM = "text/event-stream"
MAX_SEQ = 2**53


class EventView(View):
    """Something that happened to a job."""

    seq: int
    """Counts from 1 without gaps."""
    kind: str
    """state: {state, attempt, reason?}; progress: {stage, step, fraction, eta_seconds, message, metrics}; waiting:
    {reason, detail, fix} when no living worker can run the job, {reason: null} when one can again;
    checkpoint: {stage, step, fraction, size_bytes}; resumed: {stage, step, fraction}."""
    created_at: datetime
    """When it happened."""
    data: dict[str, Any]
    """What happened."""


class EventPageView(View):
    """Events in order."""

    items: list[EventView]
    """Those numbered above `after`."""
    last_seq: int
    """The number of the newest event there is."""
    finished: bool
    """Whether the job is over, so that no more events come unless it is retried."""


@router.get(
    "/{job_id}/events",
    operation_id="list_events",
    response_model=EventPageView,
    responses={
        200: {
            "description": "A page of events, or with `Accept: text/event-stream` all of them as they happen: `id` is "
            "the seq, `event` the kind, `data` the data. The stream ends after the last event of a finished job.",
            "content": {STREAM: {"schema": {"type": "string"}}},
        },
        204: {"description": "A stream was resumed after the last event of a finished job: nothing will come."},
        **problems(404, 422),
    },
)
def list_job_events(
    request: Request,
    service: Parts,
    owner: Owner,
    job_id: JobId,
    after: Annotated[int, Query(ge=0, le=MAX_SEQ, description="Only events numbered above this.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000, description="Events per page; streams have no limit.")] = 200,
    last_event_id: Annotated[
        str | None, Header(alias="Last-Event-ID", description="Resume a stream after this event.")
    ] = None,
) -> Response:
    """List what happened to a job, or follow it as server-sent events."""
    if STREAM in request.headers.get("accept", ""):
        page = read_events(service, owner, job_id, 0, 1)
        if last_event_id is not None:
            after = _parse_event_id(last_event_id, page.last_seq)
            if page.terminal and after >= page.last_seq:
                return Response(status_code=204)
        headers = {"X-Accel-Buffering": "no", "Cache-Control": "no-cache"}
        if request.scope.get(HEAD_ONLY):
            return Response(headers=headers, media_type=STREAM)
        return StreamingResponse(stream_events(service, owner, job_id, after), headers=headers, media_type=STREAM)
    page = read_events(service, owner, job_id, after, limit)
    items = [
        EventView(seq=event.seq, kind=event.kind, created_at=event.created_at, data=event.data) for event in page.events
    ]
    return answer_view(EventPageView(items=items, last_seq=page.last_seq, finished=page.terminal))


def _parse_event_id(text: str, last_seq: int) -> int:
    """Return the number to go on after; an id that we did not give out means: from the start."""
    if len(text) <= 16 and text.isascii() and text.isdigit() and int(text) <= last_seq:
        return int(text)
    return 0
