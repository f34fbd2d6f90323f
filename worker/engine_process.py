"""An engine process as the supervisor sees it: its directory, its sandbox, its progress and its log."""

import contextlib
import os
import secrets
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from app.settings import Settings
from worker.addresses import count_cuda_library_bytes
from worker.devices import Gpu, find_driver_folders, list_nodes
from worker.log import CappedLog
from worker.progress import ProgressInbox
from worker.sandbox.isolation import Isolation, Limits
from worker.sandbox.launch import SandboxProcess, remove_directory, start
from worker.settings import WorkerSettings

_READ_BYTES = 64 * 1024
_MAX_CPU_SECONDS = 14 * 24 * 3600
_MAX_REFUSED_LINES = 1000


@dataclass
class EngineProcess:
    """One engine; it works on at most one plan."""

    directory: Path
    sandbox: SandboxProcess
    isolation: Isolation
    inbox: ProgressInbox
    log: CappedLog
    started_at: float = field(default_factory=time.monotonic)
    _readers: list[threading.Thread] = field(default_factory=list)

    def go(self) -> None:
        """Let it begin with DIR/in/plan.json. An engine that is already dead is met by whoever waits for it."""
        self._say(b"go\n")

    def ask_to_stop(self) -> None:
        """Let it write a checkpoint if it can, and end."""
        self._say(b"stop\n")

    def _say(self, line: bytes) -> None:
        stdin = self.sandbox.process.stdin
        assert stdin is not None
        with contextlib.suppress(OSError):
            stdin.write(line)

    def exit_status(self) -> int | None:
        """Return None while it runs; 128 + n when signal n ended it."""
        return self.sandbox.exit_status()

    def kill(self) -> None:
        """End all its processes and read what they left in the pipes."""
        self.sandbox.kill(self.isolation.isolates)
        for reader in self._readers:
            reader.join(5)

    def remove(self) -> None:
        """Kill it and remove its directory."""
        self.kill()
        self.log.close()
        process = self.sandbox.process
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        remove_directory(self.directory)
        self.log.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class EngineFactory:
    """Starts engine processes in fresh directories below `work`."""

    settings: Settings
    worker: WorkerSettings
    isolation: Isolation
    work: Path
    gpus: tuple[Gpu, ...] = ()
    """All that its engines see."""

    def limit(self, num_ranks: int) -> Limits:
        """Return what each process of an engine may use."""
        memory_bytes = self.settings.engine_memory_bytes // num_ranks + count_cuda_library_bytes()
        return Limits(
            # CUDA reserves addresses for more than all memory: with a GPU, the container has to set the limit.
            memory_bytes=None if self.gpus else memory_bytes,
            file_bytes=self.settings.max_artifact_bytes,
            cpu_seconds=_MAX_CPU_SECONDS,
        )

    def start(self, num_ranks: int = 1) -> EngineProcess:
        """Start one. The kernel ties it to the calling thread.

        With several ranks its processes may talk to each other, and each gets an equal share of the memory.
        """
        directory = self.work / secrets.token_hex(8)
        limits = self.limit(num_ranks)
        libraries = find_driver_folders() if self.gpus else ()
        log = CappedLog(directory.with_suffix(".log"), self.settings.max_log_bytes)
        try:
            sandbox = start(
                self.isolation,
                directory,
                self.worker.command(),
                limits,
                num_threads=self.settings.engine_threads,
                extra_readable=(*self.worker.engine_code, *libraries),
                visible_devices=[gpu.visible_as for gpu in self.gpus],
                device_nodes=list_nodes(self.gpus),
                library_folders=libraries,
                loopback=num_ranks > 1,
            )
        except BaseException:
            log.close().unlink()
            remove_directory(directory)
            raise
        engine = EngineProcess(directory, sandbox, self.isolation, ProgressInbox(), log)
        stdout, stderr = sandbox.process.stdout, sandbox.process.stderr
        assert stdout is not None
        assert stderr is not None
        for target, pipe in ((_read_progress, stdout), (_read_log, stderr)):
            reader = threading.Thread(target=target, args=(engine, pipe), daemon=True, name=target.__name__)
            reader.start()
            engine._readers.append(reader)
        return engine


def _read_progress(engine: EngineProcess, pipe: IO[bytes]) -> None:
    logged = 0
    while data := _read(pipe):
        for line in engine.inbox.feed(data):
            logged += 1
            if logged <= _MAX_REFUSED_LINES:
                engine.log.write(b"[not progress] " + line + b"\n")


def _read_log(engine: EngineProcess, pipe: IO[bytes]) -> None:
    while data := _read(pipe):
        engine.log.write(data)


def _read(pipe: IO[bytes]) -> bytes:
    try:
        return os.read(pipe.fileno(), _READ_BYTES)
    except (OSError, ValueError):
        return b""
