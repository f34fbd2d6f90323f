"""Fixtures for worker tests: jobs whose model is a script of faults, and workers that run them for real."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import pytest
import redis
from celery import Celery

from app.db.clock import db_now
from app.db.session import Database
from app.db.tables import JobRow, ModelRow
from app.ids import new_id
from app.jobs import JobNeeds, list_workers
from app.jobs.checks import queue_job
from app.settings import Settings
from app.storage import Storage, open_storage, owner_storage
from worker.broker import EmbeddedBroker
from worker.children import Child
from worker.sandbox.detect import detect
from worker.settings import WorkerSettings
from worker.slot import Slot, open_slot

Start = Callable[..., Child]
"""Starts a process of the service."""

ENGINES = Path(__file__).parent / "engines"
TERMINAL = ("succeeded", "failed", "cancelled")
RECIPE = {"steps": [{"kind": "prune_magnitude", "sparsity": 0.5}]}


def find_processes(marker: str) -> list[int]:
    """Return the processes, zombies aside, whose command line holds the marker."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if marker.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


def find_descendants(pid: int, marker: str) -> list[int]:
    """Return the living processes below one whose command line holds the marker."""
    parents: dict[int, int] = {}
    marked: set[int] = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                words = (entry / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if fields[0] != "Z" and words:
                parents[int(entry.name)] = int(fields[1])
                marked |= {int(entry.name)} if marker.encode() in words else set()
    found, below = set[int](), {pid}
    while below:
        below = {each for each, parent in parents.items() if parent in below}
        found |= below
    return sorted(found & marked)


def wait_until(condition: Callable[[], object], timeout_seconds: float = 90, what: str = "the condition") -> None:
    """Wait for a condition; fail after a generous time."""
    end = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not come true within {timeout_seconds} seconds"
        time.sleep(0.02)


@dataclass(frozen=True)
class Bench:
    """A database, a store and the settings of a worker whose engine acts out faults."""

    database: Database
    storage: Storage
    settings: Settings
    worker: WorkerSettings
    marker: str

    def queue(
        self,
        *acts: list[object],
        action: str = "optimize",
        deadline_seconds: int = 60,
        attempts: int = 3,
        owner: str = "local",
        priority: int = 0,
        needs: JobNeeds | None = None,
        recipe: dict[str, object] | None = None,
    ) -> str:
        """Queue a job whose engine does these acts; return its id."""
        with owner_storage(self.storage, owner).writer() as writer:
            writer.write(json.dumps(acts).encode())
            blob = writer.commit()
        with self.database.session() as session:
            model = ModelRow(
                id=new_id("mdl"), owner=owner, name="script", format="pt2", size_bytes=blob.size_bytes,
                state="checking" if action == "check_model" else "ready", sha256=blob.sha256, created_at=db_now(),
            )  # fmt: skip
            session.add(model)
            session.flush()
            return queue_job(
                session, owner=owner, action=action, model_id=model.id, priority=priority,
                recipe=recipe or RECIPE if action == "optimize" else None,
                deadline_seconds=deadline_seconds, max_attempts=attempts, needs=needs,
            ).id  # fmt: skip

    def read(self, job_id: str) -> JobRow:
        """Return the job as it is now."""
        with self.database.read() as session:
            job = session.get(JobRow, job_id)
            assert job is not None
            return job

    def age(self, job_id: str) -> float:
        """Return how many seconds ago the job's last hint was sent."""
        sent = self.read(job_id).published_at
        return 0.0 if sent is None else (datetime.now(UTC) - sent).total_seconds()

    def wait(self, job_id: str, *states: str, timeout_seconds: float = 90) -> JobRow:
        """Wait until the job is in one of these states, or over."""
        wanted = states or TERMINAL
        wait_until(lambda: self.read(job_id).state in wanted, timeout_seconds, f"job in {wanted}")
        return self.read(job_id)

    def processes(self) -> list[int]:
        """Return the processes of all engines of this bench, standby included."""
        return find_processes(self.marker)

    def environment(self, **more: str) -> dict[str, str]:
        """Return the environment that gives another process the same settings."""
        named = {
            **{f"PARE_{name}".upper(): value for name, value in self.settings.model_dump(mode="json").items()},
            **{f"PARE_WORKER_{name}".upper(): value for name, value in self.worker.model_dump(mode="json").items()},
        }
        texts = {
            name: value if isinstance(value, str) else json.dumps(value)
            for name, value in named.items()
            if value is not None
        }
        return {**os.environ, **texts, **more}


@pytest.fixture
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    """SQLite, unless the test asks for another kind of database by parametrizing `bench` indirectly.

    Leases are long enough for a machine that is busy with something else, unless the test is marked `short_leases`.
    """
    kind = getattr(request, "param", "sqlite")
    url: str = request.getfixturevalue("sqlite_url" if kind == "sqlite" else "postgres_url")
    settings = Settings(
        data_dir=tmp_path, database_url=url,
        lease_seconds=5 if request.node.get_closest_marker("short_leases") else 30, heartbeat_seconds=0.5,
        cancel_grace_seconds=0.7, reap_interval_seconds=0.2, sweep_after_seconds=1, relay_interval_seconds=0.05,
        max_log_bytes=200_000, engine_memory_bytes=2**30, max_artifact_bytes=32 * 2**20, worker_seen_seconds=4,
        wake_interval_seconds=0.3,
    )  # fmt: skip
    marker = f"pare-test-{uuid4().hex}"
    worker = WorkerSettings(
        engine_command=(sys.executable, "-S", str(ENGINES / "scripted.py"), "{job}", marker),
        engine_code=(ENGINES,), cancel_poll_seconds=0.1, progress_interval_seconds=0.05, stop_seconds=1,
        min_disk_bytes=2**20,
    )  # fmt: skip
    database = Database(url)
    yield Bench(database, open_storage(settings.storage_url), settings, worker, marker)
    database.dispose()
    wait_until(lambda: not find_processes(marker), 60, "the end of every engine process")
    left = [path for path in (tmp_path / "work").glob("*/*") if path.name != "lock"]
    assert left == [], f"directories left behind: {left}"


@pytest.fixture
def open_slots() -> Iterator[Callable[..., Slot]]:
    """Open worker slots in this process; they are closed at the end of the test."""
    slots: list[Slot] = []

    def open_one(bench: Bench, isolation: str = "auto", **worker: object) -> Slot:
        if isolation not in ("auto", "none") and detect(isolation).method != isolation:
            pytest.skip(f"{isolation} does not work on this machine: {detect(isolation).problems}")
        settings = bench.settings.model_copy(update={"isolation": isolation})
        slot = open_slot(settings, bench.worker.model_copy(update=worker))
        slots.append(slot)
        return slot

    yield open_one
    for slot in slots:
        slot.close()


@pytest.fixture
def slot(bench: Bench, open_slots: Callable[..., Slot]) -> Slot:
    """One worker slot in this process."""
    return open_slots(bench)


class Broker:
    """A Valkey server of one test."""

    def __init__(self, directory: Path) -> None:
        self.embedded = EmbeddedBroker(directory)
        self.child = Child("broker", self.embedded.command(), dict(os.environ), directory / "log", 5)
        self.start()

    def start(self) -> None:
        self.embedded.socket.unlink(missing_ok=True)
        self.child.start()
        wait_until(self.embedded.is_ready, what="the broker")

    def client(self) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self.embedded.socket))

    def send(self, *arguments: object, name: str = "pare.run_job") -> None:
        with Celery("test", broker=self.embedded.url, set_as_current=False) as app:
            app.send_task(name, args=arguments, queue="pare.cpu", ignore_result=True)


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    broker = Broker(tmp_path / "broker")
    yield broker
    broker.child.stop(lambda: False)
    broker.embedded.close()


@pytest.fixture
def start(bench: Bench, broker: Broker, tmp_path: Path) -> Iterator[Start]:
    """Start `python -m worker` or another module with the bench's settings; everything ends with the test."""
    started: list[Child] = []
    with ExitStack() as stack:

        def start_one(module: str = "worker", wait: bool = True, **settings: str) -> Child:
            environment = bench.environment(**{"PARE_BROKER_URL": broker.embedded.url, **settings})
            number = len(list(tmp_path.glob("*.log")))
            child = Child(module, [sys.executable, "-m", module], environment, tmp_path / f"{module}{number}.log", 30)
            workers = ids_of_workers(bench)
            child.start()
            started.append(child)
            stack.callback(child.stop, lambda: False)
            if module == "worker" and wait:
                wait_until(lambda: ids_of_workers(bench) - workers, what="the worker")
            return child

        yield start_one
        for child in started:
            if child.process is not None:
                child.process.terminate()  # all at once; each is waited for on the way out


def ids_of_workers(bench: Bench) -> set[str]:
    with bench.database.read() as session:
        return {worker.id for worker in list_workers(session, 60)}
