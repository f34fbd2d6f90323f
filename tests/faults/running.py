"""Runs one case on a service of its own."""

import os
import shutil
from pathlib import Path

import pytest

from tests.faults import cases_broker, cases_database, cases_jobs
from tests.faults.cases import CASES, POSTGRESQL, Case
from tests.faults.stack import PATIENCE_SECONDS, open_stack
from tests.postgres import PostgresServer

MODULES = (cases_broker, cases_jobs, cases_database)
"""Each has entered its cases into the list."""
ALL: tuple[Case, ...] = tuple(CASES.values())
PASSWORD = "canary-of-the-database"
"""In the URL of the database, which no log and no answer may tell."""


def run_case(
    case: Case,
    database: str,
    request: pytest.FixtureRequest,
    directory: Path,
    *,
    patience: float = PATIENCE_SECONDS,
    without: tuple[str, ...] = (),
) -> None:
    """Let the case act, then ask the oracle."""
    if case.needs_root and os.geteuid() != 0:
        pytest.skip("only root can mount file systems and cut networks")
    if missing := [name for name in case.programs if shutil.which(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    server: PostgresServer | None = None
    if database == POSTGRESQL:
        server = request.getfixturevalue("durable_postgres")
        assert server is not None
        url = server.create_database(migrated=True)
        told = url.replace("postgres@", f"postgres:{PASSWORD}@")
    else:
        told = url = request.getfixturevalue("sqlite_url")
    try:
        with open_stack(
            directory, told, patience=patience, without=without, postgres=server, secrets=(PASSWORD,), **case.options
        ) as stack:
            case.run(stack)
            stack.check()
    finally:
        if server is not None:
            server.start()
            server.drop_database(url)
