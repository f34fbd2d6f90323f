"""How much an owner may have: the settings' limits, and those that administrators gave an owner instead."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace

from sqlalchemy import or_, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from app.db.access_tables import OwnerRow
from app.db.clock import db_now
from app.settings import Settings


@dataclass(frozen=True)
class Limits:
    """What an owner may have; None: no limit, or in what administrators gave, the settings' limit."""

    stored_bytes: int | None = None
    """Models, datasets, artifacts, checkpoints and logs; the same bytes of one owner count once."""
    running_jobs: int | None = None
    """Jobs that run at the same time; checks of uploads do not count."""
    queued_jobs: int | None = None
    """Jobs that wait, and unfinished jobs made of others."""
    requests_per_minute: int | None = None
    """Requests of the API."""


NAMES = tuple(field.name for field in fields(Limits))


def default_limits(settings: Settings) -> Limits:
    """Return the limits of an owner that administrators gave none."""
    return Limits(**{name: getattr(settings, f"quota_{name}") for name in NAMES})


def read_overrides(session: Session, owner: str) -> Limits:
    """Return what administrators gave an owner."""
    row = session.get(OwnerRow, owner)
    return Limits(**{name: getattr(row, name) for name in NAMES}) if row is not None else Limits()


def list_overrides(session: Session) -> dict[str, Limits]:
    """Return what administrators gave, by owner; owners without are left out."""
    columns = [getattr(OwnerRow, name) for name in NAMES]
    query = select(OwnerRow.name, *columns).where(or_(*(column.is_not(None) for column in columns)))
    return {owner: Limits(*values) for owner, *values in session.execute(query)}


def merge_limits(defaults: Limits, overrides: Limits) -> Limits:
    """Return the limits that are in force."""
    given = {name: value for name, value in asdict(overrides).items() if value is not None}
    return replace(defaults, **given)


def read_limits(session: Session, settings: Settings, owner: str) -> Limits:
    """Return the limits that are in force for an owner."""
    return merge_limits(default_limits(settings), read_overrides(session, owner))


def read_running_limits(session: Session, default: int | None, owners: Iterable[str]) -> dict[str, int]:
    """Return the limits on running jobs of those of these owners that have one."""
    names = list(owners)
    if not names:
        return {}
    query = select(OwnerRow.name, OwnerRow.running_jobs)
    given = session.execute(query.where(OwnerRow.name.in_(names), OwnerRow.running_jobs.is_not(None)))
    limits: dict[str, int | None] = dict.fromkeys(names, default)
    limits.update({name: limit for name, limit in given})  # noqa: C416 - rows are no tuples to the type checker
    return {name: limit for name, limit in limits.items() if limit is not None}


def set_overrides(session: Session, owner: str, given: Limits) -> None:
    """Give an owner limits of its own; None takes the settings' limit again."""
    lock_owner(session, owner)
    row = session.get_one(OwnerRow, owner)
    for name in NAMES:
        setattr(row, name, getattr(given, name))
    session.flush()


def know_owner(session: Session, owner: str) -> None:
    """Have a row for an owner; one that is there stays as it is."""
    dialect = postgresql if session.get_bind().dialect.name == "postgresql" else sqlite
    session.execute(dialect.insert(OwnerRow).values(name=owner, created_at=db_now()).on_conflict_do_nothing())


def lock_owner(session: Session, owner: str) -> None:
    """Let nobody else change what this owner has, until the transaction ends; knows the owner from then on.

    Whoever checks a limit and then uses it up holds this lock, so of two at once one sees what the other did. On SQLite
    one transaction writes at a time anyway.
    """
    query = select(OwnerRow).where(OwnerRow.name == owner).with_for_update()
    query = query.execution_options(populate_existing=True)
    if session.scalar(query) is None:
        know_owner(session, owner)
        session.scalars(query).one()
