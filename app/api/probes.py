"""Checks of what the service depends on that cannot hang, although what they check can."""

import threading
from collections.abc import Callable
from typing import Any

from app.errors import Unavailable

PATIENCE_SECONDS = 4.0


class Probes:
    """At most one thread for each part: one that hangs is waited for again, not joined by others."""

    def __init__(self, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self._patience_seconds = patience_seconds
        self._lock = threading.Lock()
        self._running: dict[str, _Probe] = {}

    def run(self, name: str, check: Callable[[], Any]) -> Any:
        """Return what the check returns; raises what it raises, or Unavailable where it takes too long."""
        with self._lock:
            probe = self._running.get(name)
            if probe is None or not probe.is_alive():
                probe = self._running[name] = _Probe(name, check)
                probe.start()
        probe.join(self._patience_seconds)
        if probe.is_alive():
            raise Unavailable(f"no answer within {self._patience_seconds:g} s")
        if probe.error is not None:
            raise probe.error
        return probe.found


class _Probe(threading.Thread):
    def __init__(self, name: str, check: Callable[[], Any]) -> None:
        super().__init__(daemon=True, name=f"probe-{name}")
        self._check = check
        self.found: Any = None
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.found = self._check()
        except Exception as error:  # whoever waits for the answer has to hear of it, whatever it is
            self.error = error
