"""How a worker divides what it has among its slots: each slot runs one job, on devices of its own."""

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from app.errors import ConfigurationError
from app.jobs import Capacity
from app.recipes.needs import DeviceKind
from app.settings import Settings
from worker.devices import Gpu, find_gpus, parse_sets
from worker.settings import WorkerSettings

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Share:
    """What one slot has for a job."""

    slot: int
    """From 0."""
    num_slots: int
    gpus: tuple[Gpu, ...]
    memory_bytes: int
    num_threads: int
    accepts: tuple[DeviceKind, ...]
    is_memory_declared: bool
    """Whether the operator says how much there is: then an engine may take its share, whatever its own limit is."""

    @property
    def capacity(self) -> Capacity:
        """What the claim compares with a job's needs."""
        return Capacity(self.accepts, len(self.gpus), self.memory_bytes, self.num_threads)

    def limit(self, settings: Settings) -> Settings:
        """Return the settings of this slot's engines: threads, and memory where the operator declared it."""
        own = {"engine_threads": self.num_threads}
        return settings.model_copy(
            update=own | ({"engine_memory_bytes": self.memory_bytes} if self.is_memory_declared else {})
        )


@cache
def divide(settings: Settings, worker: WorkerSettings) -> tuple[Share, ...]:
    """Return the share of each slot; raises ConfigurationError where devices and slots do not go together."""
    sets = _divide_devices(worker)
    num_slots = len(sets)
    has_gpus = bool(sets[0])
    kinds: tuple[DeviceKind, ...] = ("gpu", "cpu") if worker.takes_cpu_jobs else ("gpu",)
    memory = worker.memory_bytes or find_memory_bytes()
    share = memory // num_slots
    if worker.memory_bytes is None and not has_gpus:
        # Without a GPU the kernel holds an engine to its limit. (CUDA reserves far more addresses than it fills.)
        share = min(share, settings.engine_memory_bytes)
    threads = max(1, worker.threads // num_slots) if worker.threads is not None else settings.engine_threads
    return tuple(
        Share(slot, num_slots, gpus, share, threads, kinds if has_gpus else ("cpu",), worker.memory_bytes is not None)
        for slot, gpus in enumerate(sets)
    )


def find_memory_bytes() -> int:
    """Return the memory of this machine, or of this container where that is less."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in map(Path, _CGROUP_LIMITS):
        if path.is_file() and (text := path.read_text().strip()).isdecimal():
            limits.append(int(text))
    return min(limits)


def _divide_devices(worker: WorkerSettings) -> list[tuple[Gpu, ...]]:
    if worker.devices == "cpu":
        return [()] * (worker.concurrency or 1)
    found = find_gpus()
    if worker.devices == "auto":
        if not found:
            return [()] * (worker.concurrency or 1)
        return _split(found, worker.concurrency)
    sets = parse_sets(worker.devices, found)
    if len(sets) == 1:
        return _split(sets[0], worker.concurrency)
    if worker.concurrency not in (None, len(sets)):
        raise ConfigurationError(
            f"PARE_WORKER_DEVICES {worker.devices!r} declares {len(sets)} sets and PARE_WORKER_CONCURRENCY is "
            f"{worker.concurrency}",
            fix="Leave PARE_WORKER_CONCURRENCY out: a worker runs one job for each set.",
        )
    return sets


def _split(gpus: tuple[Gpu, ...], num_slots: int | None) -> list[tuple[Gpu, ...]]:
    """Divide GPUs evenly, neighbours together; without a number each is a slot of its own."""
    num_slots = num_slots or len(gpus)
    if len(gpus) % num_slots:
        raise ConfigurationError(
            f"{len(gpus)} GPUs cannot be divided evenly among PARE_WORKER_CONCURRENCY = {num_slots} slots",
            fix="Choose a divisor, leave it out for one job on each GPU, or declare sets: PARE_WORKER_DEVICES=0,1;2,3.",
        )
    size = len(gpus) // num_slots
    return [gpus[start : start + size] for start in range(0, len(gpus), size)]
