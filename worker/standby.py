"""One engine process kept warm: started ahead of its job, replaced when taken or dead, by a thread that never ends.

An engine for several ranks is allowed more than others, so it is started for its job and never ahead.

The kernel's parent-death signal is tied to the thread that started a process, so all starts happen in that thread.
"""

import threading
import time
from collections.abc import Callable

import structlog

from worker.engine_process import EngineFactory, EngineProcess

_FIRST_PAUSE_SECONDS, _LAST_PAUSE_SECONDS = 0.2, 30.0
_LOOK_SECONDS = 0.5

_log = structlog.get_logger(__name__)


class EngineUnavailable(Exception):
    """No engine process could be started."""


class Standby:
    """Holds at most one warm engine, and for a moment one that was asked for."""

    def __init__(self, factory: EngineFactory, *, keep_warm: bool = True) -> None:
        self._factory = factory
        self._keep_warm = keep_warm
        self._changed = threading.Condition()
        self._engines: dict[int, EngineProcess] = {}
        """By the number of ranks that they are for."""
        self._wanted: int | None = None
        self._closed = False
        self._problem = ""
        self._pause = _FIRST_PAUSE_SECONDS
        self._thread = threading.Thread(target=self._keep, name="standby", daemon=True)

    def open(self) -> None:
        """Begin."""
        self._thread.start()

    def take(
        self, timeout_seconds: float, give_up: Callable[[], bool] = lambda: False, *, num_ranks: int = 1
    ) -> EngineProcess:
        """Return the warm engine, or the next one as soon as it is started; then the one after that is started."""
        end = time.monotonic() + timeout_seconds
        with self._changed:
            try:
                while True:
                    engine = self._engines.get(num_ranks)
                    if engine is not None and engine.exit_status() is None:
                        return self._engines.pop(num_ranks)
                    self._wanted = num_ranks
                    self._changed.notify_all()
                    if self._closed or give_up() or time.monotonic() > end:
                        raise EngineUnavailable(
                            self._problem or f"no engine started within {timeout_seconds:g} seconds"
                        )
                    self._changed.wait(0.05)
            finally:
                self._wanted = None
                self._changed.notify_all()

    def is_warm(self) -> bool:
        """Whether an engine waits with everything imported."""
        with self._changed:
            return 1 in self._engines and self._engines[1].inbox.ready.is_set()

    def close(self) -> None:
        """End the engine that waits, and start no other."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(10)

    def _keep(self) -> None:
        while not self._closed:
            try:
                self._look()
            except Exception:  # the edge of the thread: without it no job would ever get an engine again
                _log.exception("the standby failed")
                self._problem = "starting an engine failed; the worker's log says why"
                self._rest()
        for engine in self._engines.values():
            engine.remove()

    def _look(self) -> None:
        """Do what there is to do, or wait a moment for something."""
        with self._changed:
            if self._closed:
                return
            dead = self._pop(lambda engine, _: engine.exit_status() is not None)
            spare = self._pop(lambda _, num_ranks: num_ranks not in (1, self._wanted))
            missing = [
                num_ranks
                for num_ranks in (self._wanted, 1 if self._keep_warm else None)
                if num_ranks is not None and num_ranks not in self._engines
            ]
            if 1 in self._engines and self._engines[1].inbox.ready.is_set():
                self._pause = _FIRST_PAUSE_SECONDS
            if not missing and dead is spare is None:
                self._changed.wait(_LOOK_SECONDS)
                return
        if dead is not None:
            self._bury(dead)
        if spare is not None:
            spare.remove()
        if missing:
            self._start(missing[0])

    def _pop(self, matches: Callable[[EngineProcess, int], bool]) -> EngineProcess | None:
        found = [num_ranks for num_ranks, engine in self._engines.items() if matches(engine, num_ranks)]
        return self._engines.pop(found[0]) if found else None

    def _start(self, num_ranks: int) -> None:
        try:
            engine = self._factory.start(num_ranks)
        except OSError as error:
            self._problem = f"cannot start an engine process: {error.strerror}"
            self._rest()
            return
        with self._changed:
            self._engines[num_ranks] = engine
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
