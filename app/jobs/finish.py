"""The end of an attempt. What it made becomes visible in the transaction that ends the job, if it still holds it."""

from collections.abc import Mapping, Sequence

from sqlalchemy.orm import Session

from app.db.clock import db_now
from app.db.tables import ArtifactRow, JobRow, LogRow
from app.ids import new_id
from app.jobs.checkpoints import drop_checkpoints
from app.jobs.checks import accept_upload
from app.jobs.claim import Claim
from app.jobs.endings import ENDED, end_cancelled, end_failed, requeue
from app.jobs.lifecycle import CHECKS, State, move
from app.recipes.plan import EngineError, EngineResult
from app.storage.base import Blob

Layers = Sequence[str]
"""Names of the isolation layers that were active."""


def succeed(
    session: Session,
    claim: Claim,
    result: EngineResult,
    blobs: Mapping[str, Blob],
    isolation: Layers,
    log: Blob | None = None,
) -> bool:
    """Finish the job with its artifacts and without its checkpoints, or settle the checked upload.

    False: lost or cancelled; nothing changed.
    """
    job = move(
        session,
        claim.job_id,
        sources=[State.RUNNING],
        target=State.SUCCEEDED,
        only_if=[JobRow.epoch == claim.epoch],
        values={
            **ENDED,
            "error": None,
            "metrics": result.metrics.model_dump(mode="json") if result.metrics else None,
            "verdict": result.metrics.verdict.model_dump(mode="json") if result.metrics else None,
            "isolation": list(isolation),
            "progress": {"fraction": 1.0, "eta_seconds": 0.0, "message": ""},
        },
    )
    if job is None:
        return False
    drop_checkpoints(session, claim.job_id)
    for artifact in result.artifacts:
        blob = blobs[artifact.name]  # sizes and digests are those of the stored bytes, never the engine's word
        session.add(
            ArtifactRow(
                id=new_id("art"),
                job_id=job.id,
                owner=job.owner,
                name=artifact.name,
                media_type=artifact.media_type,
                size_bytes=blob.size_bytes,
                sha256=blob.sha256,
                epoch=claim.epoch,
                created_at=db_now(),
            )
        )
    facts = {"check_model": result.model, "check_dataset": result.dataset}.get(job.action)
    if job.action in CHECKS:
        assert facts is not None, f"{job.action} succeeded without facts"
        accept_upload(session, job, facts.model_dump(mode="json"))
    _keep_log(session, claim, log)
    return True


def fail(
    session: Session, claim: Claim, error: EngineError, log: Blob | None = None, isolation: Layers | None = None
) -> bool:
    """End a failed attempt: the job waits again where a retry can help and attempts are left. False: it is lost."""
    again = error.retryable and not claim.is_last_attempt
    fence = [JobRow.epoch == claim.epoch]
    if again:
        job = requeue(session, claim.job_id, reason=error.code, detail=error.detail, only_if=fence)
    else:
        job = end_failed(session, claim.job_id, error, only_if=fence, isolation=isolation)
    if job is None:
        return confirm_cancelled(session, claim, log)
    _keep_log(session, claim, log)
    return True


def confirm_cancelled(session: Session, claim: Claim, log: Blob | None = None) -> bool:
    """End a cancelled attempt after its processes are gone. False: the job is lost, or nobody cancelled it."""
    job = end_cancelled(session, claim.job_id, only_if=[JobRow.epoch == claim.epoch])
    if job is None:
        return False
    _keep_log(session, claim, log)
    return True


def release(session: Session, claim: Claim, reason: str, log: Blob | None = None) -> bool:
    """Give a job back that this worker cannot finish, through no fault of the job: the attempt does not count."""
    fence = [JobRow.epoch == claim.epoch]
    values = {"max_attempts": JobRow.max_attempts + 1}
    if requeue(session, claim.job_id, reason=reason, only_if=fence, values=values) is None:
        return confirm_cancelled(session, claim, log)
    _keep_log(session, claim, log)
    return True


def _keep_log(session: Session, claim: Claim, log: Blob | None) -> None:
    if log is not None:
        session.add(
            LogRow(
                job_id=claim.job_id,
                attempt=claim.attempt,
                size_bytes=log.size_bytes,
                sha256=log.sha256,
                created_at=db_now(),
            )
        )
        session.flush()
