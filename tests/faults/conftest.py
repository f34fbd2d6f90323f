"""Fixtures of the fault cases: a PostgreSQL that keeps what it has committed, even when it is killed."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.postgres import PostgresServer

pytest.register_assert_rewrite(*(f"tests.faults.cases_{name}" for name in ("broker", "database", "jobs")))


@pytest.fixture(scope="session")
def durable_postgres() -> Iterator[PostgresServer]:
    """A server of its own: cases kill it."""
    directory = Path(tempfile.mkdtemp(prefix="pare-postgres-"))
    try:
        server = PostgresServer(directory, durable=True)
        yield server
        server.stop()
    finally:
        shutil.rmtree(directory)
