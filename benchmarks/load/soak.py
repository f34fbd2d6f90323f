"""Minutes of every kind of request at once: does the API process grow?"""

import statistics
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.load.client import Plan, drive
from benchmarks.load.rates import make_cases
from benchmarks.load.world import World
from benchmarks.upload_memory import read_memory

SAMPLE_SECONDS = 5.0
SLICE_SECONDS = 30.0
"""After each, what was submitted is removed, or the queue would grow by more than a hundred thousand jobs."""
WARM_UP_MINUTES = 1.0


@dataclass(frozen=True)
class Sample:
    """What the API process held at one moment."""

    minutes: float
    resident_mib: float
    num_files: int


def soak(world: World, clients: Sequence[Executor], minutes: float) -> None:
    """Let clients send every kind of request in turn for so many minutes, sample, and print."""
    cases = [case for case in make_cases(world, 2) if case.versus]
    process = world.children["pare"].process
    assert process is not None
    pid, began = process.pid, time.monotonic()
    samples: list[Sample] = []
    num_requests = 0

    def look() -> None:
        num_files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        samples.append(Sample((time.monotonic() - began) / 60, read_memory(pid, "VmRSS"), num_files))

    look()
    while (time.monotonic() - began) / 60 < minutes:
        plans = [Plan(world.ports[case.server], case.requests, case.status, SLICE_SECONDS) for case in cases]
        running = [client.submit(drive, plan) for client, plan in zip(clients, plans, strict=True)]
        while not all(each.done() for each in running):
            time.sleep(SAMPLE_SECONDS)
            look()
        num_requests += sum(len(each.result().milliseconds) for each in running)
        world.forget_submitted()
    _print(samples, num_requests)


def _print(samples: list[Sample], num_requests: int) -> None:
    settled = [sample for sample in samples if sample.minutes >= WARM_UP_MINUTES]
    slope = statistics.linear_regression(
        [sample.minutes for sample in settled], [sample.resident_mib for sample in settled]
    ).slope
    print("| minute | resident MiB | open files |\n|---|---|---|")
    for sample in samples[:: max(1, len(samples) // 20)]:
        print(f"| {sample.minutes:.1f} | {sample.resident_mib:.1f} | {sample.num_files} |")
    hourly = slope * 60
    print(f"\n{num_requests} requests in {samples[-1].minutes:.1f} minutes, {len(samples)} samples")
    print(f"slope after the first {WARM_UP_MINUTES:g} minute: {hourly:+.1f} MiB per hour")
    print(
        f"growth from minute {settled[0].minutes:.1f} on: {settled[-1].resident_mib - settled[0].resident_mib:+.1f} MiB"
    )
