"""New rows of several tables: on PostgreSQL they take one statement, where each of its own would cost a round trip."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

from sqlalchemy import Insert, Select, Table, bindparam, insert, select
from sqlalchemy.orm import Session

from app.db.clock import db_now

_TIMES = ("created_at", "published_at")


@dataclass(frozen=True)
class NewRow:
    """A row to be inserted; the times at which it was made, `created_at` and the like, are the database's."""

    table: Table
    values: dict[str, Any]
    """By column; what is left out is null, or numbered by the database."""


def insert_row(session: Session, row: NewRow) -> None:
    """Insert one row."""
    session.execute(_insert_now(row.table), row.values)


def insert_together(session: Session, rows: Sequence[NewRow]) -> datetime:
    """Insert a row into each of some tables, none of them twice; return when the first was created.

    A row may refer to one before it.
    """
    if session.get_bind().dialect.name == "postgresql":
        statement = _join(tuple((row.table, tuple(row.values)) for row in rows))
        values = {_name(row.table, column): value for row in rows for column, value in row.values.items()}
        created_at: datetime = session.execute(statement, values).scalar_one()
        return created_at
    first, *others = rows
    created_at = session.execute(_insert_first(first.table), first.values).scalar_one()
    for row in others:
        insert_row(session, row)
    return created_at


@lru_cache(maxsize=100)
def _insert_now(table: Table) -> Insert:
    """Return what inserts a row. Made once: to build a statement takes longer than to ask it."""
    return insert(table).values({name: db_now() for name in _TIMES if name in table.c})


@lru_cache(maxsize=100)
def _insert_first(table: Table) -> Any:
    return _insert_now(table).returning(table.c.created_at)


@lru_cache(maxsize=100)
def _join(shape: tuple[tuple[Table, tuple[str, ...]], ...]) -> Select[Any]:
    """Return what inserts a row with these columns into each of these tables."""
    inserts = [
        _insert_now(table).values({name: bindparam(_name(table, name), type_=table.c[name].type) for name in columns})
        for table, columns in shape
    ]
    made = inserts[0].returning(shape[0][0].c.created_at).cte("made")
    others = (each.cte(f"also_{number}") for number, each in enumerate(inserts[1:]))
    return select(made.c.created_at).add_cte(*others)


def _name(table: Table, column: str) -> str:
    return f"{table.name}_{column}"
