"""`make chaos`: random faults over a few hundred tiny jobs, and the invariants at the end.

    python -m tests.faults.chaos --seed 7 --minutes 5 --database postgresql

The seed decides which jobs there are and what is done to the service, in which order; the machine decides how fast.
"""

import argparse
import os
import random
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import httpx2
from sqlalchemy import select

from app.db.session import Database
from app.db.tables import JobRow
from app.errors import PareError
from app.jobs import cancel_job
from app.jobs.lifecycle import TERMINAL
from tests.faults.monkey import Monkey
from tests.faults.stack import Stack, open_stack
from tests.postgres import PostgresServer

OWNERS = ("ann", "bob", "local")
"""The API knows the last; the jobs of the others are queued as it queues them."""
QUIET_SECONDS = 120.0
"""For everything that is left to do once nothing is broken any more."""
STORE_BYTES = 48 * 2**20

JOBS: tuple[tuple[str, list[list[object]]], ...] = (
    ("quick", [["finish"]]),
    ("slow", [["count", 5, 0.2], ["finish"]]),
    ("long", [["count", 20, 0.3], ["finish"]]),
    ("resumes", [["unless_resumed", [["checkpoint", "half"], ["sleep", 1.5], ["kill_self", 9]]], ["finish"]]),
    ("resists", [["ignore_sigterm"], ["leave_grandchild"], ["count", 5, 0.3], ["finish"]]),
    ("fails", [["exit", 3]]),
    ("lies", [["artifact", "x", "model.onnx", {"sha256": "0" * 64}]]),
    ("large", [["write_bytes", "out/scratch", 4 * 2**20], ["finish"]]),
)


class User(threading.Thread):
    """Submits jobs and cancels some, patiently: a request that was not answered is sent again with its key."""

    def __init__(self, stack: Stack, seed: int) -> None:
        super().__init__(name="user", daemon=True)
        self._stack = stack
        self._random = random.Random(seed)
        self._models = {name: {owner: stack.add_model(*acts, owner=owner) for owner in OWNERS} for name, acts in JOBS}
        self.ended = threading.Event()
        self.counts: Counter[str] = Counter()

    def run(self) -> None:
        """Go on until told to end."""
        while not self.ended.wait(self._random.uniform(0.02, 0.3)):
            name, acts = self._random.choice(JOBS)
            owner = self._random.choice(OWNERS)
            job_id = self._submit(name, owner) if owner == "local" else self._queue(acts, owner)
            if job_id is not None:
                self.counts[f"submitted: {name}"] += 1
                if self._random.random() < 0.15:
                    self.ended.wait(self._random.uniform(0, 1.5))
                    self._cancel(job_id, owner)

    def _submit(self, name: str, owner: str) -> str | None:
        key = secrets.token_hex(8)
        while not self.ended.is_set():
            try:
                answer = self._stack.post_job(self._models[name][owner], key=key)
            except httpx2.TransportError:
                self.counts["requests without an answer"] += 1
                time.sleep(0.3)
                continue
            if answer.is_success:
                return str(answer.json()["id"])
            self.counts[f"answers {answer.status_code}"] += 1
            time.sleep(0.3)
        return None

    def _queue(self, acts: list[list[object]], owner: str) -> str | None:
        try:
            return self._stack.queue(*acts, owner=owner)
        except PareError:
            self.counts["submissions that failed"] += 1
            return None

    def _cancel(self, job_id: str, owner: str) -> None:
        try:
            if owner == "local":
                done = self._stack.cancel(job_id).is_success
            else:
                with self._stack.bench.database.session() as session:
                    cancel_job(session, owner, job_id)
                done = True
                self._stack.history.cancelled.add(job_id)
        except (httpx2.TransportError, PareError):
            done = False
        self.counts["cancels accepted" if done else "cancels refused or lost"] += 1


def run(seed: int, seconds: float, database: str, directory: Path, *, tiny_disk: bool) -> int:
    """Break things for a while, heal them, ask the oracle; return the number of violations."""
    with ExitStack() as undo:
        server: PostgresServer | None = None
        url = f"sqlite:///{directory / 'pare.sqlite3'}"
        if database == "postgresql":
            home = Path(tempfile.mkdtemp(prefix="pare-postgres-"))
            undo.callback(shutil.rmtree, home)
            server = PostgresServer(home, durable=True)
            undo.callback(server.stop)
            url = server.create_database(migrated=True)
        else:
            made = Database(url)
            made.upgrade()
            made.dispose()
        if tiny_disk:
            (directory / "store").mkdir()
            mount = ["mount", "-t", "tmpfs", "-o", f"size={STORE_BYTES}", "tmpfs", str(directory / "store")]
            subprocess.run(mount, check=True)
            undo.callback(subprocess.run, ["umount", "--lazy", str(directory / "store")], check=True)
        with open_stack(directory, url, postgres=server, cancel_grace_seconds=0.5) as stack:
            return _run(stack, seed, seconds, tiny_disk)


def _run(stack: Stack, seed: int, seconds: float, tiny_disk: bool) -> int:
    monkey = Monkey(stack, random.Random(seed), tiny_disk=tiny_disk)
    monkey.start_all()
    user = User(stack, seed + 1)
    user.start()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        monkey.act()
    user.ended.set()
    user.join(60)
    healed_at = time.monotonic()
    monkey.heal()
    while _count_open(stack) and time.monotonic() < healed_at + QUIET_SECONDS:
        monkey.revive()
        time.sleep(0.2)
    quiet_after = time.monotonic() - healed_at
    _print_table(stack, monkey, user, quiet_after)
    try:
        stack.check()
    except AssertionError as error:
        violations = str(error).splitlines()
        print(f"\n{len(violations)} violations:", *violations, sep="\n")
        return len(violations)
    print("\nEvery invariant holds.")
    return 0


def _count_open(stack: Stack) -> int:
    with stack.bench.database.read() as session:
        return len(session.scalars(select(JobRow.id).where(JobRow.state.not_in(TERMINAL))).all())


def _print_table(stack: Stack, monkey: Monkey, user: User, quiet_after: float) -> None:
    with stack.bench.database.read() as session:
        jobs = list(session.scalars(select(JobRow)))
    states = Counter(f"jobs {job.state}" for job in jobs)
    errors = Counter(f"failed with {job.error['code']}" for job in jobs if job.error)
    attempts = Counter(f"jobs of {job.attempt} attempts" for job in jobs)
    rows = [*monkey.counts.items(), *user.counts.items(), *states.items(), *errors.items(), *attempts.items()]
    rows.append(("answers of the API", len(stack.history.answers)))
    print("\n| what | how often |\n|---|---|")
    for name, number in sorted(rows):
        print(f"| {name} | {number} |")
    print(f"\nEvery job was over {quiet_after:.1f} s after the last fault was healed.")


def main() -> None:
    """Read the options; the exit status is 1 where an invariant does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="postgresql")
    parser.add_argument("--keep", action="store_true", help="leave the directory with its logs")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="pare-chaos-"))
    tiny_disk = os.geteuid() == 0
    print(f"seed {options.seed}, {options.minutes:g} minutes, {options.database}, in {directory}", flush=True)
    try:
        num_violations = run(options.seed, options.minutes * 60, options.database, directory, tiny_disk=tiny_disk)
    finally:
        if not options.keep:
            shutil.rmtree(directory, ignore_errors=True)
    sys.exit(1 if num_violations else 0)


if __name__ == "__main__":
    main()
