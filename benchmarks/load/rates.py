"""Requests per second and their times, as a ratio to what a bare service does in the same minute."""

import statistics
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

from benchmarks.load.client import FRESH, Outcome, Plan, drive, make_request, quantile
from benchmarks.load.world import Owner, World, make_body


@dataclass(frozen=True)
class Case:
    """One kind of request."""

    name: str
    server: str
    """pare, bare or nginx."""
    versus: str
    """The case of the bare service that it is compared with; empty for one of those."""
    status: int
    requests: tuple[tuple[bytes, ...], ...]
    """By connection."""
    target: float | None = None
    """The ratio that it shall have at least."""


@dataclass
class Rate:
    """What was measured of a case, round by round."""

    case: Case
    outcomes: list[Outcome] = field(default_factory=list)
    processor_seconds: float = 0.0
    """Of the process that answers."""
    dispatcher_seconds: float = 0.0

    @property
    def per_second(self) -> float:
        """The median round."""
        return statistics.median(outcome.per_second for outcome in self.outcomes)

    def processor_milliseconds(self, seconds: float) -> float:
        """Return what a request took of a processor time of all rounds."""
        return 1000 * seconds / sum(outcome.num_sent for outcome in self.outcomes)

    def quantile(self, share: float) -> float:
        """Return a quantile of all times, in milliseconds."""
        return quantile([each for outcome in self.outcomes for each in outcome.milliseconds], share)

    def ratios(self, other: "Rate") -> list[float]:
        """Return, round by round, how many times as many requests this one answered."""
        return [mine.per_second / theirs.per_second for mine, theirs in zip(self.outcomes, other.outcomes, strict=True)]


BARE_INSERT, BARE_READ = "bare: insert", "bare: read by key"
CEILING = "client alone: a fixed answer of nginx"


def make_cases(world: World, num_connections: int) -> list[Case]:
    """Return every case; each connection is one owner's."""
    owners = [world.owners[number % len(world.owners)] for number in range(num_connections)]

    def ask(name: str, *paths: str, target: float | None = None) -> Case:
        requests = tuple(
            tuple(make_request("GET", path.format(**_names(owner)), owner.token) for path in paths) for owner in owners
        )
        return Case(name, "pare", BARE_READ, 200, requests, target)

    def submit(name: str, *headers: str, target: float | None = None) -> Case:
        requests = tuple(
            (make_request("POST", "/v1/jobs", owner.token, make_body(owner), *headers),) for owner in owners
        )
        return Case(name, "pare", BARE_INSERT, 202, requests, target)

    fixed = ((make_request("GET", "/fixed"),),) * num_connections
    items = (tuple(make_request("GET", f"/items/{item_id}") for item_id in world.item_ids),) * num_connections
    inserts = tuple((make_request("POST", "/items", "", make_body(owner)),) for owner in owners)
    waiting = tuple(
        tuple(make_request("GET", f"/v1/jobs/{job_id}", owner.token) for job_id in owner.waiting_ids[::7][:100])
        for owner in owners
    )
    return [
        Case(CEILING, "nginx", "", 200, fixed),
        Case(BARE_READ, "bare", "", 200, items),
        Case("status, waiting", "pare", BARE_READ, 200, waiting, 0.7),
        ask("status, succeeded", "/v1/jobs/{done}", target=0.7),
        ask("list of 50", "/v1/jobs?limit=50"),
        ask("events", "/v1/jobs/{done}/events"),
        ask("download of 64 KiB", "/v1/artifacts/{artifact}"),
        Case(BARE_INSERT, "bare", "", 201, inserts),
        submit("submit", target=0.5),
        submit("submit, Idempotency-Key", f"Idempotency-Key: {FRESH.decode()}"),
    ]


def _names(owner: Owner) -> dict[str, str]:
    return {"done": owner.done_id, "artifact": owner.artifact_id}


def measure(world: World, clients: Executor, cases: Sequence[Case], num_rounds: int, seconds: float) -> dict[str, Rate]:
    """Let every case run for some seconds in each round, in turn; every other round goes backwards."""
    rates = {case.name: Rate(case) for case in cases}
    for number in range(num_rounds):
        for case in cases if number % 2 == 0 else reversed(cases):
            plan = Plan(world.ports[case.server], case.requests, case.status, seconds)
            rate = rates[case.name]
            before = world.read_processor_seconds(case.server), world.read_processor_seconds("dispatch")
            rate.outcomes.append(clients.submit(drive, plan).result())
            rate.processor_seconds += world.read_processor_seconds(case.server) - before[0]
            if case.status == 202:
                world.wait_until_relayed()
                rate.dispatcher_seconds += world.read_processor_seconds("dispatch") - before[1]
                world.forget_submitted()
    return rates


def describe_ratio(ratios: Sequence[float]) -> str:
    """Return the median of the rounds and how far they lie apart."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def print_rates(rates: dict[str, Rate]) -> None:
    """Print the table."""
    print("| request | per second | ratio to bare (of rounds: median, least-most) | target | processor ms |", end="")
    print(" p50 ms | p95 ms | p99 ms |\n|---|---|---|---|---|---|---|---|")
    for name, rate in rates.items():
        ratio = target = ""
        if rate.case.versus:
            ratios = rate.ratios(rates[rate.case.versus])
            ratio = describe_ratio(ratios)
            if rate.case.target is not None:
                met = "met" if statistics.median(ratios) >= rate.case.target else "MISSED"
                target = f"{rate.case.target} {met}"
        processor = f"{rate.processor_milliseconds(rate.processor_seconds):.2f}"
        if rate.dispatcher_seconds:
            processor += f" + {rate.processor_milliseconds(rate.dispatcher_seconds):.2f}"
        times = " | ".join(f"{rate.quantile(share):.1f}" for share in (0.5, 0.95, 0.99))
        print(f"| {name} | {rate.per_second:.0f} | {ratio} | {target} | {processor} | {times} |", flush=True)
