"""What a parallel run costs: its pace, the time spent waiting for other ranks, the memory of each."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from worker.engine.devices import finish_work
from worker.engine.parallel.group import Group
from worker.engine.parallel.strategy import Fact

NUM_TIMED_STEPS = 1000
"""On a GPU, at most: its times are two marks for each step, read at the end."""
_STATM = Path("/proc/self/statm")


class Observed:
    """The steps of one rank."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._on_gpu = group.device.type == "cuda"
        self._num_steps, self._seconds, self._waited, self._peak_bytes = 0, 0.0, 0.0, 0
        self._marks: list[tuple[Any, Any]] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """Observe the forward and backward pass of a step. The first is left out of the times: it allocates."""
        if self._on_gpu and self._num_steps == 0:
            # What this process did with the GPU before is not the plan's.
            torch.cuda.reset_peak_memory_stats(self._group.device)
        started_at, waited, mark = time.perf_counter(), self._group.waited_seconds, self._mark()
        yield
        self._peak_bytes = max(self._peak_bytes, held_bytes(self._group.device))
        self._num_steps += 1
        if self._num_steps == 1:
            return
        if self._on_gpu and len(self._marks) < NUM_TIMED_STEPS:
            self._marks.append((mark, self._mark()))
        self._seconds += time.perf_counter() - started_at
        self._waited += self._group.waited_seconds - waited

    def conclude(self) -> dict[str, Fact]:
        """Bring the numbers of all ranks together. On GPUs waiting is part of the work and cannot be told from it."""
        everyone: list[tuple[int, float, float, int]] = self._group.gather(self._sum_up())  # type: ignore[assignment]
        steps, seconds, waited, _ = everyone[0]
        plan = self._group.plan
        return {
            "parallel": plan.describe() + (" sharded" if plan.shard else ""),
            "ranks": plan.num_ranks,
            "steps_per_second": steps / seconds if steps and seconds else None,
            "communication_share": waited / seconds if steps and seconds and not self._on_gpu else None,
            "memory_per_rank": ", ".join(str(peak) for *_, peak in everyone),
            "largest_rank_memory": max(peak for *_, peak in everyone),
        }

    def _mark(self) -> Any:
        if not self._on_gpu:
            return None
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark

    def _sum_up(self) -> tuple[int, float, float, int]:
        if not self._on_gpu:
            return self._num_steps - 1, self._seconds, self._waited, self._peak_bytes
        finish_work(self._group.device)
        milliseconds = sum(start.elapsed_time(end) for start, end in self._marks)
        return len(self._marks), milliseconds / 1000, 0.0, self._peak_bytes


def held_bytes(device: torch.device) -> int:
    """Return the most memory of a GPU that this process has held since its peak was reset, for the CPU what it holds in
    main memory now."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_bytes()


def resident_bytes() -> int:
    """Return this process's memory now; 0 where the system does not say."""
    if sys.platform != "linux":
        return 0
    return int(_STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
