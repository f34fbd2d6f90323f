"""The processes that `pare serve` runs: started, restarted when they crash, stopped in order, gone when it is gone."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_FIRST_PAUSE_SECONDS, _LAST_PAUSE_SECONDS = 0.5, 30.0
_HEALTHY_SECONDS = 60.0
_MAX_LOG_BYTES = 16 * 1024 * 1024


@dataclass
class Child:
    """One process and its restarts. Start it from the main thread: the kernel ties it to the thread that did."""

    name: str
    command: list[str]
    environment: dict[str, str]
    log: Path
    stop_seconds: float
    process: "subprocess.Popen[bytes] | None" = None
    started_at: float = 0.0
    num_crashes: int = 0
    _pause: float = _FIRST_PAUSE_SECONDS
    _again_at: float = 0.0

    def start(self) -> None:
        """Start it in a session of its own, so that a Ctrl-C reaches only the launcher, which stops all in order."""
        if self.log.exists() and self.log.stat().st_size > _MAX_LOG_BYTES:
            self.log.replace(self.log.with_suffix(".log.1"))
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,
                preexec_fn=_make_tie(os.getpid()),
            )
        self.started_at = time.monotonic()

    def revive(self) -> str | None:
        """Start it again when it has ended, with growing pauses; return a line to show, if there is one."""
        if self.process is None:
            if time.monotonic() >= self._again_at:
                self.start()
            return None
        status = self.process.poll()
        if status is None:
            if time.monotonic() - self.started_at > _HEALTHY_SECONDS:
                self._pause = _FIRST_PAUSE_SECONDS
            return None
        self.num_crashes += 1
        self._end_group()
        self.process = None
        self._again_at = time.monotonic() + self._pause
        line = f"{self.name} ended with status {status}; starting it again in {self._pause:g} s (log: {self.log})"
        self._pause = min(self._pause * 2, _LAST_PAUSE_SECONDS)
        return line

    def stop(self, hurry: Callable[[], bool]) -> None:
        """Ask it to end; after its time, or when someone is in a hurry, end it and its process group."""
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
        end = time.monotonic() + self.stop_seconds
        while self.process.poll() is None and time.monotonic() < end and not hurry():
            time.sleep(0.02)
        self._end_group()
        self.process.wait()
        self.process = None

    def _end_group(self) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def tail(self, num_bytes: int = 2000) -> str:
        """Return the end of its log."""
        if not self.log.exists():
            return ""
        with self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - num_bytes))
            return log.read().decode(errors="replace")


def _make_tie(launcher: int) -> Callable[[], None]:
    """Return what a child does before it becomes its program: die with the launcher, however that dies."""
    if sys.platform != "linux":
        return lambda: None
    from worker.sandbox.kernel import die_with_parent

    def tie() -> None:
        die_with_parent(signal.SIGKILL)
        if os.getppid() != launcher:
            os._exit(1)

    return tie
