"""The whole service as real processes around one case: API, dispatcher, Celery workers, broker, database, sandboxes."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx2
from sqlalchemy import select

from app.db.clock import db_now
from app.db.session import Database
from app.db.tables import EventRow, JobRow, ModelRow
from app.files.collect import collect, find_unnamed
from app.ids import new_id
from app.settings import Settings
from app.storage import open_storage, owner_storage
from benchmarks.upload_memory import find_free_port
from tests.app.jobs.world import model_facts
from tests.faults.oracle import Answer, History, find_violations
from tests.faults.points import mark_of, release_of
from tests.postgres import PostgresServer
from tests.worker.conftest import ENGINES, RECIPE, TERMINAL, Bench, Broker, find_processes, ids_of_workers
from worker.children import Child
from worker.settings import WorkerSettings
from worker.workspace import Workspace

PATIENCE_SECONDS = 90.0
"""How long a case waits for what must come; generous, for it is only waited for in vain when something is wrong."""


def settings_of(directory: Path, database_url: str, **changes: object) -> Settings:
    """Return settings whose times are about a tenth of the real ones, so that a case takes seconds."""
    given: dict[str, object] = {
        "data_dir": directory, "database_url": database_url, "lease_seconds": 4, "heartbeat_seconds": 0.5,
        "cancel_grace_seconds": 0.7, "reap_interval_seconds": 0.2, "sweep_after_seconds": 2,
        "relay_interval_seconds": 0.05, "wake_interval_seconds": 0.5, "worker_seen_seconds": 4,
        "max_log_bytes": 200_000, "engine_memory_bytes": 2**30, "max_artifact_bytes": 32 * 2**20,
        "storage_reserve_bytes": 2**20, "collect_interval_seconds": 1, "collect_grace_seconds": 5,
    }  # fmt: skip
    return Settings(**given | changes)  # type: ignore[arg-type]


@dataclass
class Stack:
    """One service, one case."""

    bench: Bench
    broker: Broker
    directory: Path
    patience: float = PATIENCE_SECONDS
    without: tuple[str, ...] = ()
    """Defences that are taken out of every process."""
    secrets: tuple[str, ...] = ()
    """What no log and no answer may tell."""
    history: History = field(default_factory=History)
    children: list[Child] = field(default_factory=list)
    broker_url: str = ""
    """Where processes find the broker, if not at its own door."""
    postgres: PostgresServer | None = None
    _client: httpx2.Client | None = None

    # Processes

    def start(
        self,
        module: str = "worker",
        *,
        fault: str = "",
        under: str = "",
        wait: bool = True,
        prefix: Sequence[str] = (),
        **environment: str,
    ) -> Child:
        """Start a process of the service, with a fault `point:action` in it, under a condition, or through a prefix."""
        broker_url = self.broker_url or self.broker.embedded.url
        bent = {"FAULT": fault, "UNDER": under, "WITHOUT": ",".join(self.without), "PARE_BROKER_URL": broker_url}
        settings = self.bench.environment(**bent, **environment)
        log = self.directory / "logs" / f"{module}{len(self.children)}.log"
        command = [*prefix, sys.executable, "-m", "tests.faults.process", module]
        child = Child(module, command, settings, log, 30)
        log.parent.mkdir(exist_ok=True)
        known = ids_of_workers(self.bench) if module == "worker" else set()
        child.start()
        self.children.append(child)
        if wait and module == "worker":
            self._wait_for_start(child, lambda: bool(ids_of_workers(self.bench) - known))
        if wait and module == "worker.dispatch":
            self._wait_for_start(child, lambda: "dispatching" in child.tail(4000))
        return child

    def _wait_for_start(self, child: Child, has_started: Callable[[], bool]) -> None:
        def is_over() -> bool:
            return has_started() or child.process is None or child.process.poll() is not None

        self.wait_until(is_over, f"the start of {child.name}")
        assert has_started(), f"{child.name} ended at its start: {child.tail()}"

    def start_api(self, *, fault: str = "", **environment: str) -> Child:
        """Start the API; `client` speaks with it from now on."""
        port = find_free_port()
        child = self.start("app", fault=fault, wait=False, PARE_PORT=str(port), **environment)
        self.close_client()
        hooks = {"response": [self._note]}
        self._client = httpx2.Client(
            base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False, event_hooks=hooks
        )
        self._wait_for_start(child, self._is_live)
        return child

    @property
    def client(self) -> httpx2.Client:
        """Speaks with the API; what it is answered is kept for the oracle."""
        assert self._client is not None, "start_api comes first"
        return self._client

    def close_client(self) -> None:
        if self._client is not None:
            self._client.close()

    def _is_live(self) -> bool:
        try:
            return self.client.get("/health/live").status_code == 200
        except httpx2.TransportError:
            return False

    def _note(self, response: httpx2.Response) -> None:
        response.read()
        media_type = response.headers.get("content-type", "").partition(";")[0]
        told = Answer(
            response.request.method, response.request.url.path, response.status_code, media_type, response.content
        )
        self.history.answers.append(told)

    def stop_all(self) -> None:
        """Stop every process of the service; the broker and the database go on."""
        self.close_client()
        for child in self.children:
            if child.process is not None:
                with suppress(ProcessLookupError):
                    os.kill(child.process.pid, signal.SIGCONT)
                    child.process.terminate()
        for child in self.children:
            child.stop(lambda: False)

    # What users do

    def add_model(self, *acts: list[object], owner: str = "local") -> str:
        """Store a "model" whose engine does these acts; return its id."""
        with owner_storage(self.bench.storage, owner).writer() as writer:
            writer.write(json.dumps(acts).encode())
            blob = writer.commit()
        row = ModelRow(
            id=new_id("mdl"), owner=owner, name="script", format="pt2", state="ready", sha256=blob.sha256,
            size_bytes=blob.size_bytes, facts=model_facts().model_dump(mode="json"), created_at=db_now(),
        )  # fmt: skip
        with self.bench.database.session() as session:
            session.add(row)
        return str(row.id)

    def post_job(self, model_id: str, key: str | None = None, **fields: Any) -> httpx2.Response:
        """Submit a job over HTTP."""
        headers = {"Idempotency-Key": key} if key else {}
        body = {"model_id": model_id, "recipe": RECIPE, **fields}
        answer = self.client.post("/v1/jobs", json=body, headers=headers)
        if answer.is_success:
            self.history.accepted.add(answer.json()["id"])
        return answer

    def submit(self, *acts: list[object], **fields: Any) -> str:
        """Submit a job over HTTP whose engine does these acts; return its id."""
        answer = self.post_job(self.add_model(*acts), **fields)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def queue(self, *acts: list[object], **options: object) -> str:
        """Queue a job without the API."""
        job_id = self.bench.queue(*acts, **options)  # type: ignore[arg-type]
        self.history.accepted.add(job_id)
        return job_id

    def cancel(self, job_id: str) -> httpx2.Response:
        """Cancel over HTTP."""
        answer = self.client.post(f"/v1/jobs/{job_id}/cancel")
        if answer.is_success:
            self.history.cancelled.add(job_id)
        return answer

    # What can be seen

    def wait_until(self, condition: Callable[[], object], what: str = "the condition", seconds: float = 0) -> None:
        """Wait for a condition; fail when it does not come."""
        seconds = min(seconds or self.patience, self.patience)
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
            time.sleep(0.02)

    def read(self, job_id: str) -> JobRow:
        return self.bench.read(job_id)

    def wait(self, job_id: str, *states: str, seconds: float = 0) -> JobRow:
        """Wait until the job is in one of these states, or over."""
        wanted = states or TERMINAL
        self.wait_until(lambda: self.read(job_id).state in wanted, f"{job_id} in {wanted}", seconds)
        return self.read(job_id)

    def wait_for_stage(self, job_id: str, stage: str) -> None:
        self.wait_until(lambda: self.read(job_id).stage == stage, f"{job_id} at stage {stage}")

    def states(self, job_id: str) -> list[str]:
        """Return the states the job went through."""
        with self.bench.database.read() as session:
            query = select(EventRow.data).where(EventRow.job_id == job_id, EventRow.kind == "state")
            return [data["state"] for data in session.scalars(query.order_by(EventRow.seq))]

    def count_runs(self, job_id: str) -> int:
        return self.states(job_id).count("running")

    def wait_for_fault(self, point: str) -> None:
        """Wait until a process has come to the point."""
        self.wait_until(mark_of(self.directory, point).exists, f"the fault {point}")

    def release_fault(self, point: str) -> None:
        """Let a process go on that is held at the point."""
        release_of(self.directory, point).touch()

    def processes(self) -> list[str]:
        """Return the command lines of all processes that belong to this service, whoever is their parent."""
        own = {os.getpid(), self.broker.child.process.pid if self.broker.child.process else 0}
        texts = (self.bench.marker.encode(), f"PARE_DATA_DIR={self.directory}\0".encode())
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) in own:
                continue
            with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                line = (entry / "cmdline").read_bytes()
                if any(text in line + (entry / "environ").read_bytes() for text in texts):
                    found.append(line.replace(b"\0", b" ").decode(errors="replace")[:200])
        return found

    # The end

    def settle(self) -> None:
        """Give every job the time to end; who does not, the oracle tells."""
        with suppress(AssertionError):
            self.wait_until(self._is_at_rest, seconds=30)

    def _is_at_rest(self) -> bool:
        with self.bench.database.read() as session:
            return not session.scalar(select(JobRow.id).where(JobRow.state.not_in(TERMINAL)).limit(1))

    def check(self) -> None:
        """Let the service come to rest, stop it, and assert every invariant."""
        self.settle()
        self.stop_all()
        self.broker.child.stop(lambda: False)
        leftovers = self._find_leftovers()  # and then the oracle sees whether too much was taken away
        violations = find_violations(
            self.bench.database, self.bench.storage, self.history, secrets=self.secrets,
            logs=sorted((self.directory / "logs").glob("*.log")),
        )  # fmt: skip
        with suppress(AssertionError):
            self.wait_until(lambda: not self.processes(), seconds=5)
        violations += [f"I5: left behind: {line}" for line in self.processes()]
        violations += leftovers
        assert violations == [], "\n".join(violations)

    def _find_leftovers(self) -> list[str]:
        """Return files that the next start would not have taken away."""
        Workspace(self.directory / "work", "next").remove()
        self.bench.storage.remove_abandoned(0)
        collect(self.bench.database, self.bench.storage, 0)
        left = [path for path in (self.directory / "work").glob("*/*") if path.name != "lock"]
        left += list((self.directory / "store" / "incoming").iterdir())
        for name in self.bench.storage.sections():
            section = self.bench.storage.section(name)
            left += [Path(name) / blob.sha256 for blob in find_unnamed(self.bench.database, section, 0)]
        return [f"I9: left behind: {path}" for path in left]


@contextmanager
def open_stack(
    directory: Path, database_url: str, *, patience: float = PATIENCE_SECONDS, without: tuple[str, ...] = (),
    secrets: tuple[str, ...] = (), postgres: PostgresServer | None = None, real_engine: bool = False,
    **changes: object,
) -> Iterator[Stack]:  # fmt: skip
    """Give a service whose processes a case starts; whatever happens, all of them end with it."""
    settings = settings_of(directory, database_url, **changes)
    marker = f"pare-fault-{uuid4().hex}"
    program = ["-m", "worker.engine.run"] if real_engine else ["-S", str(ENGINES / "scripted.py")]
    worker = WorkerSettings(
        engine_command=(sys.executable, *program, "{job}", marker),
        engine_code=(ENGINES,), cancel_poll_seconds=0.1, progress_interval_seconds=0.05, stop_seconds=1,
    )  # fmt: skip
    database = Database(database_url)
    broker = Broker(directory / "broker")
    bench = Bench(database, open_storage(settings.storage_url), settings, worker, marker)
    stack = Stack(bench, broker, directory, patience, without, secrets, postgres=postgres)
    try:
        yield stack
    finally:
        stack.stop_all()
        if broker.child.process is not None:
            with suppress(ProcessLookupError):
                os.kill(broker.child.process.pid, signal.SIGCONT)
        broker.child.stop(lambda: False)
        broker.embedded.close()
        database.dispose()
        for process in find_processes(marker):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
