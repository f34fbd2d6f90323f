"""Checkpoints of unfinished jobs: recorded by the attempt that holds the job, listed for the next one.

Their bytes lie in a section of storage that is the job's alone. So whoever drops a row may delete its bytes: no upload,
artifact or other job can have the same ones there.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, delete, func, select
from sqlalchemy.orm import Session

from app.db.clock import db_now
from app.db.tables import CheckpointRow, JobRow
from app.errors import PareError
from app.jobs.events import change_with_event
from app.jobs.lifecycle import State, held
from app.storage import Blob, Storage, checkpoint_storage

NUM_KEPT = 2
"""Of a job: the newest, and the one before in case that is damaged."""


@dataclass(frozen=True)
class Place:
    """Where in its work a job was."""

    stage: str
    step: int | None
    """Index into recipe.steps where the stage is a step."""
    fraction: float
    """Of the whole job."""


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint's bytes in the job's section of storage. `seq` is that of its event."""

    place: Place
    blob: Blob
    seq: int | None = None
    """None until it is recorded."""


def record_checkpoint(session: Session, job_id: str, epoch: int, checkpoint: StoredCheckpoint) -> list[str] | None:
    """Add a checkpoint and its event, and forget all but the newest two.

    Returns the digests that no row names any more; None where the job is lost, and nothing was recorded.
    """
    place, blob = checkpoint.place, checkpoint.blob
    data = _describe(place) | {"size_bytes": blob.size_bytes}
    job = change_with_event(session, job_id, "checkpoint", data, only_if=held(epoch))
    if job is None:
        return None
    session.add(
        CheckpointRow(
            job_id=job_id,
            seq=job.last_seq,
            epoch=epoch,
            stage=place.stage,
            step=place.step,
            fraction=place.fraction,
            sha256=blob.sha256,
            size_bytes=blob.size_bytes,
            created_at=db_now(),
        )
    )
    session.flush()
    rows = _list_rows(session, job_id)
    kept = {row.sha256 for row in rows[:NUM_KEPT]}
    for row in rows[NUM_KEPT:]:
        session.delete(row)
    return [row.sha256 for row in rows[NUM_KEPT:] if row.sha256 not in kept]


def record_resumed(session: Session, job_id: str, epoch: int, place: Place) -> bool:
    """Note that the attempt goes on from a checkpoint; return False where the job is lost."""
    data = _describe(place)
    return change_with_event(
        session, job_id, "resumed", data, only_if=held(epoch), values={"resumed_from": data}
    ) is not None  # fmt: skip


def list_checkpoints(session: Session, job_id: str) -> tuple[StoredCheckpoint, ...]:
    """Return the checkpoints of a job, newest first."""
    return tuple(
        StoredCheckpoint(Place(row.stage, row.step, row.fraction), Blob(row.sha256, row.size_bytes), row.seq)
        for row in _list_rows(session, job_id)
    )


def find_newest(session: Session, jobs: Iterable[JobRow | Row[Any]]) -> dict[str, CheckpointRow]:
    """Return the newest checkpoint of each of these jobs that has one."""
    # None before the first attempt, and none after a success: most jobs need no look.
    job_ids = [job.id for job in jobs if job.attempt and job.state != State.SUCCEEDED]
    if not job_ids:
        return {}
    newest = (
        select(CheckpointRow.job_id, func.max(CheckpointRow.seq).label("seq"))
        .where(CheckpointRow.job_id.in_(job_ids))
        .group_by(CheckpointRow.job_id)
        .subquery()
    )
    query = select(CheckpointRow).join(
        newest, (CheckpointRow.job_id == newest.c.job_id) & (CheckpointRow.seq == newest.c.seq)
    )
    return {row.job_id: row for row in session.scalars(query)}


def drop_checkpoints(session: Session, job_id: str) -> None:
    """Forget all checkpoints of a job; their bytes may be deleted once this is committed."""
    session.execute(
        delete(CheckpointRow).where(CheckpointRow.job_id == job_id).execution_options(synchronize_session=False)
    )


def delete_bytes(storage: Storage, job_id: str) -> None:
    """Delete the bytes of a job whose rows are gone; where storage is away, they stay until it is cleared again."""
    with suppress(PareError):
        checkpoint_storage(storage, job_id).clear()


def _list_rows(session: Session, job_id: str) -> list[CheckpointRow]:
    query = select(CheckpointRow).where(CheckpointRow.job_id == job_id).order_by(CheckpointRow.seq.desc())
    return list(session.scalars(query))


def _describe(place: Place) -> dict[str, Any]:
    return {"stage": place.stage, "step": place.step, "fraction": place.fraction}
