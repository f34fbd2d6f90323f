"""Health: is the process alive, and can the service do its work?"""

from collections.abc import Callable
from typing import Literal

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from app.api.service import Parts
from app.api.views import View
from app.api.workers import WorkerView, read_workers
from app.errors import PareError

router = APIRouter(prefix="/health", tags=["health"])


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
    workers: WorkersCheckView
    """Who runs jobs."""


class ReadyView(View):
    """Whether the service can do its work."""

    status: Literal["ready", "degraded", "unavailable"]
    """degraded: jobs are accepted but no worker runs them. unavailable: requests fail."""
    checks: ChecksView
    """Part by part."""


@router.get("/live", operation_id="get_liveness")
def get_liveness() -> LiveView:
    """Say that the process is alive; depends on nothing."""
    return LiveView(status="ok")


@router.get(
    "/ready",
    operation_id="get_readiness",
    response_model=ReadyView,
    responses={503: {"model": ReadyView, "description": "Database or storage do not work."}},
)
def get_readiness(service: Parts) -> Response:
    """Try every part the service depends on."""
    database = _try(service.database.ping)
    storage = _try(service.storage.ping)
    workers: list[WorkerView] = []
    if database.ok:
        with service.database.read() as session:
            workers = read_workers(session, service)
    works = database.ok and storage.ok
    check = _check_workers(workers, service.settings.worker_seen_seconds)
    view = ReadyView(
        status=("ready" if check.ok else "degraded") if works else "unavailable",
        checks=ChecksView(database=database, storage=storage, workers=check),
    )
    headers = {} if works else {"Retry-After": "2"}
    return JSONResponse(view.model_dump(mode="json"), 200 if works else 503, headers)


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


def _try(check: Callable[[], None]) -> CheckView:
    try:
        check()
    except PareError as error:
        return CheckView(ok=False, detail=error.detail)
    return CheckView(ok=True, detail=None)
