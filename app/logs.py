"""How processes log: one line of JSON for each event, on stderr, with the ids of what it belongs to.

Whose request it is and which job a line is about is bound to the context (structlog's) where that becomes known, and
stands in every line from there on.
"""

import logging
import re
import sys

import structlog
from asgi_correlation_id import correlation_id
from opentelemetry import trace
from structlog.typing import EventDict, Processor, WrappedLogger

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{8,64}")


def configure_logs(process: str, level: int = logging.INFO) -> None:
    """Send structlog and the standard library's loggers the same way; every line names the kind of process."""
    shared: list[Processor] = [
        _name_process(process),
        structlog.contextvars.merge_contextvars,
        _add_request_id,
        _add_trace_id,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    logging.captureWarnings(True)
    # The frame around every request writes its own line.
    logging.getLogger("uvicorn.access").disabled = True


def is_request_id(text: str) -> bool:
    """Whether an id that came with a request is taken over: it stands in logs, answers and rows."""
    return _REQUEST_ID.fullmatch(text) is not None


def current_request_id() -> str | None:
    """Return the id of the request that is being answered; None outside of one."""
    return correlation_id.get()


def _name_process(process: str) -> Processor:
    def add(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        event["process"] = process
        return event

    return add


def _add_request_id(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    request_id = current_request_id()
    if request_id:
        event["request_id"] = request_id
    return event


def _add_trace_id(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = trace.format_trace_id(context.trace_id)
    return event
