"""Migrations make exactly the tables of app/db/tables.py, keep data, and survive two runners."""

import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from sqlalchemy import inspect, select, text

from app.db import migrate
from app.db.clock import db_now
from app.db.session import Database
from app.db.tables import Base, ModelRow
from app.jobs.checks import queue_job


@pytest.fixture
def empty(empty_database_url: str) -> Iterator[Database]:
    database = Database(empty_database_url)
    yield database
    database.dispose()


def tables_of(database: Database) -> set[str]:
    with database.read() as session:
        return set(inspect(session.connection()).get_table_names())


def insert_model(database: Database) -> None:
    with database.session() as session:
        session.add(
            ModelRow(
                id="mdl_" + "a" * 26,
                owner="local",
                name="m",
                format="pt2",
                state="checking",
                size_bytes=2**40,
                sha256="0" * 64,
                created_at=db_now(),
            )
        )


def test_upgrade_and_downgrade_make_a_round_trip(empty: Database) -> None:
    empty.upgrade()
    assert tables_of(empty) == set(Base.metadata.tables) | {"alembic_version"}
    insert_model(empty)
    empty.upgrade()
    with empty.read() as session:
        assert session.scalars(select(ModelRow.size_bytes)).one() == 2**40, "a second upgrade changed data"
    empty.downgrade("base")
    assert tables_of(empty) == {"alembic_version"}
    empty.upgrade()
    insert_model(empty)


def test_downgrade_takes_jobs_made_of_parts_away_and_keeps_the_others(empty: Database) -> None:
    empty.upgrade()
    insert_model(empty)
    with empty.session() as session:
        parent = queue_job(session, owner="local", action="distill", deadline_seconds=1, max_attempts=1)
        for action, parent_id in (("optimize", parent.id), ("optimize", None)):
            queue_job(
                session, owner="local", action=action, deadline_seconds=1, max_attempts=1, parent_id=parent_id,
                part="teacher" if parent_id else None,
            )  # fmt: skip
        made = ModelRow(
            id="mdl_" + "b" * 26, owner="local", name="m", format="pt2", state="ready", size_bytes=1, sha256="0" * 64,
            made_by=parent.id, created_at=db_now(),
        )  # fmt: skip
        session.add(made)
    empty.downgrade("0004")
    with empty.read() as session:
        assert session.scalar(text("SELECT count(*) FROM jobs")) == 1
        assert session.scalar(text("SELECT count(*) FROM events")) == 1
        assert session.scalar(text("SELECT count(*) FROM models")) == 1
    empty.upgrade()
    empty.check_schema()


def test_migrated_schema_equals_the_tables(empty: Database) -> None:
    empty.upgrade()
    empty.check_schema()


def test_drift_is_noticed(empty: Database) -> None:
    empty.upgrade()
    with empty.session() as session:
        session.execute(text("DROP TABLE outbox"))
    with pytest.raises(Exception, match="New upgrade operations detected"):
        empty.check_schema()


def _upgrade(url: str, barrier: Barrier) -> None:
    database = Database(url)
    barrier.wait(60)
    database.upgrade()
    database.dispose()


def test_two_runners_at_once_are_safe(empty: Database) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    runners = [context.Process(target=_upgrade, args=(empty.url, barrier)) for _ in range(3)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join(60)
    assert [runner.exitcode for runner in runners] == [0, 0, 0]
    empty.check_schema()


def test_failing_migration_leaves_nothing_behind(empty: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_connection: object) -> None:
        raise RuntimeError("crash at the end of the migration")

    monkeypatch.setattr(migrate, "_check_foreign_keys", fail)
    with pytest.raises(RuntimeError, match="crash at the end"):
        empty.upgrade()
    assert tables_of(empty) == set()


def test_migrations_are_found_from_any_directory(tmp_path: Path) -> None:
    program = "import sys; from app.db.session import Database; Database(sys.argv[1]).upgrade()"
    command = [sys.executable, "-c", program, f"sqlite:///{tmp_path / 'db.sqlite3'}"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60)
    assert "jobs" in tables_of(Database(f"sqlite:///{tmp_path / 'db.sqlite3'}"))
