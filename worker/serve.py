"""`pare serve`: the whole service on one machine with nothing else to install, and nothing left when it ends."""

import errno
import fcntl
import os
import secrets
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO

from app.access.keys import has_admin
from app.db.session import Database
from app.errors import PareError
from app.jobs import list_workers
from app.settings import Settings, check_delivery, check_exposure, read_settings
from app.storage import open_storage
from app.tracing import check_tracing
from worker.broker import EmbeddedBroker
from worker.children import Child
from worker.production import check_worker
from worker.sandbox.detect import detect
from worker.sandbox.isolation import Isolation
from worker.sandbox.layout import PROJECT
from worker.settings import WorkerSettings
from worker.shares import divide

_READY_SECONDS = 90.0
_MAX_EARLY_CRASHES = 3


class ServeRefused(PareError):
    """The service cannot run like this."""

    code = "serve_refused"
    fix = "Change what the detail names."


def serve(host: str = "127.0.0.1", port: int = 8000, data_dir: Path = Path("pare-data")) -> None:
    """Run until Ctrl-C or SIGTERM; exits with status 1 and one line when it cannot."""
    try:
        Service(host, port, data_dir).run()
    except PareError as error:
        print(f"error: {error.detail}\nfix: {error.fix}", file=sys.stderr)
        raise SystemExit(1) from None


