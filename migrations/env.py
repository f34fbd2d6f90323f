"""Alembic's entry point: runs on the connection it is handed, inside the caller's transaction."""

from typing import Any, Literal

from alembic import context
from alembic.autogenerate.api import AutogenContext
from sqlalchemy import JSON

from app.db import access_tables  # noqa: F401 - its tables are part of the schema
from app.db.tables import Base
from app.db.types import UtcDateTime


def render_plain(kind: str, item: Any, _context: AutogenContext) -> str | Literal[False]:
    """Write Pare's column types as what they are in the database, so that old migrations do not need today's code."""
    if kind == "type" and isinstance(item, UtcDateTime):
        return "sa.DateTime(timezone=True)"
    if kind == "type" and isinstance(item, JSON):
        return "sa.JSON()"
    return False


context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    compare_type=True,
    # SQLite cannot alter most things in place; batch mode makes the table anew.
    render_as_batch=True,
    render_item=render_plain,
)

with context.begin_transaction():
    context.run_migrations()
