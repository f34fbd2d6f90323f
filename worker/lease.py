"""Keeping a claimed job: heartbeats, progress and news of a cancel, in a thread apart from the work.

Only this thread talks to the database while an engine runs, so that a database which hangs cannot stop the one who
watches the engine: it sees the lease run out by its own clock.
"""

import threading
import time
from collections import deque
from collections.abc import Callable

from sqlalchemy import select

from app.db.session import Database
from app.db.tables import JobRow
from app.errors import PareError
from app.jobs import (
    Claim,
    Place,
    State,
    StoredCheckpoint,
    heartbeat,
    record_checkpoint,
    record_progress,
    record_resumed,
)
from app.jobs.lifecycle import held
from app.recipes.plan import Progress
from app.settings import Settings
from worker.settings import WorkerSettings

_RETRY_SECONDS = 0.5
_MAX_UNWRITTEN = 200
_MAX_CHECKPOINTS = 10_000
"""Of one attempt: each is an event."""


class Lease(threading.Thread):
    """The hold on one attempt of a job."""

    def __init__(
        self, database: Database, claim: Claim, settings: Settings, worker: WorkerSettings, claimed_at: float
    ) -> None:
        super().__init__(name=f"lease-{claim.job_id}", daemon=True)
        self._database = database
        self._claim = claim
        self._settings = settings
        self._worker = worker
        self._renewed_at = claimed_at  # taken before the claim was sent: never later than the database's view
        self._margin = min(5.0, settings.lease_seconds / 5)
        self._is_lost = False
        self._is_cancelled = False
        self._released = threading.Event()
        self._source: Callable[[], list[Progress]] = list
        self._unwritten: list[Progress] = []
        self._events_left = settings.max_events_per_attempt
        self._news: deque[StoredCheckpoint | Place] = deque()
        self._checkpoints_left = _MAX_CHECKPOINTS
        self._dropped: deque[str] = deque()

    @property
    def lost(self) -> bool:
        """Another may own the job now, or soon: end its processes and write nothing more."""
        return self._is_lost or time.monotonic() > self._renewed_at + self._settings.lease_seconds - self._margin

    @property
    def cancelled(self) -> bool:
        """The user wants it to end."""
        return self._is_cancelled

    def follow(self, source: Callable[[], list[Progress]]) -> None:
        """Take progress from `source`."""
        self._source = source

    def tell(self, news: StoredCheckpoint | Place) -> None:
        """Record a checkpoint that was stored, or the place that the work goes on from."""
        self._news.append(news)

    def take_dropped(self) -> list[str]:
        """Return the digests of checkpoints that no row names any more, each once."""
        return [self._dropped.popleft() for _ in range(len(self._dropped))]

    def release(self) -> bool:
        """Write the last progress and end the thread; False where it hangs in the database."""
        self._released.set()
        if self.is_alive():
            self.join(self._margin + self._settings.lease_seconds)
        return not self.is_alive()

    def run(self) -> None:
        """Renew, report and look, until released or lost."""
        pause = min(self._worker.cancel_poll_seconds, self._worker.progress_interval_seconds)
        looked_at = time.monotonic()
        while not self._is_lost:
            last_round = self._released.wait(pause)
            try:
                self._report()
                now = time.monotonic()
                if now - self._renewed_at >= self._settings.heartbeat_seconds:
                    self._renew()
                elif now - looked_at >= self._worker.cancel_poll_seconds:
                    looked_at = now
                    self._look()
            except PareError:
                # The database is away: go on and try again; `lost` turns true by itself when it stays away.
                if not last_round:
                    self._released.wait(_RETRY_SECONDS)
            if last_round:
                return

    def _renew(self) -> None:
        asked_at = time.monotonic()
        with self._database.session() as session:
            state = heartbeat(session, self._claim.job_id, self._claim.epoch, self._settings.lease_seconds)
        self._note(state)
        if state is not None:
            self._renewed_at = asked_at

    def _look(self) -> None:
        query = select(JobRow.state).where(JobRow.id == self._claim.job_id, *held(self._claim.epoch))
        with self._database.read() as session:
            state = session.scalar(query)
        self._note(State(state) if state is not None else None)

    def _note(self, state: State | None) -> None:
        if state is None:
            self._is_lost = True
        elif state is State.CANCELLING:
            self._is_cancelled = True

    def _report(self) -> None:
        self._report_progress()
        while self._news and not self._is_lost:
            self._record(self._news[0])
            self._news.popleft()

    def _record(self, news: StoredCheckpoint | Place) -> None:
        job_id, epoch = self._claim.job_id, self._claim.epoch
        with self._database.session() as session:
            if isinstance(news, Place):
                self._is_lost = not record_resumed(session, job_id, epoch, news)
                return
            if self._checkpoints_left <= 0:
                return
            dropped = record_checkpoint(session, job_id, epoch, news)
        self._checkpoints_left -= 1
        if dropped is None:
            self._is_lost = True
        else:
            self._dropped.extend(dropped)

    def _report_progress(self) -> None:
        self._unwritten += self._source()
        waiting = self._unwritten[-_MAX_UNWRITTEN:]
        if not waiting:
            return
        with self._database.session() as session:
            for progress in waiting if self._events_left > len(waiting) else waiting[-1:]:
                if self._events_left > 0:
                    self._events_left -= 1
                    kept = record_progress(session, self._claim.job_id, self._claim.epoch, progress)
                else:
                    lease_seconds = self._settings.lease_seconds
                    kept = (
                        heartbeat(session, self._claim.job_id, self._claim.epoch, lease_seconds, progress) is not None
                    )
                if not kept:
                    self._is_lost = True
                    return
        self._unwritten = []
