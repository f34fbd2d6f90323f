"""Workers: the processes that run jobs."""

from datetime import datetime
from typing import Any

from fastapi import APIRouter
from sqlalchemy.orm import Session

from app.api.service import Parts, Service
from app.api.views import View
from app.jobs import list_workers

router = APIRouter(prefix="/v1/workers", tags=["workers"])


class WorkerView(View):
    """A process that runs jobs."""

    id: str
    """Names the worker."""
    queue: str
    """Where it takes jobs from."""
    facts: dict[str, Any]
    """device, num_cores, memory_bytes, isolation, versions, ..."""
    started_at: datetime
    """When it started."""
    seen_at: datetime
    """When it last said that it is alive."""


class WorkerList(View):
    """The workers seen lately."""

    items: list[WorkerView]
    """Oldest first."""


@router.get("", operation_id="list_workers")
def show_workers(service: Parts) -> WorkerList:
    """List the workers that are alive, what each can do and how it isolates jobs."""
    with service.database.read() as session:
        return WorkerList(items=read_workers(session, service))


def read_workers(session: Session, service: Service) -> list[WorkerView]:
    """Return the workers seen lately."""
    return [
        WorkerView(id=row.id, queue=row.queue, facts=row.facts, started_at=row.started_at, seen_at=row.seen_at)
        for row in list_workers(session, service.settings.worker_seen_seconds)
    ]
