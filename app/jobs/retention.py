"""Retention: after a while the files of a finished job go; what it was, and what it measured, stays."""

from sqlalchemy import ColumnElement, delete, or_, select
from sqlalchemy.orm import Session

from app.db.clock import db_now
from app.db.tables import ArtifactRow, CheckpointRow, JobRow, LogRow
from app.jobs.lifecycle import TERMINAL

DAY_SECONDS = 24 * 3600.0


def forget_files(session: Session, older_than_days: float) -> int:
    """Forget artifacts, logs and checkpoints of jobs that ended that long ago; return how many. The collector follows.

    Parts go when the job they are part of does: while that is unfinished it needs their files.
    """
    old = select(JobRow.id).where(
        JobRow.parent_id.is_(None),
        JobRow.state.in_(TERMINAL),
        JobRow.finished_at < db_now(-older_than_days * DAY_SECONDS),
    )
    parts = select(JobRow.id).where(JobRow.parent_id.in_(old))
    num_forgotten = 0
    for table in (ArtifactRow, LogRow, CheckpointRow):
        of_old: ColumnElement[bool] = or_(table.job_id.in_(old), table.job_id.in_(parts))
        gone = delete(table).where(of_old).returning(table.job_id).execution_options(synchronize_session=False)
        num_forgotten += len(session.scalars(gone).all())
    return num_forgotten
