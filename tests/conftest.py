"""Fixtures for all tests: a real PostgreSQL server, and fresh, migrated databases of both kinds."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from app.db.session import Database
from app.settings import Settings
from app.storage import Storage, open_storage
from tests import canaries
from tests.postgres import PostgresServer
from tests.s3 import S3_CREDENTIALS, S3Server

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # before a test imports it

ENGINES = ("sqlite", "postgresql")
LONG_FILES = (
    "engine/test_optimize.py", "worker/test_celery_worker.py", "engine/programs/test_zoo.py", "pare/test_demo.py",
    "worker/test_uploads.py", "worker/test_distillation.py", "worker/test_parallel_job.py", "faults/test_cases.py",
    "engine/programs/test_transformers.py", "engine/techniques/test_quantize_int4.py", "worker/test_serve.py",
    "engine/test_uploaded_formats.py", "engine/programs/test_onnx_import.py",
)  # fmt: skip
"""These begin first: a file is one process's work, and the last to begin keeps the others waiting for its end."""


def pytest_configure(config: pytest.Config) -> None:
    """Plant secrets, and watch what becomes of them."""
    config.pluginmanager.register(canaries)
    # structlog's own choice shows the variables of every frame, which the service never does, and takes seconds for it.
    plain = structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)
    structlog.configure(processors=[*structlog.get_config()["processors"][:-1], plain])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long files first."""
    place = {Path(__file__).parent / name: index for index, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    # Not pytest's own directory: that one is closed to the user "nobody".
    directory = Path(tempfile.mkdtemp(prefix="pare-postgres-"))
    try:
        server = PostgresServer(directory)
        yield server
        server.stop()
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """The URL of a fresh, migrated PostgreSQL database."""
    url = postgres_server.create_database(migrated=True)
    yield url
    postgres_server.drop_database(url)


@pytest.fixture(params=ENGINES)
def empty_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a database without tables, of each kind in turn."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'empty.sqlite3'}"
    else:
        server: PostgresServer = request.getfixturevalue("postgres_server")
        url = server.create_database(migrated=False)
        yield url
        server.drop_database(url)


@pytest.fixture(scope="session")
def _migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "pare.sqlite3"
    database = Database(f"sqlite:///{path}")
    database.upgrade()
    database.dispose()
    return path


@pytest.fixture
def sqlite_url(_migrated_file: Path, tmp_path: Path) -> str:
    """The URL of a fresh, migrated SQLite database."""
    path = tmp_path / "pare.sqlite3"
    shutil.copyfile(_migrated_file, path)
    return f"sqlite:///{path}"


@pytest.fixture(params=ENGINES)
def database_url(request: pytest.FixtureRequest) -> str:
    """The URL of a fresh, migrated database, of each kind in turn."""
    url: str = request.getfixturevalue("sqlite_url" if request.param == "sqlite" else "postgres_url")
    return url


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A fresh, migrated database, of each kind in turn."""
    database = Database(database_url)
    yield database
    database.dispose()


@pytest.fixture
def settings(tmp_path: Path, sqlite_url: str) -> Settings:
    """The default settings, with everything under the test's directory."""
    return Settings(data_dir=tmp_path, database_url=sqlite_url)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def s3_url(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a fresh bucket on a real S3 server, with its credentials in the environment."""
    for name, value in S3_CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    return s3_server.create_bucket()


@pytest.fixture
def storage(settings: Settings) -> Storage:
    """A fresh store."""
    return open_storage(settings.storage_url)
