"""Watching one engine after the other of an attempt: it is ended when its time is, and its checkpoints are stored."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from app.jobs import Claim, Place
from app.recipes.plan import EngineError, Plan
from app.settings import Settings
from worker.checkpoints import CheckpointShelf
from worker.engine_process import EngineProcess
from worker.failures import (
    AttemptCancelled,
    AttemptFailed,
    AttemptLost,
    AttemptReleased,
    defect,
    describe_exit,
)
from worker.job_files import check_disk, write_plan
from worker.lease import Lease
from worker.settings import WorkerSettings
from worker.tracing import trace_engine

LOOK_SECONDS = 0.02
DISK_LOOK_SECONDS = 2.0

_log = structlog.get_logger(__name__)


@dataclass
class EngineWatch:
    """What the engines of one attempt are held to."""

    settings: Settings
    worker: WorkerSettings
    held: Claim
    claimed_at: float
    lease: Lease
    shelf: CheckpointShelf
    is_stopping: Callable[[], bool]
    """Whether the worker stops."""
    _next_checkpoint_at: float = field(default=0.0, init=False)

    def work(self, engine: EngineProcess, plan: Plan) -> None:
        """Let an engine work and return when it has ended by itself; raises AttemptEnded where it must not go on."""
        write_plan(engine.directory, plan)
        self.check_end()
        if plan.action != "verify":  # its fraction is of another action
            self.lease.follow(engine.inbox.drain)
        engine.inbox.last_line_at = time.monotonic()
        # What the engine says itself is the log of the job, which its owner reads: text, and not to be believed.
        log = _log.bind(engine_action=plan.action, engine_pid=engine.sandbox.process.pid)
        began_at = time.monotonic()
        log.info("engine begins")
        try:
            with trace_engine(plan.action, engine.sandbox.process.pid, engine.inbox.stages):
                self._watch(engine, plan)
        finally:
            engine.kill()
            last, seconds = engine.inbox.last, round(time.monotonic() - began_at, 3)
            stage = last.stage if last is not None else None
            log.info("engine ended", exit_status=engine.exit_status(), stage=stage, seconds=seconds)

    def must_end(self) -> bool:
        """Whether the attempt may not go on."""
        return self._must_end_at_once() or self.is_stopping()

    def check_end(self) -> None:
        """Raise AttemptLost, AttemptCancelled or AttemptReleased where the attempt may not go on."""
        self._check_lost()
        if self.lease.cancelled:
            raise AttemptCancelled
        if self.is_stopping():
            raise AttemptReleased

    def _watch(self, engine: EngineProcess, plan: Plan) -> None:
        engine.go()
        disk_looked_at = time.monotonic()
        try:
            while (status := engine.exit_status()) is None:
                self.check_end()
                self._check_times(engine)
                self._follow_checkpoints(engine, self.check_end)
                if time.monotonic() - disk_looked_at > DISK_LOOK_SECONDS:
                    check_disk(engine.directory, self.worker.max_disk_bytes)
                    disk_looked_at = time.monotonic()
                time.sleep(LOOK_SECONDS)
        except (AttemptCancelled, AttemptFailed):
            self._end_politely(engine)
            raise
        except AttemptReleased:
            if plan.checkpoint_seconds is not None:
                self._hand_over(engine)
            raise
        engine.kill()  # what it left behind, and the end of its pipes
        self._follow_start(engine)
        if status != 0:
            self._follow_checkpoints(engine, self.check_end)
            raise AttemptFailed(describe_exit(status, engine.log.last_bytes()))

    def _follow_checkpoints(self, engine: EngineProcess, check_end: Callable[[], None]) -> None:
        """Store what the engine wrote since the last look, and note what it goes on from."""
        self._follow_start(engine)
        self.shelf.delete(self.lease.take_dropped())
        if time.monotonic() < self._next_checkpoint_at or (told := engine.inbox.take_checkpoint()) is None:
            return
        assert told.checkpoint is not None
        started_at = time.monotonic()
        place = Place(told.stage, told.step, told.fraction)
        stored = self.shelf.take(engine.directory, told.checkpoint, place, check_end)
        if stored is not None:
            self.lease.tell(stored)
        # An engine that tells of one after the other must not keep the worker from all else.
        self._next_checkpoint_at = 2 * time.monotonic() - started_at

    def _follow_start(self, engine: EngineProcess) -> None:
        """Note what the engine goes on from."""
        resumed = engine.inbox.take_resumed()
        if resumed is not None and (place := self.shelf.find(resumed)) is not None:
            self.lease.tell(place)

    def _hand_over(self, engine: EngineProcess) -> None:
        """Let the engine write a last checkpoint, for the worker that takes the job next."""
        engine.ask_to_stop()
        end = time.monotonic() + self.worker.checkpoint_grace_seconds
        while engine.exit_status() is None and time.monotonic() < end and not self._must_end_at_once():
            time.sleep(LOOK_SECONDS)
        engine.kill()
        if not self._must_end_at_once():
            self._next_checkpoint_at = 0.0
            self._follow_checkpoints(engine, self._check_lost)

    def _must_end_at_once(self) -> bool:
        return self.lease.lost or self.lease.cancelled

    def _check_lost(self) -> None:
        if self.lease.lost:
            raise AttemptLost

    def _check_times(self, engine: EngineProcess) -> None:
        now = time.monotonic()
        limit = self.held.deadline_seconds
        if now - self.claimed_at > limit:
            raise AttemptFailed(
                EngineError(
                    code="deadline_exceeded",
                    detail=f"the attempt took longer than deadline_seconds = {limit}",
                    fix="Submit the job with a larger deadline_seconds, or with less work in the recipe.",
                )
            )
        silent = self.worker.progress_timeout_seconds
        if now - engine.inbox.last_line_at > silent:
            raise AttemptFailed(defect("engine_stuck", f"the engine reported nothing for {silent:g} seconds"))

    def _end_politely(self, engine: EngineProcess) -> None:
        """Ask, wait a while, then insist; at once when the job is lost meanwhile."""
        engine.sandbox.terminate()
        end = time.monotonic() + self.settings.cancel_grace_seconds
        while engine.exit_status() is None and time.monotonic() < end and not self.lease.lost:
            time.sleep(LOOK_SECONDS)
        engine.kill()
