"""One attempt of a job, from claim to finish: the engine is started, watched, ended and believed in nothing.

Every way out ends all processes of the attempt first, removes its directory, and writes at most one transaction, which
carries the epoch of the claim.
"""

import errno
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import structlog
from opentelemetry import trace

from app.errors import PareError, StorageFull
from app.files import hold
from app.jobs import Claim, Place, confirm_cancelled, fail, release, succeed
from app.recipes.plan import Action, EngineError, EngineResult, Plan
from app.recipes.training import TrainingSettings
from app.storage import Blob, checkpoint_storage, owner_storage
from worker.checkpoints import CheckpointShelf
from worker.engine_process import EngineProcess
from worker.failures import (
    AttemptCancelled,
    AttemptEnded,
    AttemptFailed,
    AttemptLost,
    AttemptReleased,
    defect,
    describe_exit,
    describe_second_shortage,
)
from worker.job_files import check_artifacts, check_disk, place_artifacts, place_inputs, read_result, write_plan
from worker.lease import Lease
from worker.standby import EngineUnavailable
from worker.tracing import note_outcome, trace_engine

if TYPE_CHECKING:
    from worker.supervisor import Supervisor

_LOOK_SECONDS = 0.02
_DISK_LOOK_SECONDS = 2.0
_START_SECONDS = 120.0

_log = structlog.get_logger(__name__)


