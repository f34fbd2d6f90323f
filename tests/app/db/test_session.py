"""One `with` is one transaction, on both databases, and trouble around the database has our names."""

import multiprocessing
import sqlite3
import threading
import time
from datetime import UTC, datetime, timedelta
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.exc import IntegrityError, InternalError, OperationalError, ProgrammingError
from sqlalchemy.orm import Session

from app.db.clock import db_now
from app.db.session import Database
from app.db.tables import EventRow, JobRow, OutboxRow, WorkerRow
from app.errors import ConfigurationError, SchemaMissing, StorageFull, Unavailable
from tests.postgres import PostgresServer


def add_worker(session: Session, worker_id: str, queue: str = "0") -> None:
    session.add(WorkerRow(id=worker_id, host="h", queue=queue, facts={}, started_at=db_now(), seen_at=db_now()))


def count(database: Database) -> int:
    with database.read() as session:
        return session.scalar(select(func.count()).select_from(WorkerRow)) or 0


def test_exception_undoes_the_transaction(database: Database) -> None:
    def crash() -> None:
        with database.session() as session:
            add_worker(session, "a")
            session.flush()
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError):
        crash()
    assert count(database) == 0
    with database.session() as session:
        add_worker(session, "a")
    assert count(database) == 1


def _increment(url: str, barrier: Barrier, num_times: int) -> None:
    database = Database(url, lock_timeout_seconds=60)
    barrier.wait(60)
    for _ in range(num_times):
        with database.session() as session:
            row = session.scalars(select(WorkerRow).with_for_update()).one()
            row.queue = str(int(row.queue) + 1)
    database.dispose()


def test_read_then_write_of_many_processes_loses_nothing(database: Database) -> None:
    """On SQLite a deferred transaction would fail here at once: another process wrote after its read."""
    with database.session() as session:
        add_worker(session, "a")
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    processes = [context.Process(target=_increment, args=(database.url, barrier, 40)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    with database.read() as session:
        assert session.scalars(select(WorkerRow.queue)).one() == "120"


def test_reader_does_not_wait_for_a_writer(database: Database) -> None:
    with database.session() as session:
        add_worker(session, "a")
        session.flush()
        started = time.monotonic()
        assert count(database) == 0
        assert time.monotonic() - started < 2


def test_reader_cannot_write_on_postgresql(postgres_url: str) -> None:
    database = Database(postgres_url)
    with database.read() as session:
        add_worker(session, "a")
        with pytest.raises(InternalError, match="read-only"):
            session.flush()
        session.rollback()
    database.dispose()


def test_lock_held_too_long_is_unavailable(database_url: str) -> None:
    database = Database(database_url, lock_timeout_seconds=0.2)
    with database.session() as session:
        add_worker(session, "a")
    with database.session() as session:
        session.scalars(select(WorkerRow).with_for_update()).one()
        with pytest.raises(Unavailable) as caught, database.session() as other:
            other.scalars(select(WorkerRow).with_for_update()).one()
    assert caught.value.retryable
    database.dispose()


def test_rows_that_refer_to_nothing_are_refused(database: Database) -> None:
    with pytest.raises(IntegrityError), database.session() as session:
        session.add(OutboxRow(job_id="job_none", created_at=db_now()))
    with pytest.raises(IntegrityError), database.session() as session:
        session.add(EventRow(job_id="job_none", seq=1, kind="state", data={}, created_at=db_now()))


def test_database_that_does_not_answer_is_unavailable(tmp_path: Path) -> None:
    for url in (f"postgresql://u@/none?host={tmp_path}", f"sqlite:///{tmp_path}/no/such/folder/db"):
        database = Database(url)
        with pytest.raises(Unavailable):
            database.ping()
        database.dispose()


def test_all_connections_in_use_is_unavailable(postgres_url: str) -> None:
    database = Database(postgres_url, num_connections=1, pool_timeout_seconds=0.1)
    with database.read() as session:
        session.execute(text("SELECT 1"))
        with pytest.raises(Unavailable, match="in use"):
            database.ping()
    database.dispose()


def test_connection_cut_by_the_server_is_replaced(postgres_url: str, postgres_server: PostgresServer) -> None:
    database = Database(postgres_url)
    database.ping()
    postgres_server.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        f"WHERE datname = '{database.engine.url.database}' AND pid <> pg_backend_pid()"
    )
    database.ping()
    database.dispose()


def test_a_transaction_that_stands_still_does_not_hold_its_rows_for_long(postgres_url: str) -> None:
    hanging, other = Database(postgres_url, idle_seconds=0.3), Database(postgres_url)
    lock = text("SELECT version_num FROM alembic_version FOR UPDATE")
    locked = []

    def stand_still() -> None:
        with hanging.session() as session:
            session.execute(lock)
            time.sleep(1)
            with other.session() as waiting:
                locked.append(waiting.execute(lock).scalar_one())
            session.execute(lock)

    with pytest.raises(Unavailable):
        stand_still()

    assert locked, "the row was still held"
    with hanging.session() as session:
        session.execute(lock)
    hanging.dispose()
    other.dispose()


def test_full_disk_is_storage_full(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'small.sqlite3'}", num_connections=1)
    database.upgrade()
    with database.read() as session:
        session.execute(text("PRAGMA max_page_count = 1"))  # cannot shrink: the present size becomes the limit

    def fill() -> None:
        with database.session() as session:
            for number in range(2000):
                add_worker(session, "x" * 70 + str(number))

    with pytest.raises(StorageFull):
        fill()
    database.ping()
    database.dispose()


def test_our_own_mistakes_pass_as_they_are(database: Database) -> None:
    with pytest.raises((OperationalError, ProgrammingError), match="syntax"), database.session() as session:
        session.execute(text("SELEKT 1"))


@pytest.mark.parametrize("url", ["mysql://x/y", "sqlite://", "sqlite:///:memory:"])
def test_unsuitable_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="database_url"):
        Database(url)


def test_database_time_is_aware_shiftable_and_sorts_like_time(database: Database) -> None:
    with database.session() as session:
        before, now, after = session.execute(select(db_now(-2.5), db_now(), db_now(3600))).one()
        assert now.tzinfo is UTC
        assert (now - before, after - now) == (timedelta(seconds=2.5), timedelta(hours=1))
        assert abs(now - datetime.now(UTC)) < timedelta(minutes=5)
        add_worker(session, "a")
        session.flush()
        for shift, found in ((-1, 1), (1, 0)):
            query = select(func.count()).select_from(WorkerRow).where(WorkerRow.seen_at > db_now(shift))
            assert session.scalar(query) == found


def test_database_time_moves_within_a_transaction(database: Database) -> None:
    with database.session() as session:
        first = session.execute(select(db_now())).scalar_one()
        time.sleep(0.01)
        assert session.execute(select(db_now())).scalar_one() > first


def test_stored_time_equals_a_python_time(database: Database) -> None:
    moment = datetime(2026, 2, 3, 4, 5, 6, 789000, tzinfo=UTC)
    with database.session() as session:
        session.add(WorkerRow(id="a", host="h", queue="q", facts={}, started_at=moment, seen_at=db_now()))
    with database.read() as session:
        assert session.scalars(select(WorkerRow.started_at)).one() == moment
        assert session.scalars(select(WorkerRow.id).where(WorkerRow.started_at == moment)).one() == "a"
        assert session.scalars(select(WorkerRow.id).where(WorkerRow.started_at < db_now())).one() == "a"


def test_sqlite_file_survives_power_loss_by_its_settings(sqlite_url: str) -> None:
    database = Database(sqlite_url)
    with database.read() as session:
        settings = [session.scalar(text(f"PRAGMA {name}")) for name in ("journal_mode", "synchronous", "foreign_keys")]
    assert settings == ["wal", 2, 1]
    database.dispose()


def test_threads_share_a_database(database: Database) -> None:
    def work(number: int) -> None:
        with database.session() as session:
            add_worker(session, str(number))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert count(database) == 8
    assert sqlite3.threadsafety


def test_database_without_tables_says_how_to_migrate(empty_database_url: str) -> None:
    database = Database(empty_database_url)
    with pytest.raises(SchemaMissing, match="lacks tables") as caught, database.read() as session:
        session.execute(select(JobRow.id)).all()
    assert "python -m app.db" in caught.value.fix
    with pytest.raises(SchemaMissing):
        database.ping()
    database.dispose()


def test_a_new_file_can_be_opened_by_many_at_once(tmp_path: Path) -> None:
    """SQLite refuses all but one that switch a new file to its log at the same moment, and waits for none of them."""
    failures: list[Exception] = []

    def open_it(url: str, barrier: threading.Barrier) -> None:
        barrier.wait()
        database = Database(url)
        try:
            with database.read() as session:
                session.execute(text("SELECT 1"))
        except Unavailable as error:
            failures.append(error)
        database.dispose()

    for index in range(30):
        barrier = threading.Barrier(4)
        arguments = (f"sqlite:///{tmp_path / f'{index}.sqlite3'}", barrier)
        threads = [threading.Thread(target=open_it, args=arguments) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
