"""The database's clock. Leases, deadlines and timestamps use it alone: the clocks of workers cannot be trusted."""

from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Float, literal
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from app.db.types import UtcDateTime


class _DatabaseTime(FunctionElement[datetime]):
    """The start of the current statement, plus a number of seconds."""

    name = "database_time"
    inherit_cache = True
    type = UtcDateTime()


@compiles(_DatabaseTime, "postgresql")
def _on_postgresql(element: _DatabaseTime, compiler: SQLCompiler, **options: Any) -> str:
    # Not now(): that is the start of the transaction, which may have waited for a lock since.
    return f"(statement_timestamp() + make_interval(secs => {compiler.process(element.clauses, **options)}))"


@compiles(_DatabaseTime, "sqlite")
def _on_sqlite(element: _DatabaseTime, compiler: SQLCompiler, **options: Any) -> str:
    # SQLite compares times as text, so the text has SQLAlchemy's width: six digits of a second.
    shift = f"printf('%+.3f seconds', {compiler.process(element.clauses, **options)})"
    return f"(strftime('%Y-%m-%d %H:%M:%f', 'now', {shift}) || '000')"


def db_now(plus_seconds: float = 0.0) -> ColumnElement[datetime]:
    """Return the database's time, as an SQL expression, shifted by some seconds."""
    return _DatabaseTime(literal(float(plus_seconds), Float))
