"""Spans of an engine's stages; the whole way of a trace is in test_secrets.py."""

import time

import pytest

from worker.progress import Stage
from worker.tracing import trace_engine


def test_an_engine_that_says_nothing() -> None:
    with trace_engine("optimize", 1, []):
        pass


def test_a_stage_that_is_told_while_the_engine_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = [Stage("load", None, 1), Stage("step", 0, 2)]

    def tell_another() -> int:
        stages.append(Stage("step", len(stages), 3))
        return 4

    with trace_engine("optimize", 1, stages):
        monkeypatch.setattr(time, "time_ns", tell_another)
    assert len(stages) > 2
