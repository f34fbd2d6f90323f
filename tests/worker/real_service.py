"""The API in process, and a worker with the real engine in its sandbox that runs whatever waits."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import select
from starlette.testclient import TestClient

from app.db.session import Database
from app.db.tables import JobRow
from app.jobs import State, advance_parents
from app.main import create_app
from app.settings import Settings
from app.storage import open_storage
from worker.settings import WorkerSettings
from worker.slot import Slot, open_slot

MOST_ROUNDS = 40


@dataclass
class RealService:
    """What a user sees, and the hands that work."""

    client: TestClient
    _settings: Settings
    _database: Database
    _slot: Slot

    def upload(self, path: str, file: Path) -> str:
        """Upload a file, let it be checked, and return its id; it must be ready then."""
        answer = self.client.post(path, content=file.read_bytes())
        assert answer.status_code == 201, answer.text
        self.work()
        noun = path.partition("?")[0]
        shown = self.client.get(f"{noun}/{answer.json()['id']}").json()
        assert shown["state"] == "ready", shown["error"]
        found: str = shown["id"]
        return found

    def optimize(self, model: str, recipe: dict[str, Any]) -> dict[str, Any]:
        """Submit a job, let it run, and return it; it must have succeeded."""
        answer = self.client.post("/v1/jobs", json={"model_id": model, "recipe": recipe})
        assert answer.status_code == 202, answer.text
        self.work()
        job: dict[str, Any] = self.client.get(f"/v1/jobs/{answer.json()['id']}").json()
        assert job["status"] == "succeeded", job["error"]
        return job

    def metrics(self, job: dict[str, Any]) -> dict[str, Any]:
        """Return a job's numbers."""
        found: dict[str, Any] = self.client.get(f"/v1/jobs/{job['id']}/metrics").json()
        return found

    def artifacts(self, job: dict[str, Any]) -> dict[str, bytes]:
        """Return a job's files by name."""
        items = self.client.get(f"/v1/jobs/{job['id']}/artifacts").json()["items"]
        return {each["name"]: self.client.get(each["links"]["self"]).content for each in items}

    def work(self) -> None:
        """Run waiting jobs as a worker, and let parents go on as the dispatcher would, until nothing is left."""
        storage = open_storage(self._settings.storage_url)
        for _ in range(MOST_ROUNDS):
            with self._database.read() as session:
                waiting = list(session.scalars(select(JobRow.id).where(JobRow.state == State.QUEUED)))
            for job_id in waiting:
                self._slot.supervisor.run(job_id)
            if not advance_parents(self._database, self._settings, storage) and not waiting:
                return
        raise AssertionError("the work never ends")


@contextmanager
def real_service(data_dir: Path, database_url: str) -> Iterator[RealService]:
    """Within it, everything is up but the broker."""
    settings = Settings(data_dir=data_dir, database_url=database_url, engine_threads=1)
    database, slot = Database(database_url), open_slot(settings, WorkerSettings())
    try:
        with TestClient(create_app(settings)) as client:
            yield RealService(client, settings, database, slot)
    finally:
        slot.close()
        database.dispose()
