"""What a parallel run costs: its pace, the time spent waiting for other ranks, the memory of each."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from worker.engine.parallel.group import Group
from worker.engine.parallel.strategy import Fact

_STATM = Path("/proc/self/statm")


class Observed:
    """The steps of one rank."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._num_steps, self._seconds, self._waited, self._peak_bytes = 0, 0.0, 0.0, 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Observe the forward and backward pass of a step. The first is left out of the times: it allocates."""
        started_at, waited = time.perf_counter(), self._group.waited_seconds
        yield
        self._peak_bytes = max(self._peak_bytes, resident_bytes())
        self._num_steps += 1
        if self._num_steps > 1:
            self._seconds += time.perf_counter() - started_at
            self._waited += self._group.waited_seconds - waited

    def conclude(self) -> dict[str, Fact]:
        """Bring the numbers of all ranks together."""
        mine = (self._num_steps - 1, self._seconds, self._waited, self._peak_bytes)
        everyone: list[tuple[int, float, float, int]] = self._group.gather(mine)  # type: ignore[assignment]
        steps, seconds, waited, _ = everyone[0]
        plan = self._group.plan
        return {
            "parallel": plan.describe() + (" sharded" if plan.shard else ""),
            "ranks": plan.num_ranks,
            "steps_per_second": steps / seconds if steps and seconds else None,
            "communication_share": waited / seconds if steps and seconds else None,
            "memory_per_rank": ", ".join(str(peak) for *_, peak in everyone),
            "largest_rank_memory": max(peak for *_, peak in everyone),
        }


def resident_bytes() -> int:
    """Return this process's memory now; 0 where the system does not say."""
    if sys.platform != "linux":
        return 0
    return int(_STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
