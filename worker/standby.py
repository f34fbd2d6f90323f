"""One engine process kept warm: started ahead of its job, replaced when taken or dead, by a thread that never ends.

The kernel's parent-death signal is tied to the thread that started a process, so all starts happen in that thread.
"""

import threading
import time
from collections.abc import Callable

from worker.engine_process import EngineFactory, EngineProcess

_FIRST_PAUSE_SECONDS, _LAST_PAUSE_SECONDS = 0.2, 30.0
_LOOK_SECONDS = 0.5


class EngineUnavailable(Exception):
    """No engine process could be started."""


class Standby:
    """Holds at most one warm engine."""

    def __init__(self, factory: EngineFactory, *, keep_warm: bool = True) -> None:
        self._factory = factory
        self._keep_warm = keep_warm
        self._changed = threading.Condition()
        self._engine: EngineProcess | None = None
        self._wanted = False
        self._closed = False
        self._problem = ""
        self._pause = _FIRST_PAUSE_SECONDS
        self._thread = threading.Thread(target=self._keep, name="standby", daemon=True)

    def open(self) -> None:
        """Begin."""
        self._thread.start()

    def take(self, timeout_seconds: float, give_up: Callable[[], bool] = lambda: False) -> EngineProcess:
        """Return the warm engine, or the next one as soon as it is started; then the one after that is started."""
        end = time.monotonic() + timeout_seconds
        with self._changed:
            while True:
                if self._engine is not None and self._engine.exit_status() is None:
                    engine, self._engine = self._engine, None
                    self._wanted = False
                    self._changed.notify_all()
                    return engine
                self._wanted = True
                self._changed.notify_all()
                if self._closed or give_up() or time.monotonic() > end:
                    raise EngineUnavailable(self._problem or f"no engine started within {timeout_seconds:g} seconds")
                self._changed.wait(0.05)

    def is_warm(self) -> bool:
        """Whether an engine waits with everything imported."""
        with self._changed:
            return self._engine is not None and self._engine.inbox.ready.is_set()

    def close(self) -> None:
        """End the engine that waits, and start no other."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(10)

    def _keep(self) -> None:
        while True:
            with self._changed:
                if self._closed:
                    break
                dead = self._engine if self._engine is not None and self._engine.exit_status() is not None else None
                if dead is not None:
                    self._engine = None
                missing = self._engine is None and (self._keep_warm or self._wanted)
                if self._engine is not None and self._engine.inbox.ready.is_set():
                    self._pause = _FIRST_PAUSE_SECONDS
                if not missing:
                    self._changed.wait(_LOOK_SECONDS)
                    continue
            if dead is not None:
                self._bury(dead)
            self._start()
        if self._engine is not None:
            self._engine.remove()

    def _start(self) -> None:
        try:
            engine = self._factory.start()
        except OSError as error:
            self._problem = f"cannot start an engine process: {error.strerror}"
            self._rest()
            return
        with self._changed:
            self._engine = engine
            self._changed.notify_all()

    def _bury(self, engine: EngineProcess) -> None:
        engine.kill()
        tail = engine.log.last_bytes(1000).decode(errors="replace").strip()
        self._problem = f"the standby engine ended with status {engine.exit_status()}: {tail}"
        engine.remove()
        self._rest()

    def _rest(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed, self._pause)
        self._pause = min(self._pause * 2, _LAST_PAUSE_SECONDS)