class Attempt:
    """One claim and its engines."""

    def __init__(self, supervisor: "Supervisor", held: Claim, claimed_at: float) -> None:
        self._supervisor = supervisor
        self._claim = held
        self._claimed_at = claimed_at
        self._lease = Lease(supervisor.database, held, supervisor.settings, supervisor.worker, claimed_at)
        self._engines: list[tuple[str, EngineProcess]] = []
        """With what each was for, in the order they were taken."""
        storage, job_id = supervisor.storage, held.job_id
        max_bytes = min(supervisor.settings.max_artifact_bytes, supervisor.worker.max_disk_bytes)
        self._section = owner_storage(storage, held.owner)
        self._next_checkpoint_at = 0.0
        self._shelf = CheckpointShelf(checkpoint_storage(storage, job_id), held.checkpoints, max_bytes)

    def run(self) -> None:
        """Run the action; whatever happens, end what was started and write the outcome."""
        self._lease.start()
        outcome: EngineResult | AttemptEnded
        try:
            outcome = self._act()
        except AttemptEnded as ended:
            outcome = ended
        except EngineUnavailable as error:
            outcome = AttemptFailed(defect("engine_unavailable", str(error)[:2000], retryable=True))
        except PareError as error:
            outcome = AttemptFailed(_describe(error))
        except OSError as error:
            outcome = AttemptFailed(_describe_system(error))
        except Exception:  # the edge of the attempt: our own mistakes must end it too, not leave it hanging
            _log.exception("the worker failed")
            outcome = AttemptFailed(defect("worker_failed", "the worker failed; its log says why", retryable=True))
        finally:
            for _, engine in self._engines:
                engine.kill()
        try:
            self._finish(outcome)
        finally:
            self._lease.release()
            for _, engine in self._engines:
                engine.remove()

    def _act(self) -> EngineResult:
        held, settings = self._claim, self._supervisor.settings
        try:
            engine, plan, result = self._try(split_batches=1)
        except AttemptFailed as failed:
            if not self._can_split(failed.error):
                raise
            _log.warning("memory ran out; once more with smaller parts")
            try:
                engine, plan, result = self._try(split_batches=2)
            except AttemptFailed as again:
                raise AttemptFailed(describe_second_shortage(again.error)) from None
        check_artifacts(
            engine.directory,
            result,
            settings.max_artifact_bytes,
            self._supervisor.worker.max_disk_bytes,
            check_end=self._check_end,
        )
        if held.action == "optimize":
            self._verify(engine, plan, tuple(artifact.name for artifact in result.artifacts))
        return result

    def _try(self, *, split_batches: int) -> tuple[EngineProcess, Plan, EngineResult]:
        """Run the action in an engine of its own, from the newest checkpoint on."""
        held, settings = self._claim, self._supervisor.settings
        engine = self._take_engine("work", held.recipe.plan.num_ranks if held.recipe is not None else 1)
        inputs = place_inputs(engine.directory, held, self._section)
        resumable = held.action == "optimize"
        plan = Plan(
            action=cast(Action, held.action),
            model=inputs.model,
            teachers=inputs.teachers,
            datasets=inputs.datasets,
            recipe=held.recipe,
            num_threads=settings.engine_threads,
            isolation=tuple(self._supervisor.isolation.layers),
            checkpoint_seconds=settings.checkpoint_seconds if resumable else None,
            checkpoints=self._shelf.place(engine.directory) if resumable else (),
            split_batches=split_batches,
        )
        self._work(engine, plan)
        if engine.inbox.first_line_at is not None:
            self._supervisor.first_line_seconds.append(engine.inbox.first_line_at - self._claimed_at)
        return engine, plan, self._read(engine, held.action)

    def _can_split(self, error: EngineError) -> bool:
        """Whether memory ran out in a step whose batches can be taken in smaller parts."""
        recipe, last = self._claim.recipe, self._engines[-1][1].inbox.last
        if error.code != "out_of_memory" or recipe is None or last is None or last.step is None:
            return False
        step = recipe.steps[last.step] if last.step < len(recipe.steps) else None
        training = step if isinstance(step, TrainingSettings) else getattr(step, "training", None)
        return training is not None and training.batch_size > training.accumulate

    def _verify(self, source: EngineProcess, plan: Plan, names: tuple[str, ...]) -> None:
        """Have a fresh process reload every artifact before the job may succeed."""
        engine = self._take_engine("verify")
        place_artifacts(source.directory, engine.directory, names)
        left_out = {"model": None, "teachers": (), "datasets": (), "checkpoints": (), "checkpoint_seconds": None}
        self._work(engine, plan.model_copy(update={"action": "verify", "artifacts": names, **left_out}))
        self._read(engine, "verify")

    def _take_engine(self, purpose: str, num_ranks: int = 1) -> EngineProcess:
        engine = self._supervisor.standby.take(_START_SECONDS, give_up=self._must_end, num_ranks=num_ranks)
        self._engines.append((purpose, engine))
        return engine

    def _work(self, engine: EngineProcess, plan: Plan) -> None:
        """Let the engine work and return when it has ended by itself."""
        write_plan(engine.directory, plan)
        self._check_end()
        if plan.action != "verify":  # its fraction is of another action
            self._lease.follow(engine.inbox.drain)
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

    def _watch(self, engine: EngineProcess, plan: Plan) -> None:
        engine.go()
        disk_looked_at = time.monotonic()
        try:
            while (status := engine.exit_status()) is None:
                self._check_end()
                self._check_times(engine)
                self._follow_checkpoints(engine, self._check_end)
                if time.monotonic() - disk_looked_at > _DISK_LOOK_SECONDS:
                    check_disk(engine.directory, self._supervisor.worker.max_disk_bytes)
                    disk_looked_at = time.monotonic()
                time.sleep(_LOOK_SECONDS)
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
            self._follow_checkpoints(engine, self._check_end)
            raise AttemptFailed(describe_exit(status, engine.log.last_bytes()))

    def _follow_checkpoints(self, engine: EngineProcess, check_end: Callable[[], None]) -> None:
        """Store what the engine wrote since the last look, and note what it goes on from."""
        self._follow_start(engine)
        self._shelf.delete(self._lease.take_dropped())
        if time.monotonic() < self._next_checkpoint_at or (told := engine.inbox.take_checkpoint()) is None:
            return
        assert told.checkpoint is not None
        started_at = time.monotonic()
        place = Place(told.stage, told.step, told.fraction)
        stored = self._shelf.take(engine.directory, told.checkpoint, place, check_end)
        if stored is not None:
            self._lease.tell(stored)
        # An engine that tells of one after the other must not keep the worker from all else.
        self._next_checkpoint_at = 2 * time.monotonic() - started_at

    def _follow_start(self, engine: EngineProcess) -> None:
        """Note what the engine goes on from."""
        resumed = engine.inbox.take_resumed()
        if resumed is not None and (place := self._shelf.find(resumed)) is not None:
            self._lease.tell(place)

    def _hand_over(self, engine: EngineProcess) -> None:
        """Let the engine write a last checkpoint, for the worker that takes the job next."""
        engine.ask_to_stop()
        end = time.monotonic() + self._supervisor.worker.checkpoint_grace_seconds
        while engine.exit_status() is None and time.monotonic() < end and not self._must_end_at_once():
            time.sleep(_LOOK_SECONDS)
        engine.kill()
        if not self._must_end_at_once():
            self._next_checkpoint_at = 0.0
            self._follow_checkpoints(engine, self._check_lost)

    def _read(self, engine: EngineProcess, action: str) -> EngineResult:
        result = read_result(engine.directory, action)
        if result.error is not None:
            raise AttemptFailed(result.error)
        return result

    def _must_end_at_once(self) -> bool:
        return self._lease.lost or self._lease.cancelled

    def _check_lost(self) -> None:
        if self._lease.lost:
            raise AttemptLost

    def _must_end(self) -> bool:
        return self._lease.lost or self._lease.cancelled or self._supervisor.stopping.is_set()

    def _check_end(self) -> None:
        if self._lease.lost:
            raise AttemptLost
        if self._lease.cancelled:
            raise AttemptCancelled
        if self._supervisor.stopping.is_set():
            raise AttemptReleased

    def _check_times(self, engine: EngineProcess) -> None:
        now = time.monotonic()
        limit = self._claim.deadline_seconds
        if now - self._claimed_at > limit:
            raise AttemptFailed(
                EngineError(
                    code="deadline_exceeded",
                    detail=f"the attempt took longer than deadline_seconds = {limit}",
                    fix="Submit the job with a larger deadline_seconds, or with less work in the recipe.",
                )
            )
        silent = self._supervisor.worker.progress_timeout_seconds
        if now - engine.inbox.last_line_at > silent:
            raise AttemptFailed(defect("engine_stuck", f"the engine reported nothing for {silent:g} seconds"))

    def _end_politely(self, engine: EngineProcess) -> None:
        """Ask, wait a while, then insist; at once when the job is lost meanwhile."""
        engine.sandbox.terminate()
        end = time.monotonic() + self._supervisor.settings.cancel_grace_seconds
        while engine.exit_status() is None and time.monotonic() < end and not self._lease.lost:
            time.sleep(_LOOK_SECONDS)
        engine.kill()

    def _finish(self, outcome: EngineResult | AttemptEnded) -> None:
        """Store what there is to keep, then write the outcome in one transaction."""
        if isinstance(outcome, AttemptLost) or self._lease.lost:
            _log.warning("lost")
            return
        try:
            blobs = self._store_artifacts(outcome) if isinstance(outcome, EngineResult) else {}
            log = self._store_log()
        except PareError as error:
            outcome, blobs, log = AttemptFailed(_describe(error)), {}, None
        except OSError as error:
            outcome, blobs, log = AttemptFailed(_describe_system(error)), {}, None
        if not self._lease.release() or self._lease.lost:
            return
        written = self._write(outcome, blobs, log)
        if written and isinstance(outcome, EngineResult) and not self._lease.cancelled:
            self._shelf.clear()
        name = type(outcome).__name__ if isinstance(outcome, AttemptEnded) else "succeeded"
        code = outcome.error.code if isinstance(outcome, AttemptFailed) else None
        note_outcome(trace.get_current_span(), name, code)
        _log.info("finished", outcome=name, written=written, code=code)

    def _store_artifacts(self, result: EngineResult) -> dict[str, Blob]:
        worked = next(engine for purpose, engine in reversed(self._engines) if purpose == "work")
        folder = worked.directory / "out" / "artifacts"
        blobs = {artifact.name: self._section.put_file(folder / artifact.name) for artifact in result.artifacts}
        for artifact in result.artifacts:
            assert blobs[artifact.name].sha256 == artifact.sha256, f"{artifact.name} changed after its engine had ended"
        return blobs

    def _store_log(self) -> Blob | None:
        if not self._engines:
            return None
        _, first = self._engines[0]
        for purpose, engine in self._engines[1:]:
            first.log.write(f"[{purpose}]\n".encode() + engine.log.last_bytes(64 * 1024))
        return self._section.put_file(first.log.close())

    def _write(self, outcome: EngineResult | AttemptEnded, blobs: dict[str, Blob], log: Blob | None) -> bool:
        """Write the outcome, again and again while the database is away and the lease holds."""
        while True:
            try:
                with self._supervisor.database.session() as session:
                    hold(session, self._section, [*blobs.values(), *([log] if log else [])])
                    return self._settle(outcome, blobs, log)(session)
            except PareError as error:
                _log.warning("the outcome could not be written yet", error=error.code)
                if self._lease.lost:
                    return False
                time.sleep(0.5)

    def _settle(
        self, outcome: EngineResult | AttemptEnded, blobs: dict[str, Blob], log: Blob | None
    ) -> "Callable[..., bool]":
        held, layers = self._claim, self._supervisor.isolation.layers
        if isinstance(outcome, EngineResult):
            # Cancelled in the last moment: then nothing is published and the cancel is confirmed instead.
            return lambda session: (
                succeed(session, held, outcome, blobs, layers, log) or confirm_cancelled(session, held, log)
            )
        if isinstance(outcome, AttemptFailed):
            return lambda session: fail(session, held, outcome.error, log, layers)
        if isinstance(outcome, AttemptReleased):
            return lambda session: release(session, held, "worker_stopped", log)
        return lambda session: confirm_cancelled(session, held, log)


def _describe(error: PareError) -> EngineError:
    return EngineError(code=error.code, detail=error.detail, fix=error.fix, retryable=error.retryable)


def _describe_system(error: OSError) -> EngineError:
    """Describe what the system refused while files were moved in or out of the job's directory."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        full = StorageFull("the disk of the worker has no space left for the job's files")
        return _describe(full)
    _log.error("the worker failed", error=str(error)[:300])
    return defect("worker_failed", f"the worker's system failed: {error.strerror}", retryable=True)
