"""Traces are off unless a collector is named; the whole way of one is in tests/worker/test_secrets.py."""

import os
import subprocess
import sys

import pytest
from opentelemetry import trace

from app import tracing
from app.errors import ConfigurationError

EXPORTER = ("opentelemetry.exporter", "requests")
OFF: list[dict[str, str]] = [
    {},
    {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
    {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318", "OTEL_SDK_DISABLED": "true"},
    {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces", "OTEL_TRACES_EXPORTER": "none"},
]


@pytest.mark.parametrize("environment", OFF)
def test_off(environment: dict[str, str]) -> None:
    assert not tracing.is_wanted(environment)


@pytest.mark.parametrize(
    ("modules", "sdk"),
    [
        ("app.__main__", ("opentelemetry.sdk", *EXPORTER)),
        # The client of the broker imports the SDK's metrics by itself, where it is installed.
        ("worker.celery_app, worker.tasks, worker.slot, worker.dispatch", ("opentelemetry.sdk.trace", *EXPORTER)),
    ],
)
def test_nothing_is_imported_while_off(modules: str, sdk: tuple[str, ...]) -> None:
    code = f"""
import sys
import {modules}
from app.tracing import current_traceparent, start_tracing, tracer
start_tracing("any")
with tracer.start_as_current_span("nothing"):
    assert current_traceparent() is None
print(*sorted(name for name in sys.modules if name.startswith({sdk!r})))
"""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    done = subprocess.run([sys.executable, "-c", code], env=inherited, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_what_cannot_be_done_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318")
    tracing.check_tracing()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(ConfigurationError, match="OTEL_EXPORTER_OTLP_PROTOCOL=grpc"):
        tracing.check_tracing()
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_PROTOCOL")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http", None)
    with pytest.raises(ConfigurationError) as caught:
        tracing.check_tracing()
    assert "pip install" in caught.value.fix


def test_a_trace_is_continued_and_nonsense_is_none() -> None:
    given = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    context = trace.get_current_span(tracing.continue_trace(given)).get_span_context()
    assert trace.format_trace_id(context.trace_id) == given[3:35]
    for nonsense in (None, "", "00-0-0-0", "x" * 55):
        assert not trace.get_current_span(tracing.continue_trace(nonsense)).get_span_context().is_valid