class Service:
    """The processes of one `pare serve`."""

    def __init__(self, host: str, port: int, data_dir: Path) -> None:
        port = take_port(host, port)
        self._settings = read_settings(Settings, data_dir=data_dir, host=host, port=port)
        check_exposure(self._settings)
        check_delivery(self._settings)
        check_tracing()
        # A mistake in them is told here, not by a worker that does not start.
        worker = read_settings(WorkerSettings)
        divide(self._settings, worker)
        check_worker(self._settings, worker)
        make_directory(self._settings.data_dir)
        open_storage(self._settings.storage_url)
        self._isolation = detect(self._settings.isolation)
        self._num_signals = 0
        self._children: list[Child] = []
        self._broker: EmbeddedBroker | None = None
        check_isolation(self._settings, self._isolation)

    def run(self) -> None:
        """Start everything, wait, stop everything."""
        data_dir = self._settings.data_dir
        previous = {number: signal.signal(number, self._note_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        lock = lock_directory(data_dir)
        try:
            self._start_and_watch()
        finally:
            for child in reversed(self._children):
                child.stop(lambda: self._num_signals > 1)
            if self._broker is not None:
                self._broker.close()
            lock.close()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _start_and_watch(self) -> None:
        database = Database(self._settings.database_url)
        database.upgrade()
        environment = self._environment()
        if "PARE_BROKER_URL" not in os.environ:
            broker = self._broker = EmbeddedBroker(self._settings.data_dir / "broker")
            environment["PARE_BROKER_URL"] = broker.url
            self._start("broker", broker.command(), environment, 10)
            self._wait(broker.is_ready, "the broker")
        stop_seconds = float(environment["PARE_WORKER_STOP_SECONDS"])
        self._start("worker", [sys.executable, "-m", "worker"], environment, stop_seconds + 15)
        self._start("dispatcher", [sys.executable, "-m", "worker.dispatch"], environment, 10)
        self._start("api", [sys.executable, "-m", "app"], environment, 10)
        self._wait(lambda: _answers(self._url), "the API")
        self._wait(lambda: _has_worker(database), "the worker")
        if not self._num_signals:
            self._announce(database)
        while not self._num_signals:
            self._revive()
            time.sleep(0.1)
        database.dispose()

    @property
    def _url(self) -> str:
        host = f"[{self._settings.host}]" if ":" in self._settings.host else self._settings.host
        return f"http://{host}:{self._settings.port}"

    def _announce(self, database: Database) -> None:
        layers = ", ".join(self._isolation.layers)
        print(
            f"Pare is ready at {self._url} (isolation: {layers}; all in {self._settings.data_dir})",
            flush=True,
        )
        if not self._isolation.isolates:
            reasons = "; ".join(self._isolation.problems) or "none was asked for"
            print(
                f"NOTICE: jobs run without isolation ({reasons}). Only this machine can reach the service; open only "
                "models that you trust.",
                flush=True,
            )
        if self._settings.auth == "keys" and not _has_admin(database):
            print(
                "NOTICE: there is no key yet, so nobody can come in. Make the first: "
                f"PARE_DATA_DIR={self._settings.data_dir} python -m app.access create --owner NAME "
                "--scopes read,write,admin",
                flush=True,
            )

    def _environment(self) -> dict[str, str]:
        own = {
            "PARE_DATA_DIR": str(self._settings.data_dir),
            "PARE_HOST": self._settings.host,
            "PARE_PORT": str(self._settings.port),
            "PARE_DATABASE_URL": self._settings.database_url,
            "PARE_STORAGE_URL": self._settings.storage_url,
            "PARE_WORKER_TAKES_CPU_JOBS": "true",  # there is no other worker that could
            "PARE_WORKER_SINGLE_USER": "true" if self._settings.auth == "local" else "false",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")])),
        }
        chosen = {"PARE_WORKER_STOP_SECONDS": "3"}  # at a terminal nobody waits for long; a job is given back instead
        return {**chosen, **os.environ, **own}

    def _start(self, name: str, command: list[str], environment: dict[str, str], stop_seconds: float) -> None:
        if self._num_signals:
            return
        log = self._settings.data_dir / "logs" / f"{name}.log"
        child = Child(name, command, environment, log, stop_seconds)
        self._children.append(child)
        child.start()

    def _wait(self, ready: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + _READY_SECONDS
        while not self._num_signals and not ready():
            self._revive()
            for child in self._children:
                if child.num_crashes >= _MAX_EARLY_CRASHES:
                    raise ServeRefused(f"{child.name} does not start:\n{child.tail()}", fix=f"See {child.log}.")
            if time.monotonic() > end:
                raise ServeRefused(f"{what} is not ready after {_READY_SECONDS:g} s", fix="See the files in logs.")
            time.sleep(0.05)

    def _revive(self) -> None:
        for child in self._children:
            line = child.revive()
            if line is not None:
                print(line, file=sys.stderr, flush=True)

    def _note_signal(self, number: int, frame: object) -> None:  # noqa: ARG002 - the signature of a handler
        self._num_signals += 1


def check_isolation(settings: Settings, isolation: Isolation) -> None:
    """Refuse to let others in where their models could do harm."""
    if settings.auth != "local" and not isolation.isolates:
        reasons = "; ".join(isolation.problems) or "PARE_ISOLATION=none"
        raise ServeRefused(
            f"PARE_AUTH={settings.auth} lets others in, but uploaded models cannot be isolated here: {reasons}",
            fix="Install bubblewrap, or use PARE_AUTH=local on 127.0.0.1.",
        )


def make_directory(data_dir: Path) -> None:
    """Make the data directory, for this user alone."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        (data_dir / "logs").mkdir(exist_ok=True)
    except OSError as error:
        raise ServeRefused(f"{data_dir} cannot be the data directory: {error.strerror}") from None


def lock_directory(data_dir: Path) -> IO[str]:
    """Take the data directory for this process; the kernel gives it back however the process ends."""
    lock = (data_dir / "lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ServeRefused(
            f"another pare serve uses {data_dir}", fix="Stop it, or give this one its own --data-dir."
        ) from None
    return lock


def take_port(host: str, port: int) -> int:
    """Return the port, or a free one for 0; refuse one that another process listens on and would answer at."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen()  # binding alone succeeds beside a listener that shares its address
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ServeRefused(
                    f"something else listens on port {port} of {host}",
                    fix="Stop it, or choose another --port (0: any that is free).",
                ) from None
            raise ServeRefused(f"the service cannot listen on {host}: {error.strerror}") from None
        return int(probe.getsockname()[1])


def _answers(url: str) -> bool:
    request = urllib.request.Request(f"{url}/health/live", headers={"X-Request-ID": secrets.token_hex(8)})
    try:
        with urllib.request.urlopen(request, timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _has_admin(database: Database) -> bool:
    with database.read() as session:
        return has_admin(session)


def _has_worker(database: Database) -> bool:
    try:
        with database.read() as session:
            return bool(list_workers(session, 60))
    except PareError:
        return False
