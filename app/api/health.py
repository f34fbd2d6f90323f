"""Health: is the process alive, and can the service do its work?"""

from collections.abc import Callable
from typing import Literal, TypeVar

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from app.api.service import Parts, Service
from app.api.views import View
from app.api.workers import WorkerView, read_workers
from app.errors import PareError
from app.jobs.dispatchers import Dispatch, read_dispatch

router = APIRouter(prefix="/health", tags=["health"])
T = TypeVar("T")


class LiveView(View):
    """The process answers."""

    status: Literal["ok"]
    """Always ok."""


class CheckView(View):
    """One part the service depends on."""

    ok: bool
    """Whether it works."""
    detail: str | None
    """What is wrong with it."""


class WorkersCheckView(View):
    """The workers."""

    ok: bool
    """Whether one of them takes jobs."""
    detail: str | None
    """What is wrong."""
    num_workers: int
    """How many were seen lately."""
    num_accepting: int
    """How many of them take jobs."""
    isolation: list[str]
    """What separates jobs from the machine, on every worker."""


class ChecksView(View):
    """Every part."""

    database: CheckView
    """Jobs and everything else that is remembered."""
    storage: CheckView
    """Uploads and artifacts."""
    dispatcher: CheckView
    """Who wakes workers, recovers jobs and sends webhooks."""
    broker: CheckView
    """What carries the wake-up calls, as the dispatchers see it."""
    workers: WorkersCheckView
    """Who runs jobs."""


class ReadyView(View):
    """Whether the service can do its work."""

    status: Literal["ready", "degraded", "unavailable"]
    """degraded: jobs are accepted, and wait for the part that is away. unavailable: requests fail."""
    checks: ChecksView
    """Part by part."""


@router.get("/live", operation_id="get_liveness")
async def get_liveness() -> LiveView:
    """Say that the process is alive; depends on nothing, on a free thread neither."""
    return LiveView(status="ok")


@router.get(
    "/ready",
    operation_id="get_readiness",
    response_model=ReadyView,
    responses={503: {"model": ReadyView, "description": "Database or storage do not work."}},
)
def get_readiness(service: Parts) -> Response:
    """Try every part the service depends on."""
    seconds = service.settings.health_seen_seconds

    def look() -> tuple[list[WorkerView], Dispatch]:
        service.database.ping()
        with service.database.read() as session:
            return read_workers(session, seconds), read_dispatch(session, seconds)

    database, found = _try(service, "database", look)
    storage, _ = _try(service, "storage", service.storage.ping)
    workers, dispatch = found or ([], Dispatch(0, 0))
    works = database.ok and storage.ok
    check = _check_workers(workers, seconds)
    dispatcher, broker = _check_dispatch(dispatch, seconds)
    ready = dispatcher.ok and broker.ok and check.ok
    view = ReadyView(
        status=("ready" if ready else "degraded") if works else "unavailable",
        checks=ChecksView(database=database, storage=storage, dispatcher=dispatcher, broker=broker, workers=check),
    )
    headers = {} if works else {"Retry-After": "2"}
    return JSONResponse(view.model_dump(mode="json"), 200 if works else 503, headers)


def _check_dispatch(dispatch: Dispatch, seconds: float) -> tuple[CheckView, CheckView]:
    if dispatch.num_dispatchers == 0:
        missing = f"no dispatcher was seen for {seconds:g} s; jobs wait until one starts"
        unknown = "no dispatcher is there that could tell"
        return CheckView(ok=False, detail=missing), CheckView(ok=False, detail=unknown)
    reaches = dispatch.num_reaching_broker > 0
    detail = None if reaches else f"it has not answered any dispatcher for {seconds:g} s"
    return CheckView(ok=True, detail=None), CheckView(ok=reaches, detail=detail)


def _check_workers(workers: list[WorkerView], seconds: float) -> WorkersCheckView:
    accepting = [worker for worker in workers if worker.accepts_jobs]
    layers = [list(worker.facts.get("isolation", [])) for worker in accepting]
    shared = [layer for layer in (layers[0] if layers else []) if all(layer in other for other in layers)]
    detail = None
    if not workers:
        detail = f"no worker was seen for {seconds:g} s; jobs wait until one starts"
    elif not accepting:
        detail = "the workers refuse jobs, because they cannot isolate them; see GET /v1/workers"
    elif not any("cpu" in worker.accepts for worker in accepting):
        detail = "no worker takes CPU jobs, so uploads are not checked; start one, or set PARE_WORKER_TAKES_CPU_JOBS"
    return WorkersCheckView(
        ok=bool(accepting),
        detail=detail,
        num_workers=len(workers),
        num_accepting=len(accepting),
        isolation=shared,
    )


def _try(service: Service, name: str, check: Callable[[], T]) -> tuple[CheckView, T | None]:
    try:
        return CheckView(ok=True, detail=None), service.probes.run(name, check)
    except PareError as error:
        return CheckView(ok=False, detail=error.detail), None
