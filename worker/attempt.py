"""One attempt of a job, from claim to finish: the engine is started, watched, ended and believed in nothing.

Every way out ends all processes of the attempt first, removes its directory, and writes at most one transaction, which
carries the epoch of the claim.
"""

import errno
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import structlog

from app.errors import PareError, StorageFull
from app.jobs import Claim, confirm_cancelled, fail, release, succeed
from app.recipes.plan import Action, EngineError, EngineResult, Plan
from app.storage import Blob
from worker.engine_process import EngineProcess
from worker.failures import (
    AttemptCancelled,
    AttemptEnded,
    AttemptFailed,
    AttemptLost,
    AttemptReleased,
    defect,
    describe_exit,
)
from worker.job_files import check_artifacts, check_disk, place_artifacts, place_inputs, read_result, write_plan
from worker.lease import Lease
from worker.standby import EngineUnavailable

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
        self._engines: list[EngineProcess] = []

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
            _log.exception("the worker failed", job_id=self._claim.job_id)
            outcome = AttemptFailed(defect("worker_failed", "the worker failed; its log says why", retryable=True))
        finally:
            for engine in self._engines:
                engine.kill()
        try:
            self._finish(outcome)
        finally:
            self._lease.release()
            for engine in self._engines:
                engine.remove()

    def _act(self) -> EngineResult:
        held, settings = self._claim, self._supervisor.settings
        engine = self._take_engine()
        inputs = place_inputs(engine.directory, held, self._supervisor.storage)
        plan = Plan(
            action=cast(Action, held.action),
            model=inputs.model,
            teachers=inputs.teachers,
            datasets=inputs.datasets,
            recipe=held.recipe,
            num_threads=settings.engine_threads,
            isolation=tuple(self._supervisor.isolation.layers),
        )
        self._work(engine, plan)
        if engine.inbox.first_line_at is not None:
            self._supervisor.first_line_seconds.append(engine.inbox.first_line_at - self._claimed_at)
        result = self._read(engine, held.action)
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

    def _verify(self, source: EngineProcess, plan: Plan, names: tuple[str, ...]) -> None:
        """Have a fresh process reload every artifact before the job may succeed."""
        engine = self._take_engine()
        place_artifacts(source.directory, engine.directory, names)
        left_out = {"model": None, "teachers": (), "datasets": ()}
        self._work(engine, plan.model_copy(update={"action": "verify", "artifacts": names, **left_out}))
        self._read(engine, "verify")

    def _take_engine(self) -> EngineProcess:
        engine = self._supervisor.standby.take(_START_SECONDS, give_up=self._must_end)
        self._engines.append(engine)
        return engine

    def _work(self, engine: EngineProcess, plan: Plan) -> None:
        """Let the engine work and return when it has ended by itself."""
        write_plan(engine.directory, plan)
        self._check_end()
        if plan.action != "verify":  # its fraction is of another action
            self._lease.follow(engine.inbox.drain)
        engine.inbox.last_line_at = time.monotonic()
        engine.go()
        disk_looked_at = time.monotonic()
        try:
            while (status := engine.exit_status()) is None:
                self._check_end()
                self._check_times(engine)
                if time.monotonic() - disk_looked_at > _DISK_LOOK_SECONDS:
                    check_disk(engine.directory, self._supervisor.worker.max_disk_bytes)
                    disk_looked_at = time.monotonic()
                time.sleep(_LOOK_SECONDS)
        except (AttemptCancelled, AttemptFailed):
            self._end_politely(engine)
            raise
        engine.kill()  # what it left behind, and the end of its pipes
        if status != 0:
            raise AttemptFailed(describe_exit(status, engine.log.last_bytes()))

    def _read(self, engine: EngineProcess, action: str) -> EngineResult:
        result = read_result(engine.directory, action)
        if result.error is not None:
            raise AttemptFailed(result.error)
        return result

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
        held = self._claim
        if isinstance(outcome, AttemptLost) or self._lease.lost:
            _log.warning("lost", job_id=held.job_id, epoch=held.epoch)
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
        name = type(outcome).__name__ if isinstance(outcome, AttemptEnded) else "succeeded"
        _log.info(
            "finished",
            job_id=held.job_id,
            epoch=held.epoch,
            outcome=name,
            written=written,
            code=outcome.error.code if isinstance(outcome, AttemptFailed) else None,
        )

    def _store_artifacts(self, result: EngineResult) -> dict[str, Blob]:
        folder = self._engines[0].directory / "out" / "artifacts"
        blobs = {
            artifact.name: self._supervisor.storage.put_file(folder / artifact.name) for artifact in result.artifacts
        }
        for artifact in result.artifacts:
            assert blobs[artifact.name].sha256 == artifact.sha256, f"{artifact.name} changed after its engine had ended"
        return blobs

    def _store_log(self) -> Blob | None:
        if not self._engines:
            return None
        first = self._engines[0]
        for engine in self._engines[1:]:
            first.log.write(b"[verify]\n" + engine.log.last_bytes(64 * 1024))
        return self._supervisor.storage.put_file(first.log.close())

    def _write(self, outcome: EngineResult | AttemptEnded, blobs: dict[str, Blob], log: Blob | None) -> bool:
        """Write the outcome, again and again while the database is away and the lease holds."""
        while True:
            try:
                with self._supervisor.database.session() as session:
                    return self._settle(outcome, blobs, log)(session)
            except PareError as error:
                _log.warning("the outcome could not be written yet", job_id=self._claim.job_id, error=error.code)
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
