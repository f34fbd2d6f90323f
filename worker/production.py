"""What is wrong with the settings of a whole service in production, those of its workers included."""

import os
from collections.abc import Callable, Iterator

from app.errors import ConfigurationError
from app.production import Finding, check_production, find_weaknesses
from app.settings import Settings, check_delivery, check_exposure, load_settings, read_settings
from app.tracing import check_tracing
from worker.settings import WorkerSettings
from worker.shares import divide

CLIENT_VARIABLES = frozenset({"PARE_URL", "PARE_API_KEY", "PARE_DEBUG"})


def check_worker(settings: Settings, worker: WorkerSettings) -> None:
    """Raise InsecureSettings where the settings say that this is production, and are not for it."""
    check_production(settings, list(_look_at_worker(worker)))


def find_all() -> tuple[str, list[Finding]]:
    """Return PARE_ENVIRONMENT, and all that is wrong with the settings of this process's environment."""
    try:
        settings, worker = load_settings(), read_settings(WorkerSettings)
    except ConfigurationError as error:
        return "unreadable", [Finding("invalid_setting", "error", error.detail, error.fix)]
    found = [
        *find_weaknesses(settings, os.environ),
        *_look_at_starts(settings, worker),
        *_look_at_worker(worker),
        *_look_at_names(),
    ]
    return settings.environment, sorted(found, key=lambda each: (each.severity, each.code))


def _look_at_starts(settings: Settings, worker: WorkerSettings) -> Iterator[Finding]:
    """Yield what keeps processes from starting, in production or not."""
    checks: tuple[Callable[[], object], ...] = (
        check_tracing,
        lambda: check_exposure(settings),
        lambda: check_delivery(settings),
        lambda: divide(settings, worker),
    )
    for check in checks:
        try:
            check()
        except ConfigurationError as error:
            yield Finding("cannot_start", "error", error.detail, error.fix)


def _look_at_worker(worker: WorkerSettings) -> Iterator[Finding]:
    if worker.single_user:
        yield Finding(
            "single_user",
            "error",
            "PARE_WORKER_SINGLE_USER=true runs jobs even where no isolation works",
            "Leave it out; `pare serve` sets it where one person is served.",
        )
    if worker.engine_command or worker.engine_code:
        yield Finding(
            "other_engine",
            "error",
            "PARE_WORKER_ENGINE_COMMAND or PARE_WORKER_ENGINE_CODE puts another program in the place of the engine",
            "Leave both out; they are for tests.",
        )


def _look_at_names() -> Iterator[Finding]:
    known = {
        f"{kind.model_config.get('env_prefix')}{name}".upper()
        for kind in (Settings, WorkerSettings)
        for name in kind.model_fields
    }
    given = {name.upper() for name in os.environ if name.upper().startswith("PARE_")}
    unknown = sorted(given - known - CLIENT_VARIABLES)
    if unknown:
        yield Finding(
            "unknown_variable",
            "warning",
            f"{', '.join(unknown)}: no process of the service has such a setting",
            "Correct the name, or leave it out; docs/operations.md lists all. What the Compose file or a script reads "
            "need not be in the environment of a process.",
        )
