"""The connection to the database: one transaction per `with`, the same promises on SQLite and PostgreSQL."""

import select
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    InterfaceError,
    InternalError,
    InvalidatePoolError,
    OperationalError,
    ProgrammingError,
    TimeoutError,
)
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry, NullPool

from app.db import migrate
from app.errors import ConfigurationError, ReducedCapacity, SchemaMissing, StorageFull, Unavailable

READ_ONLY = "pare_read_only"
_IDLE_TOO_LONG = "25P03"
_IDLE_SINCE = "pare_idle_since"
_SILENT_SECONDS = 30.0
"""A connection that was idle for longer is asked whether the server is there."""
MIGRATION_LOCK_TIMEOUT_SECONDS = 60.0
IDLE_SECONDS = 15.0
"""A transaction in which nothing is asked for this long is ended by PostgreSQL: its process hangs, or its machine is
gone without a word, and would hold the rows of a job for hours, past every lease."""


class Database:
    """A database; cheap to create, connects when first used."""

    def __init__(
        self,
        url: str,
        *,
        lock_timeout_seconds: float = 5.0,
        num_connections: int = 20,
        pool_timeout_seconds: float = 5.0,
        idle_seconds: float = IDLE_SECONDS,
    ) -> None:
        self.url = url
        self.engine = _make_engine(
            url,
            lock_timeout_seconds,
            idle_seconds=idle_seconds,
            pool_size=num_connections,
            max_overflow=0,
            pool_timeout=pool_timeout_seconds,
        )
        self.reader: Engine
        if self.dialect == "sqlite":
            self.reader = self.engine.execution_options(**{READ_ONLY: True})
        else:
            # Each statement sees what is committed when it begins, in a transaction or not: so none is begun and ended,
            # which would take as long as a small query does. These connections can change nothing.
            self.reader = _make_engine(
                url,
                lock_timeout_seconds,
                read_only=True,
                pool_size=num_connections,
                max_overflow=0,
                pool_timeout=pool_timeout_seconds,
            )

    @property
    def dialect(self) -> str:
        """sqlite or postgresql."""
        return self.engine.dialect.name

    @contextmanager
    def session(self) -> Iterator[Session]:
        """One writing transaction: committed at the end, rolled back by any exception."""
        with _translated(), Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def read(self) -> Iterator[Session]:
        """Only reading; on SQLite it never waits for a writer, and sees one state of the database."""
        with _translated(), Session(self.reader, expire_on_commit=False) as session, session.begin():
            yield session

    def ping(self) -> None:
        """Raise Unavailable unless the database answers and was migrated."""
        with self.read() as session:
            session.execute(text("SELECT version_num FROM alembic_version"))

    def upgrade(self, revision: str = "head") -> None:
        """Migrate up. Runners that start at the same time wait for each other; the later ones find nothing to do."""
        with self._migrating() as connection:
            migrate.upgrade(connection, revision)

    def downgrade(self, revision: str) -> None:
        """Migrate down to a revision, or to "base"."""
        with self._migrating() as connection:
            migrate.downgrade(connection, revision)

    def check_schema(self) -> None:
        """Raise unless the migrated schema equals app/db/tables.py."""
        with self._migrating() as connection:
            migrate.check(connection)

    def dispose(self) -> None:
        """Close all pooled connections."""
        self.engine.dispose()
        self.reader.dispose()

    @contextmanager
    def _migrating(self) -> Iterator[Connection]:
        # SQLite changes a table by making it anew; with foreign keys on, dropping the old one deletes what refers to
        # it.
        engine = _make_engine(self.url, MIGRATION_LOCK_TIMEOUT_SECONDS, foreign_keys=False, poolclass=NullPool)
        with _translated(), engine.begin() as connection:
            yield connection


