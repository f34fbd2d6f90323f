"""What Pare is measured against: FastAPI and SQLAlchemy with one table, one insert and one read by primary key.

    python -m benchmarks.load.bare

It listens on PARE_PORT and keeps its table in PARE_DATABASE_URL, under the same uvicorn settings and with the same pool
of connections as Pare. It knows no keys, owners, limits, audit log, headers of security, log lines or metrics.
"""

from datetime import UTC, datetime
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel
from sqlalchemy import JSON, DateTime, String, create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from app.__main__ import serving_options
from app.ids import new_id
from app.settings import Settings, load_settings


class Base(DeclarativeBase):
    """The one table."""


class ItemRow(Base):
    """What was sent."""

    __tablename__ = "bare_items"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    model_id: Mapped[str] = mapped_column(String(40))
    recipe: Mapped[dict[str, Any]] = mapped_column(JSON)
    labels: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))


class ItemRequest(BaseModel):
    """The body of a job's submission, taken as it is."""

    model_id: str
    recipe: dict[str, Any]
    labels: dict[str, str] = {}


class ItemView(BaseModel):
    """The answer."""

    id: str
    model_id: str
    recipe: dict[str, Any]
    labels: dict[str, str]
    created_at: datetime


def create_bare(settings: Settings) -> FastAPI:
    """Return the application; makes its table."""
    engine = create_engine(settings.database_url, pool_size=20, max_overflow=0)
    Base.metadata.create_all(engine)
    app = FastAPI()

    @app.post("/items", status_code=201)
    def post_item(body: ItemRequest) -> ItemView:
        row = ItemRow(id=new_id("job"), created_at=datetime.now(UTC), **body.model_dump())
        with Session(engine, expire_on_commit=False) as session, session.begin():
            session.add(row)
        return _describe(row)

    @app.get("/items/{item_id}")
    def get_item(item_id: str) -> ItemView:
        with Session(engine) as session:
            row = session.get(ItemRow, item_id)
            if row is None:
                raise HTTPException(404)
            return _describe(row)

    return app


def _describe(row: ItemRow) -> ItemView:
    return ItemView(id=row.id, model_id=row.model_id, recipe=row.recipe, labels=row.labels, created_at=row.created_at)


if __name__ == "__main__":
    given = load_settings()
    uvicorn.run(create_bare(given), **serving_options(given))
