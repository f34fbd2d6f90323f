"""The tables of app/access: keys, owners with their limits, requests of the minute, the audit log."""

from datetime import datetime
from typing import Any

from sqlalchemy import Index, Integer, String
from sqlalchemy.orm import Mapped, mapped_column

from app.db.tables import Base


class KeyRow(Base):
    """A key: who may do what. Of its secret only a digest is kept. Keys that ended stay, for the record."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    owner: Mapped[str] = mapped_column(String(40), index=True)
    name: Mapped[str] = mapped_column(String(200))
    scopes: Mapped[list[Any]]
    """read, write, admin."""
    secret_sha256: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]
    """Within a minute."""
    replaced_by: Mapped[str | None] = mapped_column(String(40))
    """The key that was made to take its place."""
    __table_args__ = (Index("ix_api_keys_created", "created_at", "id"),)


class OwnerRow(Base):
    """An owner, and the limits that administrators gave it; null: the settings' (app/access/limits.py).

    Its row is the lock of whoever checks a limit. It is there once the owner has a key, or a limit was checked for it.
    """

    __tablename__ = "owners"

    name: Mapped[str] = mapped_column(String(40), primary_key=True)
    stored_bytes: Mapped[int | None]
    running_jobs: Mapped[int | None]
    queued_jobs: Mapped[int | None]
    requests_per_minute: Mapped[int | None]
    created_at: Mapped[datetime]


class WindowRow(Base):
    """The requests of an owner that API processes took in the newest minute they asked for (app/access/windows.py)."""

    __tablename__ = "request_windows"

    owner: Mapped[str] = mapped_column(String(40), primary_key=True)
    window: Mapped[int]
    """Minutes since 1970."""
    taken: Mapped[int]


class AuditRow(Base):
    """Something that was done, or that somebody tried to do (app/access/audit.py)."""

    __tablename__ = "audit"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    created_at: Mapped[datetime]
    owner: Mapped[str] = mapped_column(String(40), index=True)
    """For whom: the owner of the key; (service): the service's own command."""
    key_id: Mapped[str | None] = mapped_column(String(40))
    action: Mapped[str] = mapped_column(String(60))
    """The operation's name in the API description."""
    target: Mapped[str | None] = mapped_column(String(200))
    request_id: Mapped[str | None] = mapped_column(String(64))
    status: Mapped[int | None] = mapped_column(Integer)
    outcome: Mapped[str] = mapped_column(String(10))
    """done, refused or failed."""
    __table_args__ = (Index("ix_audit_created", "created_at", "id"),)