def _make_engine(
    url: str,
    lock_timeout_seconds: float,
    *,
    idle_seconds: float = 0,
    foreign_keys: bool = True,
    read_only: bool = False,
    **pool: Any,
) -> Engine:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise ConfigurationError(
            "database_url is not a URL such as sqlite:////path or postgresql://host/name"
        ) from None
    dialect = parsed.get_backend_name()
    if dialect == "postgresql":
        limits = {"lock_timeout": lock_timeout_seconds, "idle_in_transaction_session_timeout": idle_seconds}
        options = [f"-c {name}={int(seconds * 1000)}" for name, seconds in limits.items()]
        if read_only:
            options.append("-c default_transaction_read_only=on")
            pool["isolation_level"] = "AUTOCOMMIT"
        engine = create_engine(
            parsed.set(drivername="postgresql+psycopg"),
            connect_args={"connect_timeout": 5, "options": " ".join([*options, "-c timezone=UTC"])},
            **pool,
        )
        _check_connections(engine)
        return engine
    if dialect == "sqlite":
        if not parsed.database or parsed.database == ":memory:":
            raise ConfigurationError("database_url 'sqlite://' lives in one process only; name a file: sqlite:////path")
        engine = create_engine(parsed, connect_args={"timeout": lock_timeout_seconds}, **pool)
        _prepare_sqlite(engine, foreign_keys, lock_timeout_seconds)
        return engine
    raise ConfigurationError(f"database_url begins with {parsed.drivername!r}; Pare works on sqlite and postgresql")


def _check_connections(engine: Engine) -> None:
    """Have no connection handed out that the server has ended: what comes on an idle one is its last word.

    SQLAlchemy's own `pool_pre_ping` asks the server each time, which costs as much as a small query; here only a
    connection that was idle for long is asked, because what became of it may never have arrived.
    """

    @event.listens_for(engine, "checkin")
    def note(_connection: object, record: ConnectionPoolEntry) -> None:
        record.info[_IDLE_SINCE] = time.monotonic()

    @event.listens_for(engine, "checkout")
    def check(connection: Any, record: ConnectionPoolEntry, _proxy: object) -> None:
        now = time.monotonic()
        poll = select.poll()
        try:
            poll.register(connection, select.POLLIN)
            if poll.poll(0) or now - record.info.get(_IDLE_SINCE, now) > _SILENT_SECONDS:
                engine.dialect.do_ping(connection)
        except (engine.dialect.loaded_dbapi.Error, OSError, ValueError) as error:
            raise InvalidatePoolError from error


def _use_write_ahead_log(connection: sqlite3.Connection, lock_timeout_seconds: float) -> None:
    """Switch the file to it, or see that it is. Of two at once on a new file SQLite refuses one without waiting."""
    end = time.monotonic() + lock_timeout_seconds
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
            time.sleep(0.01)
        else:
            return


def _prepare_sqlite(engine: Engine, foreign_keys: bool, lock_timeout_seconds: float) -> None:
    @event.listens_for(engine, "connect")
    def prepare(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # the driver begins no transactions of its own; `begin` below does
        _use_write_ahead_log(connection, lock_timeout_seconds)
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA foreign_keys = {'ON' if foreign_keys else 'OFF'}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A deferred transaction that reads first fails at its first write, at once, when another wrote meanwhile.
        read_only = connection.get_execution_options().get(READ_ONLY, False)
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


@contextmanager
def _translated() -> Iterator[None]:
    """Turn the driver's errors about its surroundings into ours; errors about our SQL pass as they are."""
    try:
        yield
    except TimeoutError as error:
        raise ReducedCapacity("all database connections are in use") from error
    except (OperationalError, InterfaceError, InternalError, ProgrammingError) as error:
        if _is_schema_missing(error):
            raise SchemaMissing from error
        if _is_disk_full(error):
            raise StorageFull("the database has no space left") from error
        if _is_mistake(error):
            raise
        raise Unavailable("the database does not answer, or a lock was held too long") from error


def _is_disk_full(error: DBAPIError) -> bool:
    return getattr(error.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL or (
        getattr(error.orig, "sqlstate", None) == "53100"
    )


def _is_schema_missing(error: DBAPIError) -> bool:
    if isinstance(error.orig, sqlite3.Error):  # it has no code for this: the message is all there is
        return str(error.orig).startswith(("no such table", "no such column"))
    return getattr(error.orig, "sqlstate", None) in {"42P01", "42703"}


def _is_mistake(error: DBAPIError) -> bool:
    if isinstance(error, InternalError):
        return getattr(error.orig, "sqlstate", None) != _IDLE_TOO_LONG
    # SQLite reports wrong SQL as an operational error with the primary code SQLITE_ERROR.
    return isinstance(error, ProgrammingError) or getattr(error.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR
