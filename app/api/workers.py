"""Workers: the processes that run jobs."""

from datetime import datetime
from typing import Any

from fastapi import APIRouter
from sqlalchemy.orm import Session

from app.api.service import Parts
from app.api.views import View
from app.db.tables import WorkerRow
from app.jobs import accepts_jobs, capacity_of, count_running, list_workers
from app.jobs.workers import is_stopping
from app.recipes.needs import DeviceKind

router = APIRouter(prefix="/v1/workers", tags=["workers"])


class DeviceView(View):
    """A GPU."""

    index: int
    """Its number on the worker's machine."""
    name: str
    """Its model; `declared` where only the worker's settings know of it."""
    memory_bytes: int | None
    """Its memory, where the driver tells."""
    uuid: str | None
    """Its name in the driver."""


class LoadView(View):
    """How busy a worker is."""

    num_running: int
    """Jobs that it runs, checks of uploads included."""
    capacity: int
    """Jobs that it can run at once."""


class WorkerView(View):
    """A process that runs one job at a time. A worker with several slots is several of these."""

    id: str
    """Names the worker."""
    queues: list[str]
    """Where it takes hints from."""
    accepts: list[DeviceKind]
    """The kinds of jobs that it takes."""
    accepts_jobs: bool
    """Whether it takes jobs at all; one that cannot isolate them does not."""
    stopping: bool
    """Whether it was told to stop: it takes no more jobs, and soon hands on the one that it runs."""
    devices: list[DeviceView]
    """The GPUs that its job has for itself."""
    memory_bytes: int
    """Main memory that a job may ask for."""
    num_threads: int
    """CPU threads that a job may ask for."""
    load: LoadView
    """How busy it is."""
    versions: dict[str, str | None]
    """What is installed there."""
    facts: dict[str, Any]
    """What else it says: isolation and why no better one works, slot, concurrency, num_cores, machine."""
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
        return WorkerList(items=read_workers(session, service.settings.worker_seen_seconds))


def read_workers(session: Session, seen_within_seconds: float) -> list[WorkerView]:
    """Return the workers seen lately."""
    running = count_running(session)
    workers = list_workers(session, seen_within_seconds)
    return [_describe(row, running[row.id]) for row in workers]


def _describe(row: WorkerRow, num_running: int) -> WorkerView:
    capacity = capacity_of(row)
    return WorkerView(
        id=row.id,
        queues=row.queue.split(","),
        accepts=list(capacity.accepts),
        accepts_jobs=accepts_jobs(row),
        stopping=is_stopping(row),
        devices=[DeviceView.model_validate(device) for device in row.facts.get("devices", [])],
        memory_bytes=capacity.memory_bytes,
        num_threads=capacity.num_threads,
        load=LoadView(num_running=num_running, capacity=1),
        versions=row.facts.get("versions", {}),
        facts={name: value for name, value in row.facts.items() if name not in WorkerView.model_fields},
        started_at=row.started_at,
        seen_at=row.seen_at,
    )
