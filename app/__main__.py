"""`python -m app`: the API process."""

import signal
import sys
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from app.api.connections import PatientProtocol
from app.api.frame import MAX_HEAD_BYTES
from app.api.service import Service
from app.errors import PareError
from app.logs import configure_logs
from app.main import create_app
from app.production import check_production
from app.settings import Settings, check_delivery, check_exposure, load_settings
from app.tracing import start_tracing

GRACE_SECONDS = 8
"""For requests in progress when the process is told to stop."""


class Server(uvicorn.Server):
    """uvicorn, which ends open event streams when it is told to stop, and so can stop."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note the signal."""
        self._service.stopping.set()
        super().handle_exit(sig, frame)


def main() -> None:
    """Serve until SIGTERM or Ctrl-C."""
    configure_logs("api")
    try:
        settings = load_settings()
        check_exposure(settings)
        check_delivery(settings)
        check_production(settings)
        start_tracing("api")
    except PareError as error:
        print(f"error: {error.detail}\nfix: {error.fix}", file=sys.stderr)
        raise SystemExit(1) from None
    serve(settings)


def serving_options(settings: Settings) -> dict[str, Any]:
    """Return how uvicorn serves."""
    return {
        "http": PatientProtocol,
        "host": settings.host,
        "port": settings.port,
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "timeout_keep_alive": 15,
        "timeout_graceful_shutdown": GRACE_SECONDS,
        "h11_max_incomplete_event_size": MAX_HEAD_BYTES,
        "ws": "none",
    }


def make_server(app: FastAPI, **changes: Any) -> Server:
    """Return what serves the application, with the limits of real sockets; `changes` are uvicorn's options."""
    service: Service = app.state.service
    return Server(uvicorn.Config(app, **serving_options(service.settings) | changes), service)


def serve(settings: Settings) -> None:
    """Serve with these settings; exits with status 0 after a clean stop."""
    # With keys in force a web page can do nothing: it has none.
    server = make_server(create_app(settings, local_only=settings.auth == "local"))
    try:
        server.run()
    except KeyboardInterrupt:  # uvicorn raises the signal again after its clean stop
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise SystemExit(0 if server.started else 1)


if __name__ == "__main__":
    main()
