"""What every endpoint works with: settings, database, storage."""

import threading
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from app.api.authenticator import Authenticator
from app.api.glances import Glances
from app.api.measures import Measures
from app.api.probes import Probes
from app.api.request_limiter import RequestLimiter
from app.db.session import Database
from app.settings import Settings
from app.storage import Storage


@dataclass(frozen=True)
class Service:
    """The parts of one running service."""

    settings: Settings
    database: Database
    storage: Storage
    authenticator: Authenticator
    limiter: RequestLimiter
    glances: Glances
    probes: Probes = field(default_factory=Probes)
    """Looks at the parts for health."""
    measures: Measures = field(default_factory=Measures)
    """Counts requests for /metrics."""
    stopping: threading.Event = field(default_factory=threading.Event)
    """Set when the process was told to stop: open event streams end, so that they do not hold it."""


async def get_service(request: Request) -> Service:
    """Return the service that `create_app` wired. Async, as everything that only looks: no thread is needed for it."""
    service: Service = request.app.state.service
    return service


Parts = Annotated[Service, Depends(get_service)]
