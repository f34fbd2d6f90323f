"""The order of waiting jobs: by priority, then fair between owners, then by age. app/jobs/places.py foretells it.

Fair means: first the owner of whom the fewest jobs run, and of several such the one whose last turn is longest ago.
The check of an upload has a priority above every job's.
"""

from collections import Counter
from dataclasses import dataclass
from datetime import datetime

import structlog
from sqlalchemy import ColumnElement, Select, func, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import InstrumentedAttribute, Session, aliased

from app.access.limits import lock_owner, read_running_limits
from app.db.tables import JobRow
from app.jobs.lifecycle import CHECK_PRIORITY, CHECKS, MADE_OF_PARTS, OWNED, State
from app.jobs.needs import Capacity
from app.recipes.needs import DeviceKind

Conditions = tuple[ColumnElement[bool], ...]

_TURN_LOCK = 0x7475726E
"""Any number will do that no other advisory lock has."""
_TURN_MILLISECONDS = 3000
_LOCK_NOT_AVAILABLE = "55P03"

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Standing:
    """How an owner has fared so far."""

    num_running: int = 0
    last_turn: float = 0.0
    """When a job of the owner was last claimed, in seconds since 1970."""


@dataclass(frozen=True)
class Running:
    """How many jobs run, by owner."""

    all: Counter[str]
    jobs: Counter[str]
    """Without checks of uploads."""
    parents: Counter[str]
    """Those made of others, which run on no worker and count as waiting."""


def can_run(capacity: Capacity, device: DeviceKind) -> Conditions:
    """Return the conditions for waiting jobs of a kind that a worker with this capacity can run."""
    return (
        JobRow.state == State.QUEUED,
        JobRow.needs_device == device,
        JobRow.needs_num_devices <= capacity.num_devices,
        JobRow.needs_memory_bytes <= capacity.memory_bytes,
        JobRow.needs_num_threads <= capacity.num_threads,
        JobRow.attempt < JobRow.max_attempts,
    )


def pick_next(session: Session, capacity: Capacity, max_running: int | None = None) -> str | None:
    """Return the waiting job that is next for this worker, locked where the database has such locks; None: nothing.

    `max_running` is how many jobs of an owner may run at the same time if it has no limit of its own; checks do not
    count, and do not wait. The cost grows with the number of owners and priorities, not with that of waiting jobs:
    every query ends at its first row.
    """
    kinds = [can_run(capacity, device) for device in capacity.accepts]
    running = count_running_by_owner(session)
    while True:
        priorities = [_find_top_priority(session, conditions) for conditions in kinds]
        highest = max((priority for priority in priorities if priority is not None), default=None)
        if highest is None:
            return None
        groups = [
            (*conditions, JobRow.priority == highest)
            for conditions, priority in zip(kinds, priorities, strict=True)
            if priority == highest
        ]
        turns = {owner: at for conditions in groups for owner, at in _find_owners(session, conditions)}
        limits = read_running_limits(session, max_running, turns) if highest != CHECK_PRIORITY else {}
        free = [owner for owner in turns if owner not in limits or running.jobs[owner] < limits[owner]]
        standings = {owner: Standing(running.all[owner], seconds_of(turns[owner])) for owner in free}
        for owner in sorted(standings, key=lambda name: _key(standings[name], name)):
            if owner in limits and not _may_run_more(session, owner, limits[owner]):
                continue
            oldest = [
                job for conditions in groups if (job := _find_oldest(session, (*conditions, JobRow.owner == owner)))
            ]
            if oldest:
                return min(oldest)[1]
        if free:
            return None
        kinds = [(*conditions, JobRow.priority < highest) for conditions in kinds]


def find_saturated(session: Session, max_running: int | None) -> list[str]:
    """Return the owners of whom as many jobs run as may."""
    jobs = count_running_by_owner(session).jobs
    limits = read_running_limits(session, max_running, jobs)
    return sorted(owner for owner, limit in limits.items() if jobs[owner] >= limit)


