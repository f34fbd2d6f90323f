"""What happens to a job is told to endpoints: a row for each, in the transaction in which it happens."""

import json
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from app.db.clock import db_now
from app.db.tables import DeliveryRow, JobRow, WebhookRow
from app.ids import new_id

JobEvent = Literal["job.running", "job.succeeded", "job.failed", "job.cancelled"]
JOB_EVENTS: tuple[JobEvent, ...] = get_args(JobEvent)
TEST = "webhook.test"
PENDING, DELIVERED, FAILED = "pending", "delivered", "failed"


def announce(session: Session, job: JobRow) -> None:
    """Write the messages about the state that a job has come into. Parts of jobs and checks of uploads have none."""
    kind = f"job.{job.state}"
    if kind not in JOB_EVENTS or job.parent_id is not None or job.action.startswith("check_"):
        return
    heard = or_(WebhookRow.jobs == "all", WebhookRow.id == job.webhook_id)
    query = select(WebhookRow, db_now()).where(
        WebhookRow.owner == job.owner, WebhookRow.disabled_reason.is_(None), heard
    )
    for endpoint, now in session.execute(query).all():
        if kind in endpoint.events:
            add_delivery(session, endpoint, kind, now, _describe(job), job_id=job.id)


def add_delivery(
    session: Session, endpoint: WebhookRow, kind: str, now: datetime, data: dict[str, Any], job_id: str | None = None
) -> DeliveryRow:
    """Write one message, to be sent at once."""
    body = {"type": kind, "timestamp": now.astimezone(UTC).isoformat(timespec="milliseconds"), "data": data}
    row = DeliveryRow(
        id=new_id("msg"),
        webhook_id=endpoint.id,
        owner=endpoint.owner,
        job_id=job_id,
        type=kind,
        body=json.dumps(body, separators=(",", ":")),
        state=PENDING,
        num_attempts=0,
        attempts=[],
        due_at=db_now(),
        created_at=db_now(),
    )
    session.add(row)
    session.flush()
    return row


def _describe(job: JobRow) -> dict[str, Any]:
    """Return what a message says of a job: enough to know whether to look, and where."""
    own = f"/v1/jobs/{job.id}"
    return {
        "job_id": job.id,
        "status": job.state,
        "attempt": job.attempt,
        "seq": job.last_seq,
        "error_code": (job.error or {}).get("code"),
        "links": {"self": own, **{name: f"{own}/{name}" for name in ("events", "metrics", "artifacts")}},
    }
