"""The API application: the only place where its parts are put together."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import structlog
from asgi_correlation_id import CorrelationIdMiddleware
from fastapi import FastAPI
from fastapi.telemetry import TelemetryConfig
from starlette.concurrency import run_in_threadpool

from app.access.audit import forget_actions
from app.api import (
    architectures,
    artifacts,
    audit,
    datasets,
    distillations,
    events,
    health,
    jobs,
    keys,
    me,
    models,
    owners,
    problems,
    prometheus,
    resumable,
    techniques,
    webhooks,
    workers,
)
from app.api.authenticator import Authenticator
from app.api.frame import FrameMiddleware
from app.api.glances import Glances
from app.api.guard import GuardMiddleware
from app.api.idempotency import forget_expired
from app.api.locality import LocalityMiddleware
from app.api.openapi import describe_api
from app.api.recorder import Recorder
from app.api.request_limiter import RequestLimiter
from app.api.service import Service
from app.db.session import Database
from app.logs import is_request_id
from app.settings import Settings, load_settings
from app.storage import open_storage
from app.tracing import stop_tracing

VERSION = "0.1.0"
UPLOAD_PATHS = re.compile(r"/v1/(models|datasets|uploads/[^/]*)")
"""They limit and stream their bodies themselves."""
FORGET_INTERVAL_SECONDS = 3600.0

UNTRACED_PATHS = frozenset({"/health/live", "/health/ready", "/metrics"})
"""They are asked every few seconds, and belong to no job."""
TELEMETRY: TelemetryConfig = {
    "metrics": False,  # GET /metrics has them
    "logs": False,
    "operation_spans": False,
    "auto_configure": False,  # app/tracing.py does it, for all processes alike
    "exclude": lambda scope: scope["path"] in UNTRACED_PATHS,
}
"""Spans of requests, where tracing was started."""

log = structlog.get_logger(__name__)


def create_app(settings: Settings | None = None, *, local_only: bool = False) -> FastAPI:
    """Return the application; without settings, those of the environment. `local_only` keeps web pages out."""
    settings = settings or load_settings()
    database = Database(settings.database_url)
    service = Service(
        settings,
        database,
        open_storage(settings.storage_url, settings.storage_reserve_bytes),
        Authenticator(settings, database),
        RequestLimiter(settings, database),
        Glances(settings, database),
    )

    @asynccontextmanager
    async def run(_app: FastAPI) -> AsyncIterator[None]:
        stopping = asyncio.Event()
        cleaning = asyncio.create_task(_forget_regularly(service, stopping))
        yield
        service.stopping.set()
        stopping.set()
        await cleaning  # not cancelled: its thread would go on, and use connections after they were closed
        service.database.dispose()
        await run_in_threadpool(stop_tracing)

    app = FastAPI(
        title="Pare",
        version=VERSION,
        lifespan=run,
        docs_url=None,  # its page would load scripts from strangers; /openapi.json is the documentation
        redoc_url=None,
        redirect_slashes=False,
        telemetry=TELEMETRY,
    )
    app.state.service = service
    app.openapi = describe_api(app, keys=settings.auth == "keys")  # type: ignore[method-assign]
    problems.install(app)
    app.add_middleware(
        GuardMiddleware, authenticator=service.authenticator, limiter=service.limiter, recorder=Recorder(database)
    )
    app.add_middleware(
        FrameMiddleware,
        max_body_bytes=settings.max_body_bytes,
        upload_paths=UPLOAD_PATHS,
        measures=service.measures,
        stopping=service.stopping,
    )
    if local_only:
        app.add_middleware(LocalityMiddleware, host=settings.host)
    app.add_middleware(CorrelationIdMiddleware, validator=is_request_id)
    files = (models, datasets, resumable, artifacts)
    work = (jobs, events, distillations, techniques, architectures, webhooks, workers)
    access = (keys, owners, audit, me)
    # Looked through from the first to the last for each request: what is asked most often comes first.
    for noun in (*work, *files, *access, health, prometheus):
        app.include_router(noun.router)
    return app


async def _forget_regularly(service: Service, stopping: asyncio.Event) -> None:
    def forget() -> None:
        try:
            with service.database.session() as session:
                forget_expired(session)
                forget_actions(session, service.settings.audit_days)
        except Exception as error:  # nobody waits for this task: it says what happened, and tries again
            log.warning("what nobody needs any more stays for now", error=type(error).__name__)

    while not stopping.is_set():
        await run_in_threadpool(forget)
        with suppress(TimeoutError):
            async with asyncio.timeout(FORGET_INTERVAL_SECONDS):
                await stopping.wait()