def take_turn(session: Session) -> None:
    """Let one claim at a time look at the queue, until this transaction ends, so that its fairness is exact.

    SQLite has one writer at a time anyway. On PostgreSQL a claim that hangs must not stop the others: after three
    seconds this one goes on beside it. Nothing but fairness hangs on this lock.
    """
    if session.get_bind().dialect.name != "postgresql":
        return
    try:
        with session.begin_nested():
            session.execute(text(f"SET LOCAL lock_timeout = {_TURN_MILLISECONDS}"))
            session.execute(select(func.pg_advisory_xact_lock(_TURN_LOCK)))
    except OperationalError as error:
        if getattr(error.orig, "sqlstate", None) != _LOCK_NOT_AVAILABLE:
            raise
        _log.warning("another claim takes long", waited_milliseconds=_TURN_MILLISECONDS)


def _key(standing: Standing, owner: str) -> tuple[int, float, str]:
    return standing.num_running, standing.last_turn, owner


def _find_top_priority(session: Session, conditions: Conditions) -> int | None:
    return session.scalar(select(JobRow.priority).where(*conditions).order_by(JobRow.priority.desc()).limit(1))


def _find_owners(session: Session, conditions: Conditions) -> list[tuple[str, datetime | None]]:
    """Return the owners of such jobs with their last turns, going from owner to owner along the index."""
    ordered = select(JobRow.owner).where(*conditions).order_by(JobRow.owner).limit(1)
    owners = select(ordered.scalar_subquery().label("owner")).cte("waiting_owners", recursive=True)
    following = ordered.where(JobRow.owner > owners.c.owner).scalar_subquery()
    owners = owners.union_all(select(following).where(owners.c.owner.is_not(None)))
    found = select(owners.c.owner, last_turn(owners.c.owner).scalar_subquery()).where(owners.c.owner.is_not(None))
    return [(owner, at) for owner, at in session.execute(found)]


def _find_oldest(session: Session, conditions: Conditions) -> tuple[datetime, str] | None:
    """Return when the oldest such job was submitted, and its id."""
    query = (
        select(JobRow.created_at, JobRow.id)
        .where(*conditions)
        .order_by(JobRow.created_at, JobRow.id)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    found = session.execute(query).first()
    return (found[0], found[1]) if found is not None else None


def last_turn(owner: ColumnElement[str] | InstrumentedAttribute[str] | str) -> Select[datetime | None]:
    """Return the query for when a job of an owner was last claimed."""
    earlier = aliased(JobRow)
    return (
        select(earlier.claimed_at)
        .where(earlier.owner == owner, earlier.claimed_at.is_not(None))
        .order_by(earlier.claimed_at.desc())
        .limit(1)
    )


def count_running_by_owner(session: Session, owner: str | None = None) -> Running:
    """Return how many jobs run, of everybody or of one owner."""
    query = select(JobRow.owner, JobRow.action).where(JobRow.state.in_(OWNED))
    rows = session.execute(query if owner is None else query.where(JobRow.owner == owner)).all()
    # A parent runs on no worker; its parts do, and count.
    working = [(name, action) for name, action in rows if action not in MADE_OF_PARTS]
    return Running(
        all=Counter(name for name, _ in working),
        jobs=Counter(name for name, action in working if action not in CHECKS),
        parents=Counter(name for name, action in rows if action in MADE_OF_PARTS),
    )


def _may_run_more(session: Session, owner: str, limit: int) -> bool:
    """Return whether one more job of this owner may run, and let nobody else decide that until the transaction ends.

    On SQLite nobody else can. On PostgreSQL another claim may go on beside this one (see take_turn).
    """
    if session.get_bind().dialect.name != "postgresql":
        return True
    lock_owner(session, owner)
    return count_running_by_owner(session, owner).jobs[owner] < limit


def seconds_of(at: datetime | None) -> float:
    """Return a turn in seconds since 1970; 0: there was none."""
    return at.timestamp() if at is not None else 0.0
