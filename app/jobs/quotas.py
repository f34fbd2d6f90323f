"""What an owner has, against what it may have. Who checks here holds the owner's lock until its transaction ends."""

from dataclasses import dataclass

from sqlalchemy import func, literal, select, union
from sqlalchemy.orm import Session

from app.access.limits import lock_owner, read_limits
from app.db.tables import ArtifactRow, CheckpointRow, DatasetRow, JobRow, LogRow, ModelRow, UploadRow
from app.errors import QuotaExceeded
from app.jobs.lifecycle import CHECKS, MADE_OF_PARTS, OWNED, State
from app.settings import Settings

RETRY_SECONDS = 30.0
"""When it is worth asking again for room that jobs make by ending; nobody knows how long they take."""


@dataclass(frozen=True)
class Usage:
    """What an owner has now, under the names of its limits."""

    stored_bytes: int
    running_jobs: int
    queued_jobs: int


def measure_usage(session: Session, owner: str) -> Usage:
    """Return what an owner has."""
    running = (JobRow.state.in_(OWNED), JobRow.action.not_in({*CHECKS, *MADE_OF_PARTS}), JobRow.owner == owner)
    num_running = session.scalar(select(func.count()).select_from(JobRow).where(*running)) or 0
    return Usage(count_stored_bytes(session, owner), num_running, count_queued(session, owner))


def count_stored_bytes(session: Session, owner: str) -> int:
    """Return the bytes that an owner's rows name; the same bytes count once, as they are stored once."""
    named = union(
        *(
            select(table.sha256, table.size_bytes).where(table.owner == owner)
            for table in (ModelRow, DatasetRow, ArtifactRow)
        ),
        select(LogRow.sha256, LogRow.size_bytes).join(JobRow, JobRow.id == LogRow.job_id).where(JobRow.owner == owner),
    ).subquery()
    # Checkpoints lie apart, those of each job in a place of their own.
    apart = (
        select(func.coalesce(func.sum(CheckpointRow.size_bytes), literal(0)))
        .join(JobRow, JobRow.id == CheckpointRow.job_id)
        .where(JobRow.owner == owner)
    )
    # Resumable uploads take their room when they begin, so that nobody sends in vain what will not fit.
    announced = select(func.coalesce(func.sum(UploadRow.size_bytes), 0))
    announced = announced.where(UploadRow.owner == owner, UploadRow.made.is_(None))
    shared = session.scalar(select(func.coalesce(func.sum(named.c.size_bytes), 0))) or 0
    return int(shared) + int(session.scalar(apart) or 0) + int(session.scalar(announced) or 0)


def count_queued(session: Session, owner: str) -> int:
    """Return how many of an owner's jobs wait, with those made of others that have not ended."""
    mine = (JobRow.owner == owner, JobRow.action.not_in(CHECKS))
    waiting = select(func.count()).select_from(JobRow).where(*mine, JobRow.state == State.QUEUED)
    parents = select(func.count()).select_from(JobRow)
    parents = parents.where(*mine, JobRow.state.in_(OWNED), JobRow.action.in_(MADE_OF_PARTS))
    return session.scalar(select(waiting.scalar_subquery() + parents.scalar_subquery())) or 0


def require_room_for_job(session: Session, settings: Settings, owner: str) -> None:
    """Raise QuotaExceeded unless the owner may have one more job waiting, and store something more."""
    lock_owner(session, owner)
    limits = read_limits(session, settings, owner)
    if limits.queued_jobs is not None and (queued := count_queued(session, owner)) >= limits.queued_jobs:
        raise QuotaExceeded(
            "queued-jobs",
            f"{queued} jobs wait, or are made of others and unfinished; allowed are {limits.queued_jobs}",
            retry_after_seconds=RETRY_SECONDS,
        )
    _check_bytes(session, owner, limits.stored_bytes, 1)


def require_stored_fits(session: Session, settings: Settings, owner: str) -> None:
    """Raise QuotaExceeded where the owner's rows, those of this transaction included, name more bytes than may be."""
    lock_owner(session, owner)
    _check_bytes(session, owner, read_limits(session, settings, owner).stored_bytes, 0)


def find_room(session: Session, settings: Settings, owner: str) -> int | None:
    """Return how many bytes more the owner may store; None: no limit."""
    limit = read_limits(session, settings, owner).stored_bytes
    return None if limit is None else max(0, limit - count_stored_bytes(session, owner))


def _check_bytes(session: Session, owner: str, limit: int | None, spare: int) -> None:
    if limit is not None and (stored := count_stored_bytes(session, owner)) + spare > limit:
        raise full_storage(f"{stored} bytes are stored, this request's included; allowed are {limit}")


def full_storage(detail: str) -> QuotaExceeded:
    """Return the error for an owner that may store no more."""
    return QuotaExceeded(
        "stored-bytes",
        detail,
        fix="Delete models, datasets or jobs that are not needed, or ask an administrator for more.",
        retryable=False,
    )
