"""What a job needs, what a worker has for one job, and what of it is missing."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row

from app.db.tables import JobRow, WorkerRow
from app.errors import InvalidRequest, Problem
from app.recipes.needs import DeviceKind, Needs
from app.recipes.parallel import Parallel
from app.recipes.recipe import Recipe

_GIB = 1024**3
RANK_MEMORY_BYTES = _GIB
"""Below this a process that imports torch and trains anything at all does not fit."""


@dataclass(frozen=True)
class JobNeeds:
    """What a job needs, nothing left open."""

    device: DeviceKind = "cpu"
    num_devices: int = 0
    """GPUs."""
    memory_bytes: int = 0
    num_threads: int = 1

    def __str__(self) -> str:
        parts = ["a CPU worker" if self.device == "cpu" else _count(self.num_devices, "GPU")]
        parts += [f"{_gib(self.memory_bytes)} of memory"] if self.memory_bytes else []
        parts += [_count(self.num_threads, "thread")] if self.num_threads > 1 else []
        return ", ".join(parts)


@dataclass(frozen=True)
class Capacity:
    """What a worker has for one job, and which jobs it takes."""

    accepts: tuple[DeviceKind, ...] = ("cpu",)
    """A worker with GPUs takes the jobs that need none only where it was told to."""
    num_devices: int = 0
    """GPUs."""
    memory_bytes: int = 0
    num_threads: int = 1

    def find_lacks(self, needs: JobNeeds) -> list[str]:
        """Return in words what is missing for a job; empty where it can run."""
        lacks = []
        if needs.device not in self.accepts:
            lacks.append(f"takes {' and '.join(self.accepts)} jobs only")
        elif needs.num_devices > self.num_devices:
            lacks.append(f"has {_count(self.num_devices, 'GPU')}")
        if needs.memory_bytes > self.memory_bytes:
            lacks.append(f"has {_gib(self.memory_bytes)} of memory for a job")
        if needs.num_threads > self.num_threads:
            lacks.append(f"has {_count(self.num_threads, 'thread')} for a job")
        return lacks


def derive_needs(recipe: Recipe | None, asked: Needs | None = None) -> JobNeeds:
    """Return what a job needs: what was asked for, and where nothing was, what its recipe implies.

    This is the only place where needs come from; without a recipe (the check of an upload) any CPU worker will do.
    Raises InvalidRequest where fewer GPUs are asked for than a parallel plan has ranks.
    """
    asked = asked or Needs()
    implied: DeviceKind = "gpu" if recipe is not None and recipe.needs_gpu else "cpu"
    device = asked.device or ("gpu" if asked.num_devices else implied)
    plan = recipe.plan if recipe is not None else Parallel()
    if device == "gpu" and asked.num_devices is not None and asked.num_devices < plan.num_ranks:
        raise InvalidRequest(
            [
                Problem(
                    "/needs/num_devices",
                    f"{plan.describe()} needs {plan.num_ranks} GPUs, one for each rank, and num_devices is "
                    f"{asked.num_devices}; leave it out, or set device to 'cpu'",
                )
            ]
        )
    # A rank is a process with threads and memory of its own, on GPUs with a GPU of its own.
    memory = plan.num_ranks * RANK_MEMORY_BYTES if plan.num_ranks > 1 else 0
    return JobNeeds(
        device=device,
        num_devices=(asked.num_devices or plan.num_ranks) if device == "gpu" else 0,
        memory_bytes=memory if asked.memory_bytes is None else asked.memory_bytes,
        num_threads=asked.num_threads or plan.num_ranks * (plan.threads_per_rank or 1),
    )


def needs_of(job: JobRow | Row[Any]) -> JobNeeds:
    """Return what a job needs."""
    return JobNeeds(job.needs_device, job.needs_num_devices, job.needs_memory_bytes, job.needs_num_threads)


def capacity_of(worker: WorkerRow) -> Capacity:
    """Return what a registered worker has for one job; of what it does not say it has nothing."""
    facts = worker.facts
    accepts: tuple[DeviceKind, ...] = tuple(kind for kind in facts.get("accepts", ["cpu"]) if kind in ("cpu", "gpu"))
    return Capacity(
        accepts=accepts,
        num_devices=len(facts.get("devices", [])),
        memory_bytes=int(facts.get("memory_bytes", 0)),
        num_threads=int(facts.get("num_threads", 1)),
    )


def _count(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.1f} GiB"
