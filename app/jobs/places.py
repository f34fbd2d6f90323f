"""The places of waiting jobs: how many start before one, if none that runs ends meanwhile.

The whole queue is read at once, and every place follows from it without another look into the database.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db.tables import JobRow
from app.jobs.lifecycle import CHECK_PRIORITY, State
from app.jobs.order import Running, Standing, count_running_by_owner, last_turn, seconds_of
from app.recipes.needs import DeviceKind

Line = tuple[DeviceKind, int, str]
"""Device kind, priority and owner: within a line the oldest job is next."""
Turn = tuple[int, float]
"""When an owner had its last turn: 0 and the seconds since 1970, or, in the future, the level and the place in it."""


@dataclass
class Places:
    """The queue at one moment, and what came to it since that this process knows of.

    Many threads read and add at once: whoever goes through a dictionary goes through a copy, which is made in one step.
    """

    running: Running
    standings: dict[str, Standing]
    """Of the owners that have waiting jobs, and of others who asked."""
    lengths: Counter[Line] = field(default_factory=Counter)
    _ranks: dict[str, int] = field(default_factory=dict)

    def add(self, job: JobRow) -> None:
        """Note a job that was submitted; one that is there already stays where it is."""
        if job.id not in self._ranks:
            line = (job.needs_device, job.priority, job.owner)
            self._ranks[job.id] = self.lengths[line]
            self.lengths[line] += 1

    def count_queued(self, owner: str) -> int:
        """Return how many jobs of an owner wait, checks of uploads aside."""
        return sum(
            length
            for (_, priority, name), length in list(self.lengths.items())
            if name == owner and priority < CHECK_PRIORITY
        )

    def count_ahead(self, device: DeviceKind, priority: int, owner: str, job_id: str | None = None) -> int:
        """Return how many waiting jobs of the same device kind start before a job.

        `job_id` None stands for one that would be submitted now; one that is not known is taken to be the newest.
        """
        levels: dict[int, dict[str, int]] = {priority: {}}
        for (kind, level, name), length in list(self.lengths.items()):
            if kind == device and level >= priority:
                levels.setdefault(level, {})[name] = length
        rank = self._ranks.get(job_id) if job_id is not None else None
        levels[priority][owner] = (self.lengths[device, priority, owner] if rank is None else rank) + 1
        return count_turns(levels, dict(self.standings), owner)


def read_places(session: Session) -> Places:
    """Read the queue."""
    running = count_running_by_owner(session)
    waits = JobRow.state == State.QUEUED
    turns = select(JobRow.owner, last_turn(JobRow.owner).scalar_subquery()).where(waits).group_by(JobRow.owner)
    standings = {owner: Standing(running.all[owner], seconds_of(at)) for owner, at in session.execute(turns)}
    places = Places(running, standings)
    line = (JobRow.needs_device, JobRow.priority, JobRow.owner)
    for device, priority, owner, job_id in session.execute(
        select(*line, JobRow.id).where(waits).order_by(*line, JobRow.created_at, JobRow.id)
    ):
        key = (device, priority, owner)
        places._ranks[job_id] = places.lengths[key]
        places.lengths[key] += 1
    # Each statement sees another moment: an owner may have come between the two.
    for owner in {owner for _, _, owner in places.lengths}:
        know_standing(session, places, owner)
    return places


def know_standing(session: Session, places: Places, owner: str) -> None:
    """Let an owner without waiting jobs have its place as well."""
    if owner not in places.standings:
        at = session.scalar(last_turn(owner))
        places.standings[owner] = Standing(places.running.all[owner], seconds_of(at))


def count_turns(levels: Mapping[int, Mapping[str, int]], standings: Mapping[str, Standing], owner: str) -> int:
    """Return how many jobs are claimed before the last of `owner` at the lowest of the priorities.

    `levels` has, for each priority, how many jobs of each owner wait; `standings` has every owner in it.

    No job ends meanwhile, so an owner's n-th claim at a level is in round (its jobs that run) + n - 1, and rounds come
    one after the other. Within a round those go first for whom it is the first of the level, by their last turns, then
    those who came in a round before, in the same order as there.
    """
    lowest = min(levels)
    num_running = {name: standing.num_running for name, standing in standings.items()}
    turns: dict[str, Turn] = {name: (0, standing.last_turn) for name, standing in standings.items()}

    def entry(name: str) -> tuple[int, Turn, str]:
        return -num_running[name], turns[name], name

    num_claimed = 0
    for depth, level in enumerate(sorted(levels, reverse=True)):
        counts = {name: count for name, count in levels[level].items() if count}
        if level == lowest:
            break
        # All of them go first. What is left of them is how many run then, and in which order the last ones began.
        ended = sorted(counts, key=lambda name: (num_running[name] + counts[name], entry(name)))
        for place, name in enumerate(ended):
            num_running[name] += counts[name]
            turns[name] = (depth + 1, place)
            num_claimed += counts[name]
    final = num_running[owner] + counts[owner] - 1
    for name, count in counts.items():
        first = num_running[name]
        num_claimed += min(count, max(0, final - first))
        if name != owner and first <= final < first + count and entry(name) < entry(owner):
            num_claimed += 1
    return num_claimed
