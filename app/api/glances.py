"""What many answers need to know of the queue, the workers and the limits, looked at once for all of them.

A glance may be some tenths of a second old: places in the queue and reasons to wait are such as of a moment ago anyway,
and to look for each answer would cost more than the answer. What this process submits itself it knows at once.
"""

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from app.access.limits import Limits, default_limits, list_overrides, merge_limits
from app.db.session import Database
from app.db.tables import WorkerRow
from app.jobs import Places, list_workers
from app.jobs.places import know_standing, read_places
from app.settings import Settings

KEEP_SECONDS = 0.25
"""A glance is taken again when it is older."""
COST_FACTOR = 20
"""But looking takes at most this part of the time, however long the queue: 50 ms of each second."""
MAX_SECONDS = 1.0
"""An older glance says nothing of what an owner may do."""
FEW = 2_000
"""The quota of an owner that may have fewer jobs waiting is counted each time."""


@dataclass(frozen=True)
class Glance:
    """The queue, the workers and the limits at one moment."""

    places: Places
    workers: tuple[WorkerRow, ...]
    defaults: Limits
    overrides: Mapping[str, Limits]
    taken_at: float
    cost_seconds: float

    @property
    def age_seconds(self) -> float:
        """How long ago it was taken."""
        return time.monotonic() - self.taken_at

    def has_room(self, owner: str) -> bool:
        """Whether an owner is so far from its limits that one more job need not be counted.

        Half of its limit is free then, a thousand jobs at least: more than can come while a glance is good.
        """
        limits = merge_limits(self.defaults, self.overrides.get(owner, Limits()))
        if limits.stored_bytes is not None or self.age_seconds > MAX_SECONDS:
            return False
        if limits.queued_jobs is None:
            return True
        queued = self.places.count_queued(owner) + self.places.running.parents[owner]
        return limits.queued_jobs >= FEW and queued <= limits.queued_jobs // 2


class Glances:
    """The newest glance of one API process. Its methods run in threads, in no transaction."""

    def __init__(self, settings: Settings, database: Database) -> None:
        self._settings = settings
        self._database = database
        self._newest: Glance | None = None
        self._looking = threading.Lock()

    def look(self, owner: str) -> Glance:
        """Return a glance that knows the standing of an owner."""
        glance = self._newest
        if glance is None or glance.age_seconds > max(KEEP_SECONDS, COST_FACTOR * glance.cost_seconds):
            glance = self._look_again(glance)
        if owner not in glance.places.standings:
            with self._database.read() as session:
                know_standing(session, glance.places, owner)
        return glance

    def _look_again(self, old: Glance | None) -> Glance:
        # While one looks, the others go on with the old glance, if there is one.
        if not self._looking.acquire(blocking=old is None):
            assert old is not None
            return old
        try:
            if self._newest is None or self._newest is old:
                self._newest = self._take()
            return self._newest
        finally:
            self._looking.release()

    def _take(self) -> Glance:
        taken_at = time.monotonic()
        with self._database.read() as session:
            places = read_places(session)
            workers = tuple(list_workers(session, self._settings.worker_seen_seconds))
            overrides = list_overrides(session)
        cost = time.monotonic() - taken_at
        return Glance(places, workers, default_limits(self._settings), overrides, taken_at, cost)
