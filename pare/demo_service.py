"""A service of the demonstration's own: started as a child, and ended with every process that came of it."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from pare.client import Client
from pare.errors import NotReachable, PareError
from pare.processes import Process, descendants

START_SECONDS = 90.0
STOP_SECONDS = 20.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_CHILD_SUBREAPER = 36


class Interrupted(BaseException):
    """A signal asked us to stop."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


class Interrupts:
    """Turns SIGINT, SIGTERM and SIGHUP into Interrupted, but never in the middle of starting or stopping a process."""

    def __init__(self) -> None:
        self._held = 0
        self._pending: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep signals waiting until the end of the block."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if not self._held and self._pending is not None:
            number, self._pending = self._pending, None
            raise Interrupted(number)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._held:
            self._pending = number
        else:
            raise Interrupted(number)


class DemoService:
    """`pare serve` on a free loopback port."""

    def __init__(self, directory: Path, interrupts: Interrupts) -> None:
        self._directory = directory
        self._interrupts = interrupts
        self._process: subprocess.Popen[bytes] | None = None
        self._port = _free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self.seconds = 0.0
        """How long the start took."""

    def __enter__(self) -> Self:
        _adopt_orphans()
        started = time.monotonic()
        log = self._directory / "serve.log"
        command = [sys.executable, "-m", "pare", "serve", "--port", str(self._port)]
        # Settings of a service of the user's own must not reach this one: it has its own database, queue and files.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PARE_")}
        environment |= {name: os.environ[name] for name in ("PARE_ISOLATION",) if name in os.environ}
        try:
            with self._interrupts.held(), log.open("wb") as file:
                # In a session of its own: a Ctrl-C at the terminal reaches us only, and we end it in order.
                self._process = subprocess.Popen(
                    [*command, "--data-dir", str(self._directory / "service")],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self._wait_until_ready(log)
        except BaseException:
            self._stop()
            raise
        self.seconds = time.monotonic() - started
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def api_memory(self) -> int:
        """Return the largest resident size the API process ever had, in bytes."""
        return max((process.peak_memory_bytes() for process in descendants() if _is_api(process)), default=0)

    def _wait_until_ready(self, log: Path) -> None:
        deadline = time.monotonic() + START_SECONDS
        assert self._process is not None
        with Client(self.url) as client:
            client.transport.attempts = 1
            while time.monotonic() < deadline:
                if self._process.poll() is not None:
                    raise _not_started(f"pare serve ended with code {self._process.returncode}", log)
                with contextlib.suppress(NotReachable):
                    if client.health()["status"] == "ready":
                        return
                time.sleep(0.1)
        raise _not_started(f"pare serve was not ready within {START_SECONDS:.0f} s", log)

    def _stop(self) -> None:
        """Ask the service to end, then make sure: every descendant of ours, adopted orphans too, is gone after this."""
        with self._interrupts.held():
            if self._process is not None and self._process.poll() is None:
                self._process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(STOP_SECONDS)
            while remaining := descendants():
                for process in remaining:
                    process.kill()
                _reap_children()
                time.sleep(0.02)


def _not_started(reason: str, log: Path) -> PareError:
    last_lines = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    return PareError(f"{reason}; its last words:\n{last_lines}", code="service_not_started")


def _is_api(process: Process) -> bool:
    return process.command.endswith("-m app")


def _adopt_orphans() -> None:
    """On Linux, become the parent of descendants whose own parent dies, so that none can get away."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _reap_children() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
