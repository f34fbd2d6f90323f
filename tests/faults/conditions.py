"""Circumstances under which a process can be run, without anything being broken in it."""

import time
from collections.abc import Callable

SKEW_SECONDS = 3600.0


def _short_visibility() -> None:
    """The broker gives a message that nobody acknowledged to the next worker after a second."""
    from worker.celery_app import app

    options = {"visibility_timeout": 1, "unacked_restore_interval": 1, "unacked_restore_throttle": 0}
    app.conf.broker_transport_options = {**app.conf.broker_transport_options, **options}


def _clock_ahead() -> None:
    _shift(SKEW_SECONDS)


def _clock_behind() -> None:
    _shift(-SKEW_SECONDS)


def _shift(seconds: float) -> None:
    """The wall clock of this machine is wrong; the monotonic one cannot be."""
    true_time = time.time
    time.time = lambda: true_time() + seconds


CONDITIONS: dict[str, Callable[[], None]] = {
    "short_visibility": _short_visibility,
    "clock_ahead": _clock_ahead,
    "clock_behind": _clock_behind,
}
"""By the names that UNDER takes."""
