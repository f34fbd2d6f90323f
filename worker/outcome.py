"""Writing how an attempt ended: what is kept goes into storage, then one transaction carries the epoch of the claim.

Nothing is written for a job that may belong to another worker.
"""

import errno
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog
from opentelemetry import trace

from app.db.session import Database
from app.errors import PareError, StorageFull
from app.files import hold
from app.jobs import Claim, confirm_cancelled, fail, release, succeed
from app.recipes.plan import EngineError, EngineResult
from app.storage import Blob, Section
from worker.engine_process import EngineProcess
from worker.failures import AttemptEnded, AttemptFailed, AttemptLost, AttemptReleased, defect
from worker.lease import Lease
from worker.tracing import note_outcome

_RETRY_SECONDS = 0.5
_MAX_LOG_BYTES = 64 * 1024
"""Of each engine after the first."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class OutcomeWriter:
    """Writes the outcome of one attempt."""

    database: Database
    section: Section
    """Where the owner's files are."""
    held: Claim
    lease: Lease
    layers: list[str]
    """Of the isolation in which the engines were."""

    def finish(self, outcome: EngineResult | AttemptEnded, engines: Sequence[tuple[str, EngineProcess]]) -> bool:
        """Store what there is to keep, then write the outcome; return whether the job succeeded for good.

        `engines` have ended; with what each was for, in the order they were taken.
        """
        if isinstance(outcome, AttemptLost) or self.lease.lost:
            _log.warning("lost")
            return False
        try:
            blobs = self._store_artifacts(outcome, engines) if isinstance(outcome, EngineResult) else {}
            log = self._store_log(engines)
        except (PareError, OSError) as error:
            outcome, blobs, log = AttemptFailed(describe(error)), {}, None
        if not self.lease.release() or self.lease.lost:
            return False
        written = self._write(outcome, blobs, log)
        name = type(outcome).__name__ if isinstance(outcome, AttemptEnded) else "succeeded"
        code = outcome.error.code if isinstance(outcome, AttemptFailed) else None
        note_outcome(trace.get_current_span(), name, code)
        _log.info("finished", outcome=name, written=written, code=code)
        return written and isinstance(outcome, EngineResult) and not self.lease.cancelled

    def _store_artifacts(self, result: EngineResult, engines: Sequence[tuple[str, EngineProcess]]) -> dict[str, Blob]:
        worked = next(engine for purpose, engine in reversed(engines) if purpose == "work")
        folder = worked.directory / "out" / "artifacts"
        blobs = {artifact.name: self.section.put_file(folder / artifact.name) for artifact in result.artifacts}
        for artifact in result.artifacts:
            assert blobs[artifact.name].sha256 == artifact.sha256, f"{artifact.name} changed after its engine had ended"
        return blobs

    def _store_log(self, engines: Sequence[tuple[str, EngineProcess]]) -> Blob | None:
        if not engines:
            return None
        _, first = engines[0]
        for purpose, engine in engines[1:]:
            first.log.write(f"[{purpose}]\n".encode() + engine.log.last_bytes(_MAX_LOG_BYTES))
        return self.section.put_file(first.log.close())

    def _write(self, outcome: EngineResult | AttemptEnded, blobs: dict[str, Blob], log: Blob | None) -> bool:
        """Write the outcome, again and again while the database is away and the lease holds."""
        while True:
            try:
                with self.database.session() as session:
                    hold(session, self.section, [*blobs.values(), *([log] if log else [])])
                    return self._settle(outcome, blobs, log)(session)
            except PareError as error:
                _log.warning("the outcome could not be written yet", error=error.code)
                if self.lease.lost:
                    return False
                time.sleep(_RETRY_SECONDS)

    def _settle(
        self, outcome: EngineResult | AttemptEnded, blobs: dict[str, Blob], log: Blob | None
    ) -> "Callable[..., bool]":
        held, layers = self.held, self.layers
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


def describe(error: PareError | OSError) -> EngineError:
    """Describe what storage, database or system refused while files were moved in or out of the job's directory."""
    if isinstance(error, OSError):
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            _log.error("the worker failed", error=str(error)[:300])
            return defect("worker_failed", f"the worker's system failed: {error.strerror}", retryable=True)
        error = StorageFull("the disk of the worker has no space left for the job's files")
    return EngineError(code=error.code, detail=error.detail, fix=error.fix, retryable=error.retryable)
