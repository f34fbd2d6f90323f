"""A small world for the job tests: a database with a ready model, and short ways to act in it."""

from datetime import datetime
from typing import Any

from sqlalchemy import select, text

from app import jobs
from app.db.clock import db_now
from app.db.session import Database
from app.db.tables import DatasetRow, EventRow, JobRow, ModelRow, OutboxRow
from app.ids import new_id
from app.jobs import Claim
from app.recipes.facts import (
    Capability,
    ColumnFacts,
    DatasetFacts,
    LayerFacts,
    ModelFacts,
    TensorFacts,
)
from app.recipes.plan import EngineError
from app.recipes.recipe import Recipe
from app.settings import Settings

OWNER = "local"
RECIPE = Recipe.model_validate({"steps": [{"kind": "prune_magnitude"}]})
CRASH = EngineError(code="engine_crashed", detail="exit code -11", fix="retry", retryable=True)
REFUSAL = EngineError(code="step_failed", detail="no", fix="change it", retryable=False)


def model_facts(**changes: Any) -> ModelFacts:
    facts: dict[str, Any] = {
        "inputs": [TensorFacts(name="x", dtype="float32", shape=("batch", 3, 8, 8))],
        "outputs": [TensorFacts(name="logits", dtype="float32", shape=("batch", 10))],
        "dynamic_batch": True,
        "batch_size": None,
        "exported_in": "eval",
        "parameters": 100,
        "buffers": 0,
        "parameter_bytes": 400,
        "macs": 1000,
        "uncounted_operators": [],
        "layers": [
            LayerFacts(name="conv", type="Conv2d", shape=(8, 3, 3, 3), parameters=216, macs=1),
            LayerFacts(name="head", type="Linear", shape=(10, 8), parameters=80, macs=1),
        ],
        "tied": [],
        "capabilities": [
            Capability(kind="prune_structured", applicable=True, layers=("conv",), missing=None),
            Capability(kind="prune_magnitude", applicable=True, layers=("conv", "head"), missing=None),
        ],
    }
    return ModelFacts(**facts | changes)


def dataset_facts(num_rows: int = 100, **columns: tuple[str, tuple[int, ...]]) -> DatasetFacts:
    columns = columns or {"image": ("uint8", (3, 8, 8)), "label": ("int64", ())}
    listed = [ColumnFacts(name=name, dtype=dtype, shape=shape) for name, (dtype, shape) in columns.items()]
    return DatasetFacts(num_rows=num_rows, columns=tuple(listed))


class World:
    """Acts in one database, each act in a transaction of its own."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self.database = database
        self.settings = settings
        self.model_id = self.add_model()

    def add_model(self, state: str = "ready", facts: ModelFacts | None = None, owner: str = OWNER) -> str:
        facts = facts or model_facts()
        return self._add(ModelRow, "mdl", "pt2", state, facts if state == "ready" else None, owner)

    def add_dataset(self, state: str = "ready", facts: DatasetFacts | None = None, owner: str = OWNER) -> str:
        facts = facts or dataset_facts()
        return self._add(DatasetRow, "dst", "npz", state, facts if state == "ready" else None, owner)

    def _add(self, table: Any, prefix: Any, format: str, state: str, facts: Any, owner: str) -> str:
        row = table(
            id=new_id(prefix),
            owner=owner,
            name="upload",
            format=format,
            state=state,
            size_bytes=10,
            sha256="ab" * 32,
            facts=facts.model_dump(mode="json") if facts else None,
            error={"code": "model_rejected", "detail": "bad magic", "fix": ""} if state == "rejected" else None,
            created_at=db_now(),
        )
        with self.database.session() as session:
            session.add(row)
        return str(row.id)

    def submit(self, recipe: Recipe = RECIPE, *, owner: str = OWNER, **changes: Any) -> str:
        request: dict[str, Any] = {
            "owner": owner,
            "model_id": self.model_id,
            "recipe": recipe,
            "labels": {},
            "priority": 0,
            "deadline_seconds": None,
        }
        with self.database.session() as session:
            return jobs.submit_job(session, self.settings, **request | changes).id

    def submit_many(self, num_jobs: int) -> list[str]:
        """Submit many jobs in one transaction."""
        with self.database.session() as session:
            return [
                jobs.submit_job(
                    session,
                    self.settings,
                    owner=OWNER,
                    model_id=self.model_id,
                    recipe=RECIPE,
                    labels={},
                    priority=0,
                    deadline_seconds=None,
                ).id
                for _ in range(num_jobs)
            ]

    def check(self, **upload: str) -> str:
        with self.database.session() as session:
            return jobs.queue_check(session, self.settings, owner=OWNER, **upload).id

    def claim(self, job_id: str, worker_id: str = "w1", lease_seconds: float = 30) -> Claim | None:
        with self.database.session() as session:
            return jobs.claim(session, job_id, worker_id, lease_seconds)

    def start(self, job_id: str | None = None, worker_id: str = "w1", lease_seconds: float = 30) -> Claim:
        claim = self.claim(job_id or self.submit(), worker_id, lease_seconds)
        assert claim is not None
        return claim

    def fail(self, claim: Claim, error: EngineError = CRASH) -> bool:
        with self.database.session() as session:
            return jobs.fail(session, claim, error)

    def cancel(self, job_id: str) -> str:
        with self.database.session() as session:
            return jobs.cancel_job(session, OWNER, job_id).state

    def reap(self) -> list[str]:
        with self.database.session() as session:
            return jobs.reap_expired(session)

    def expire_lease(self, job_id: str) -> None:
        """Let the lease lie in the past, as if its worker had been silent."""
        with self.database.session() as session:
            row = session.get(JobRow, job_id)
            assert row is not None
            row.lease_until = db_now(-1)

    def job(self, job_id: str) -> Any:
        """Return the job's row; not typed, for tests know which columns are filled."""
        with self.database.read() as session:
            return session.scalars(select(JobRow).where(JobRow.id == job_id)).one()

    def upload(self, upload_id: str) -> Any:
        """Return the row of a model or dataset."""
        with self.database.read() as session:
            return session.get(ModelRow if upload_id.startswith("mdl") else DatasetRow, upload_id)

    def now(self) -> datetime:
        """Return the database's time."""
        with self.database.read() as session:
            return session.execute(select(db_now())).scalar_one()

    def states(self, job_id: str) -> list[str]:
        """Return the states the job went through, as its events tell."""
        return [event.data["state"] for event in self.events(job_id) if event.kind == "state"]

    def events(self, job_id: str) -> list[EventRow]:
        with self.database.read() as session:
            return jobs.list_events(session, job_id, limit=10_000)

    def outbox(self) -> list[str]:
        with self.database.read() as session:
            return list(session.scalars(select(OutboxRow.job_id).order_by(OutboxRow.id)))

    def clear_outbox(self) -> None:
        with self.database.session() as session:
            session.execute(text("DELETE FROM outbox"))
