"""Traces (OpenTelemetry): what became of a request, from its answer through the dispatcher to the steps of its job.

Off unless OTEL_EXPORTER_OTLP_ENDPOINT names a collector; the SDK (`pip install 'pare[otel]'`) is imported then and not
before. A job carries the context of the request that submitted it (W3C Trace Context, `traceparent`) in its row, for
the message in the queue is a hint: another worker may take another job with it.
"""

import os
import threading
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from app.errors import ConfigurationError

STOP_SECONDS = 3.0
"""A collector that does not answer keeps no process from ending."""
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")

tracer = trace.get_tracer("pare")
"""Makes spans that go nowhere until tracing is started."""

_provider: Any = None
_propagator = TraceContextTextMapPropagator()


def is_wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment asks for traces."""
    return (
        any(environment.get(name) for name in _ENDPOINTS)
        and environment.get("OTEL_SDK_DISABLED", "").lower() != "true"
        and environment.get("OTEL_TRACES_EXPORTER", "otlp").lower() != "none"
    )


def check_tracing() -> None:
    """Raise ConfigurationError where traces are asked for and cannot be made."""
    if not is_wanted():
        return
    protocol = next((os.environ[name] for name in _PROTOCOLS if os.environ.get(name)), "http/protobuf")
    if protocol != "http/protobuf":
        raise ConfigurationError(
            f"OTEL_EXPORTER_OTLP_PROTOCOL={protocol} asks for traces by a protocol that Pare does not speak",
            fix="Leave it out and name the collector's endpoint for http/protobuf (often port 4318).",
        )
    if _is_missing("opentelemetry.sdk") or _is_missing("opentelemetry.exporter.otlp.proto.http"):
        raise ConfigurationError(
            "OTEL_EXPORTER_OTLP_ENDPOINT asks for traces, and the package for that is not installed",
            fix="pip install 'pare[otel]', or leave the variable out.",
        )


def start_tracing(process: str) -> None:
    """Send spans of this process to the collector, if there is one; call it after a fork, not before."""
    global _provider
    check_tracing()
    if not is_wanted() or _provider is not None:
        return
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    name = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": f"pare-{process}"}
    _provider = TracerProvider(resource=Resource.create(name), shutdown_on_exit=False)
    _provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(_provider)


def stop_tracing() -> None:
    """Send what is left; a process that ends calls it."""
    if _provider is not None:
        stopping = threading.Thread(target=_provider.shutdown, daemon=True)
        stopping.start()
        stopping.join(STOP_SECONDS)


def current_traceparent() -> str | None:
    """Return the context of the span that is going on, as W3C's header has it; None where there is none."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier)
    return carrier.get("traceparent")


def continue_trace(traceparent: str | None) -> Context:
    """Return the context in which a job's spans belong to the trace of the request that submitted it."""
    return _propagator.extract({"traceparent": traceparent} if traceparent else {}, context=Context())


def _is_missing(module: str) -> bool:
    try:
        return find_spec(module) is None
    except ImportError:  # of a package above it
        return True
