"""The spans of a worker: an attempt, in it the claim and the engines, in these the stages that they reported."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

from opentelemetry.trace import Span, SpanKind, Status, StatusCode

from app.jobs import Claim
from app.tracing import continue_trace, tracer
from worker.progress import Stage


@contextmanager
def trace_attempt(held: Claim, claimed_at_ns: int) -> Iterator[Span]:
    """Within it goes on what was claimed; the claim itself began at `claimed_at_ns`."""
    with tracer.start_as_current_span(
        "attempt",
        context=continue_trace(held.traceparent),
        kind=SpanKind.CONSUMER,
        start_time=claimed_at_ns,
        attributes={
            "pare.job_id": held.job_id,
            "pare.owner": held.owner,
            "pare.action": held.action,
            "pare.attempt": held.attempt,
            "pare.epoch": held.epoch,
            "pare.request_id": held.request_id or "",
        },
        # What an exception says may be a stranger's text; the outcome says how it ended.
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        tracer.start_span("claim", start_time=claimed_at_ns).end()
        yield span


@contextmanager
def trace_engine(action: str, pid: int, stages: list[Stage]) -> Iterator[None]:
    """Within it an engine works; `stages` fills meanwhile, and each becomes a span that lasts until the next."""
    with tracer.start_as_current_span(
        f"engine {action}",
        attributes={"process.pid": pid},
        record_exception=False,
        set_status_on_exception=False,
    ):
        try:
            yield
        finally:
            told = list(stages)  # whoever reads the engine's lines may go on
            times = [*(stage.began_at_ns for stage in told), time.time_ns()]
            for stage, (begin, end) in zip(told, pairwise(times), strict=True):
                step = {} if stage.step is None else {"pare.step": stage.step}
                tracer.start_span(stage.name, start_time=begin, attributes=step).end(end)


def note_outcome(span: Span, outcome: str, code: str | None) -> None:
    """Say how an attempt ended."""
    span.set_attributes({"pare.outcome": outcome} | ({"pare.code": code} if code else {}))
    if code:
        span.set_status(Status(StatusCode.ERROR, code))
