"""Status, submission and claim with few and with many waiting jobs."""

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

from sqlalchemy import text

from app.jobs import Capacity, Claim, claim_next, release
from benchmarks.load.rates import BARE_INSERT, BARE_READ, describe_ratio, make_cases, measure
from benchmarks.load.world import World

CASES = (BARE_READ, "status, waiting", BARE_INSERT, "submit")
CAPACITY = Capacity(("cpu",), memory_bytes=2**33, num_threads=4)
NUM_CLAIMS = 60


def measure_depths(
    world: World, clients: Executor, depths: Sequence[int], num_connections: int, num_rounds: int, seconds: float
) -> None:
    """Let ever more jobs wait, measure, and print."""
    print("| waiting jobs | status: ratio to bare | submit: ratio to bare | claim: ratio to a bare update | claim ms |")
    print("|---|---|---|---|---|")
    first: list[float] = []
    for depth in depths:
        world.queue_until(depth)
        cases = [case for case in make_cases(world, num_connections) if case.name in CASES]
        rates = measure(world, clients, cases, num_rounds, seconds)
        status = rates["status, waiting"].ratios(rates[BARE_READ])
        submit = rates["submit"].ratios(rates[BARE_INSERT])
        claims, ratios = time_claims(world)
        print(
            f"| {depth} | {describe_ratio(status)} | {describe_ratio(submit)} | {describe_ratio(ratios)} "
            f"| {statistics.median(claims):.1f} |",
            flush=True,
        )
        medians = [statistics.median(each) for each in (status, submit)]
        medians.append(1 / statistics.median(ratios))
        first = first or medians
        if medians is not first:
            kept = [now / before for now, before in zip(medians, first, strict=True)]
            print(f"| what is left | {' | '.join(f'{each:.2f}' for each in kept)} | |", flush=True)


def time_claims(world: World) -> tuple[list[float], list[float]]:
    """Claim jobs and update a row of the bare table in turn; return the claims' milliseconds, and their ratios."""
    claims: list[float] = []
    ratios: list[float] = []
    held: list[Claim] = []

    def claim() -> None:
        with world.database.session() as session:
            taken = claim_next(session, CAPACITY, "benchmark", 3600)
        assert taken is not None
        held.append(taken)

    def update() -> None:
        with world.database.session() as session:
            session.execute(text("UPDATE bare_items SET model_id = 'x' WHERE id = :id"), {"id": world.item_ids[0]})

    for _ in range(5):
        claim()
    for _ in range(NUM_CLAIMS // 5):
        taken, compared = ([_time(act) for _ in range(5)] for act in (claim, update))
        claims += taken
        ratios.append(statistics.median(taken) / statistics.median(compared))
    for each in held:  # they wait again
        with world.database.session() as session:
            assert release(session, each, "benchmark")
    return claims, ratios


def _time(act: Callable[[], None]) -> float:
    started = time.perf_counter()
    act()
    return (time.perf_counter() - started) * 1000
