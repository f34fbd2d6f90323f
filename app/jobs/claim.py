"""A worker takes a job and keeps it: claim, heartbeat, progress. Every write after the claim carries its epoch."""

from dataclasses import dataclass

from sqlalchemy import func, null, select, update
from sqlalchemy.orm import Session

from app.db.clock import db_now
from app.db.tables import DatasetRow, JobRow, ModelRow
from app.jobs.checkpoints import StoredCheckpoint, list_checkpoints
from app.jobs.events import change_with_event
from app.jobs.lifecycle import State, held, move
from app.jobs.needs import Capacity
from app.jobs.order import pick_next, take_turn
from app.jobs.teachers import name_teachers
from app.recipes.plan import Progress
from app.recipes.recipe import Recipe

_MAX_PICKS = 10
NO_PROGRESS = {"fraction": 0.0, "eta_seconds": None, "message": ""}


@dataclass(frozen=True)
class StoredFile:
    """An upload's bytes in storage."""

    id: str
    format: str
    sha256: str
    size_bytes: int
    architecture: str | None = None
    """A state dict's: the catalogue's program for it."""


@dataclass(frozen=True)
class Claim:
    """What a worker holds while it runs one attempt of a job."""

    job_id: str
    owner: str
    epoch: int
    """The fencing token: raised by every claim."""
    attempt: int
    max_attempts: int
    action: str
    """optimize, check_model or check_dataset."""
    recipe: Recipe | None
    model: StoredFile | None
    datasets: tuple[StoredFile, ...]
    """optimize: those the recipe names, training data first."""
    teachers: tuple[StoredFile, ...]
    """optimize: the other models that steps of the recipe learn from."""
    deadline_seconds: int
    """Run time limit of this attempt."""
    checkpoints: tuple[StoredCheckpoint, ...] = ()
    """What earlier attempts left, newest first."""
    request_id: str | None = None
    """The request that submitted the job."""
    traceparent: str | None = None
    """The span of that request."""

    @property
    def is_last_attempt(self) -> bool:
        """Whether a retryable failure of this attempt is final."""
        return self.attempt >= self.max_attempts


def claim_next(
    session: Session, capacity: Capacity, worker_id: str, lease_seconds: float, max_running: int | None = None
) -> Claim | None:
    """Take the waiting job that is next for a worker with this capacity; return None where it can run none.

    Not more than `max_running` jobs of one owner run at the same time, or what administrators gave the owner.
    """
    take_turn(session)
    for _ in range(_MAX_PICKS):
        job_id = pick_next(session, capacity, max_running)
        if job_id is None:
            return None
        taken = claim(session, job_id, worker_id, lease_seconds)
        if taken is not None:
            return taken
    return None


def claim(session: Session, job_id: str, worker_id: str, lease_seconds: float) -> Claim | None:
    """Take a waiting job; return None where there is nothing to do (taken, cancelled, finished or deleted)."""
    job = move(
        session,
        job_id,
        sources=[State.QUEUED],
        target=State.RUNNING,
        only_if=[JobRow.attempt < JobRow.max_attempts],
        values={
            "attempt": JobRow.attempt + 1,
            "epoch": JobRow.epoch + 1,
            "worker_id": worker_id,
            "claimed_at": db_now(),
            "waiting_reason": null(),
            "lease_until": db_now(lease_seconds),
            "started_at": func.coalesce(JobRow.started_at, db_now()),
            "stage": "claimed",
            "progress": NO_PROGRESS,
            "isolation": [],
            "resumed_from": null(),
        },
    )
    if job is None:
        return None
    model = session.get(ModelRow, job.model_id) if job.model_id else None
    names = dict.fromkeys(name for name in (job.dataset_id, job.evaluation_dataset_id) if name)
    datasets = {row.id: row for row in session.scalars(select(DatasetRow).where(DatasetRow.id.in_(names)))}
    recipe = Recipe.model_validate(job.recipe) if job.recipe is not None else None
    taught_by = name_teachers(recipe) if recipe else ()
    teachers = {row.id: row for row in session.scalars(select(ModelRow).where(ModelRow.id.in_(taught_by)))}
    assert job.deadline_seconds is not None, "queued without a run time limit"
    return Claim(
        job_id=job.id,
        owner=job.owner,
        epoch=job.epoch,
        attempt=job.attempt,
        max_attempts=job.max_attempts,
        action=job.action,
        recipe=recipe,
        model=_describe(model) if model else None,
        datasets=tuple(_describe(datasets[name]) for name in names),
        teachers=tuple(_describe(teachers[name]) for name in taught_by),
        deadline_seconds=job.deadline_seconds,
        checkpoints=list_checkpoints(session, job_id),
        request_id=job.request_id,
        traceparent=job.traceparent,
    )


def heartbeat(
    session: Session, job_id: str, epoch: int, lease_seconds: float, progress: Progress | None = None
) -> State | None:
    """Renew the lease and return the job's state; None means the job is lost: end its processes at once."""
    values = {"lease_until": db_now(lease_seconds)} | (_describe_progress(progress) if progress else {})
    state = session.scalar(
        update(JobRow)
        .where(JobRow.id == job_id, *held(epoch))
        .values(**values)
        .returning(JobRow.state)
        .execution_options(synchronize_session=False)
    )
    return State(state) if state is not None else None


def record_progress(session: Session, job_id: str, epoch: int, progress: Progress) -> bool:
    """Show progress and append it as an event; return False where the job is lost."""
    data = _dump(progress)
    job = change_with_event(session, job_id, "progress", data, only_if=held(epoch), values=_describe_progress(progress))
    return job is not None


def _describe_progress(progress: Progress) -> dict[str, object]:
    return {"stage": progress.stage, "progress": _dump(progress)}


def _dump(progress: Progress) -> dict[str, object]:
    # Checkpoints have rows and events of their own.
    return progress.model_dump(mode="json", exclude={"checkpoint", "resumed"})


def _describe(row: ModelRow | DatasetRow) -> StoredFile:
    architecture = row.architecture if isinstance(row, ModelRow) else None
    return StoredFile(row.id, row.format, row.sha256, row.size_bytes, architecture)
