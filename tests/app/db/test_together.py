"""What a submission writes comes together: one statement on PostgreSQL, and all or nothing on both databases."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import event, func, select
from sqlalchemy.exc import IntegrityError

from app.access.audit import make_entry
from app.db.access_tables import AuditRow
from app.db.session import Database
from app.db.tables import EventRow, JobRow, OutboxRow
from app.db.together import NewRow
from app.jobs.checks import queue_job


def record(job_id: str) -> NewRow:
    return make_entry(owner="local", action="submit_job", outcome="done", target=job_id, status=202)


@contextmanager
def watched(database: Database) -> Iterator[list[str]]:
    asked: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "INSERT" in statement:
            asked.append(statement)

    event.listen(database.engine, "before_cursor_execute", note)
    yield asked
    event.remove(database.engine, "before_cursor_execute", note)


def test_job_event_hint_and_entry_are_one_statement_on_postgresql(database: Database) -> None:
    with watched(database) as asked, database.session() as session:
        job = queue_job(session, owner="local", action="optimize", deadline_seconds=1, max_attempts=1, record=record)
    assert len(asked) == (1 if database.dialect == "postgresql" else 4)
    with database.read() as session:
        row = session.scalars(select(JobRow)).one()
        begun = session.scalars(select(EventRow)).one()
        assert (begun.job_id, begun.seq, begun.data) == (job.id, 1, {"state": "queued", "attempt": 0})
        assert session.scalars(select(OutboxRow.job_id)).one() == job.id
        assert session.scalars(select(AuditRow.target)).one() == job.id
        assert (row.created_at, row.published_at) == (job.created_at, job.published_at)


def test_nothing_of_a_job_is_there_where_its_entry_cannot_be_written(database: Database) -> None:
    entry = record("job_" + "a" * 26)
    with database.session() as session:
        queue_job(session, owner="local", action="optimize", deadline_seconds=1, max_attempts=1, record=lambda _: entry)

    def again() -> None:
        with database.session() as session:
            queue_job(
                session, owner="local", action="optimize", deadline_seconds=1, max_attempts=1, record=lambda _: entry
            )

    with pytest.raises(IntegrityError):
        again()
    with database.read() as session:
        for table in (JobRow, EventRow, OutboxRow, AuditRow):
            assert session.scalar(select(func.count()).select_from(table)) == 1
