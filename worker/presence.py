"""A worker's row in the database: who it is, what it can do, and that it is alive."""

import os
import platform
import secrets
import socket
import threading
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import structlog
from sqlalchemy.orm import Session

from app.db.session import Database
from app.errors import PareError
from app.jobs import register_worker, remove_worker, touch_worker
from app.jobs.workers import change_worker
from worker.sandbox.isolation import Isolation
from worker.shares import Share

_log = structlog.get_logger(__name__)


def new_worker_id() -> str:
    """Return a name that no other worker process has, now or later."""
    host = "".join(letter for letter in socket.gethostname() if letter.isalnum() or letter in "-.")[:40]
    return f"{host or 'worker'}-{os.getpid()}-{secrets.token_hex(4)}"


def describe_worker(isolation: Isolation, accepts_jobs: bool, share: Share) -> dict[str, Any]:
    """Return the facts that health and GET /v1/workers show."""
    return {
        "accepts": list(share.accepts),
        "devices": [
            {"index": gpu.index, "name": gpu.name, "memory_bytes": gpu.memory_bytes, "uuid": gpu.uuid}
            for gpu in share.gpus
        ],
        "memory_bytes": share.memory_bytes,
        "num_threads": share.num_threads,
        "slot": share.slot,
        "concurrency": share.num_slots,
        "num_cores": os.cpu_count() or 1,
        "machine": platform.machine(),
        "isolation": isolation.layers,
        "isolation_method": isolation.method,
        "isolation_problems": [problem[:300] for problem in isolation.problems],
        "accepts_jobs": accepts_jobs,
        "versions": {name: _version(name) for name in ("pare", "torch", "onnxruntime", "celery")},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)  # reads the package's metadata; the package is not imported
    except PackageNotFoundError:
        return None


class Presence(threading.Thread):
    """Registers the worker and says again and again that it lives."""

    def __init__(
        self,
        database: Database,
        worker_id: str,
        queues: str,
        facts: dict[str, Any],
        interval_seconds: float,
        find_shortage: Callable[[], str | None],
    ) -> None:
        super().__init__(name="presence", daemon=True)
        self._database = database
        self._worker_id = worker_id
        self._queues = queues
        self._facts = facts
        self._interval_seconds = interval_seconds
        self._find_shortage = find_shortage
        self._changing = threading.Lock()
        self._ended = threading.Event()

    def run(self) -> None:
        """Go on until stopped; a database that is away is tried again."""
        while True:
            try:
                with self._database.session() as session:
                    if not touch_worker(session, self._worker_id):
                        self._register(session)
                self._change(disk_problem=self._find_shortage())
            except PareError as error:
                _log.warning("the worker cannot say that it is alive", error=error.code)
            if self._ended.wait(self._interval_seconds):
                return

    def announce_stop(self) -> None:
        """Say that it takes no more jobs; it stays alive while it runs one."""
        try:
            self._change(stopping=True)
        except PareError as error:
            _log.warning("the worker cannot say that it stops", error=error.code)

    def _change(self, **facts: object) -> None:
        """Write facts down that are new."""
        with self._changing:
            if all(self._facts.get(name) == value for name, value in facts.items()):
                return
            changed = self._facts | facts
            with self._database.session() as session:
                change_worker(session, self._worker_id, changed)
            self._facts = changed

    def _register(self, session: Session) -> None:
        host = socket.gethostname()[:255]
        register_worker(session, self._worker_id, host=host, queue=self._queues, facts=self._facts)

    def end(self) -> None:
        """Stop and take the row away."""
        self._ended.set()
        self.join(5)
        try:
            with self._database.session() as session:
                remove_worker(session, self._worker_id)
        except PareError as error:
            _log.warning("the worker could not sign off", error=error.code)
