"""Runs jobs for one worker process: a hint wakes it, and it takes the waiting job that is next for what it has."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from app.db.session import Database
from app.jobs import Capacity, claim_next
from app.settings import Settings
from app.storage import Storage
from worker.attempt import Attempt
from worker.sandbox.isolation import Isolation
from worker.settings import WorkerSettings
from worker.standby import Standby
from worker.tracing import trace_attempt

_log = structlog.get_logger(__name__)


@dataclass
class Supervisor:
    """Runs jobs one after the other for one worker."""

    database: Database
    storage: Storage
    settings: Settings
    worker: WorkerSettings
    isolation: Isolation
    standby: Standby
    worker_id: str
    capacity: Capacity
    """What it has for a job."""
    find_shortage: Callable[[], str | None]
    """Returns why the disk has no space for a job; None where it has."""
    stopping: threading.Event = field(default_factory=threading.Event)
    """Set when the worker stops: a running job is given back."""
    busy: bool = False
    """Whether a job runs, from before its claim until nothing of it is left."""
    first_line_seconds: list[float] = field(default_factory=list)
    """From claim to the engine's first line, for each job; the benchmark reads it."""

    @property
    def accepts_jobs(self) -> bool:
        """Whether jobs may run here: isolated, or where everything serves a single user."""
        return self.isolation.isolates or self.worker.single_user

    def run(self, hint: str) -> bool:
        """Take the job that is next and see it through; return False where there was nothing to do.

        `hint` is the job for which the hint was sent. It may be taken already, and another may come before it.
        """
        if not self.accepts_jobs:
            _log.warning("job left waiting: no isolation works here", job_id=hint, problems=self.isolation.problems)
            return False
        if (shortage := self.find_shortage()) is not None:
            # It would fail this job, and every other one after it.
            _log.warning("job left waiting: no space on the disk", job_id=hint, problem=shortage)
            return False
        self.busy = True
        try:
            return not self.stopping.is_set() and self._run(hint)
        finally:
            self.busy = False

    def _run(self, hint: str) -> bool:
        claimed_at, claimed_at_ns = time.monotonic(), time.time_ns()
        with self.database.session() as session:
            held = claim_next(
                session,
                self.capacity,
                self.worker_id,
                self.settings.lease_seconds,
                self.settings.quota_running_jobs,
            )
        if held is None:
            _log.info("nothing to do", hint=hint)
            return False
        # Every line until the end of the attempt says which job it is about, whose it is and who asked for it.
        ids = {
            "job_id": held.job_id,
            "owner": held.owner,
            "attempt": held.attempt,
            "epoch": held.epoch,
            "request_id": held.request_id,
            "worker_id": self.worker_id,
        }
        with structlog.contextvars.bound_contextvars(**ids), trace_attempt(held, claimed_at_ns):
            _log.info("claimed", hint=hint, action=held.action)
            Attempt(self, held, claimed_at).run()
        return True
