"""The ids by which a line of a log says which job it is about, whose it is, and which request submitted it."""

from collections.abc import Iterable

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db.tables import JobRow


def name_for_logs(session: Session, job_ids: Iterable[str]) -> list[dict[str, object]]:
    """Return job_id, owner, epoch and request_id of jobs, in the order of their ids; deleted ones are left out."""
    query = select(JobRow.id, JobRow.owner, JobRow.epoch, JobRow.request_id).where(JobRow.id.in_(list(job_ids)))
    return [
        {"job_id": job_id, "owner": owner, "epoch": epoch, "request_id": request_id}
        for job_id, owner, epoch, request_id in session.execute(query.order_by(JobRow.id))
    ]
