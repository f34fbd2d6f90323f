"""What a claim costs with few and with many waiting jobs, and whether processes that race ever take the same job.

    python benchmarks/claim.py [--queued 100 10000] [--claims 40] [--owners 10] [--racing-jobs 1000] [--processes 8]

Processor time is that of the claiming process: with SQLite it holds the whole work of the database.
SQLite on this machine's disk and PostgreSQL (the server of the tests, with fsync switched off). The waiting jobs have
different priorities; half need more memory than the worker has.
"""

import argparse
import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

from sqlalchemy import insert, select, text

from app.db.clock import db_now
from app.db.session import Database
from app.db.tables import JobRow
from app.errors import Unavailable
from app.ids import new_id
from app.jobs import Capacity, claim_next
from app.jobs.places import read_places
from tests.postgres import PostgresServer

CAPACITY = Capacity(("cpu",), memory_bytes=2**33, num_threads=4)
LEASE_SECONDS = 3600.0


@contextmanager
def open_databases() -> Iterator[dict[str, str]]:
    """Yield the URLs of an empty, migrated database of each kind."""
    place = Path(tempfile.mkdtemp(prefix="pare-claim-"))
    servers = Path(tempfile.mkdtemp(prefix="pare-claim-postgres-"))
    server = PostgresServer(servers)
    try:
        url = f"sqlite:///{place / 'claim.sqlite3'}"
        Database(url).upgrade()
        yield {"SQLite": url, "PostgreSQL": server.create_database(migrated=True)}
    finally:
        server.stop()
        shutil.rmtree(place)
        shutil.rmtree(servers)


def fill(database: Database, num_jobs: int, num_owners: int, *, every_one_fits: bool = False) -> None:
    """Let so many jobs wait, and no others."""
    rows = [
        {
            "id": new_id("job"), "owner": f"owner{number % num_owners}", "action": "optimize", "labels": {},
            "priority": number % 3, "deadline_seconds": 60, "state": "queued", "attempt": 0, "max_attempts": 3,
            "epoch": 0, "progress": {}, "isolation": [], "last_seq": 1, "needs_device": "cpu",
            "needs_memory_bytes": 0 if every_one_fits or number % 2 else 2**34,
        }
        for number in range(num_jobs)
    ]  # fmt: skip
    with database.session() as session:
        session.execute(text("DELETE FROM jobs"))
        session.execute(insert(JobRow).values(created_at=db_now()), rows)
    with database.session() as session:
        session.execute(text("ANALYZE"))


def time_claims(database: Database, num_claims: int) -> tuple[list[float], list[float]]:
    """Claim one job after the other; return the time each took and the processor time of it here, in milliseconds."""
    taken, computed = [], []
    for _ in range(num_claims):
        started_at, computed_before = time.perf_counter(), time.process_time()
        with database.session() as session:
            assert claim_next(session, CAPACITY, "benchmark", LEASE_SECONDS) is not None
        taken.append((time.perf_counter() - started_at) * 1000)
        computed.append((time.process_time() - computed_before) * 1000)
    return taken, computed


def time_position(database: Database) -> float:
    """Return the processor time here for reading the queue and the last job's place, in ms; the median of 20."""
    taken = []
    with database.read() as session:
        last = session.scalars(
            select(JobRow).where(JobRow.state == "queued").order_by(JobRow.priority, JobRow.id.desc()).limit(1)
        ).one()
        for _ in range(20):
            started_at = time.process_time()
            read_places(session).count_ahead("cpu", last.priority, last.owner, last.id)
            taken.append((time.process_time() - started_at) * 1000)
    return statistics.median(taken)


def claim_all(url: str, worker_id: str, barrier: Barrier, results: "Queue[list[str]]") -> None:
    """Claim until nothing is left."""
    database = Database(url)
    won: list[str] = []
    barrier.wait(300)
    while True:
        try:
            with database.session() as session:
                claim = claim_next(session, CAPACITY, worker_id, LEASE_SECONDS)
        except Unavailable:
            continue
        if claim is None:
            break
        won.append(claim.job_id)
    database.dispose()
    results.put(won)


def race(url: str, num_processes: int) -> tuple[Counter[str], float]:
    """Return how often each job was claimed by processes that all claim at once, and the seconds it took."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(num_processes + 1), context.Queue()
    processes = [
        context.Process(target=claim_all, args=(url, f"w{number}", barrier, results)) for number in range(num_processes)
    ]
    for process in processes:
        process.start()
    barrier.wait(300)
    started_at = time.perf_counter()
    won = [results.get() for _ in processes]
    seconds = time.perf_counter() - started_at
    for process in processes:
        process.join()
    return Counter(job_id for part in won for job_id in part), seconds


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--queued", type=int, nargs="+", default=[100, 10_000])
    parser.add_argument("--claims", type=int, default=40)
    parser.add_argument("--owners", type=int, default=10)
    parser.add_argument("--racing-jobs", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=8)
    options = parser.parse_args()
    with open_databases() as urls:
        print("| database | waiting | claim ms: median | fastest | processor | ratio of processor time | place, ms |")
        print("|---|---|---|---|---|---|---|")
        for name, url in urls.items():
            database, first = Database(url), 0.0
            for queued in options.queued:
                fill(database, queued, options.owners)
                position = time_position(database)
                time_claims(database, 3)  # connections, prepared statements
                taken, computed = time_claims(database, options.claims)
                median, processor = statistics.median(taken), statistics.median(computed)
                first = first or processor
                cells = [f"{number:.1f}" for number in (median, min(taken), processor)]
                cells += [f"{processor / first:.2f}", f"{position:.1f}"]
                print(f"| {name} | {queued} | {' | '.join(cells)} |")
            database.dispose()
        print(f"\n{options.processes} processes at once, {options.racing_jobs} jobs:\n")
        print("| database | claimed | claimed twice | seconds | claims per second |")
        print("|---|---|---|---|---|")
        for name, url in urls.items():
            database = Database(url)
            fill(database, options.racing_jobs, options.owners, every_one_fits=True)
            times, seconds = race(url, options.processes)
            twice = sum(number > 1 for number in times.values())
            rate = len(times) / seconds
            print(f"| {name} | {len(times)} | {twice} | {seconds:.1f} | {rate:.0f} |")
            database.dispose()


if __name__ == "__main__":
    main()
