"""What a user does to a job that exists: look, cancel, retry, delete."""

from typing import Any

from sqlalchemy import Row, bindparam, delete, null, select
from sqlalchemy.orm import Session, defer

from app.db.clock import db_now
from app.db.tables import Base, JobRow, ModelRow
from app.errors import Conflict, NotFound
from app.jobs.advance import make_plan
from app.jobs.checkpoints import drop_checkpoints
from app.jobs.endings import WAITING
from app.jobs.lifecycle import CHECKS, MADE_OF_PARTS, TERMINAL, State, move
from app.jobs.outbox import enqueue
from app.jobs.parents import (
    cancel_parts,
    delete_made_models,
    name_parts,
    read_parts,
    refuse_part,
    retry_parts,
    start_parent,
)
from app.jobs.quotas import require_room_for_job
from app.jobs.teachers import name_teachers
from app.recipes.pipelines import Distillation
from app.recipes.recipe import Recipe
from app.settings import Settings

# Made once: to build a query takes longer than to ask it.
_GET = (
    select(JobRow)
    .options(defer(JobRow.metrics))  # hundreds of layers, which few of the callers want
    .where(JobRow.id == bindparam("job_id"), JobRow.owner == bindparam("owner"), JobRow.action.not_in(CHECKS))
    .execution_options(populate_existing=True)
)
_LOCK = _GET.with_for_update()
_TABLE = Base.metadata.tables["jobs"]
_SHOW = select(*(column for column in _TABLE.c if column.name != "metrics")).where(
    _TABLE.c.id == bindparam("job_id"), _TABLE.c.owner == bindparam("owner"), _TABLE.c.action.not_in(CHECKS)
)


def get_job(session: Session, owner: str, job_id: str, *, for_update: bool = False) -> JobRow:
    """Return a job of this owner, checks aside. `for_update` locks it until the transaction ends."""
    job = session.scalar(_LOCK if for_update else _GET, {"job_id": job_id, "owner": owner})
    if job is None:
        raise _missing(job_id)
    return job


def show_job(session: Session, owner: str, job_id: str) -> Row[Any]:
    """Return what is written of a job, metrics aside, under the names of JobRow; takes less than to make that."""
    job = session.execute(_SHOW, {"job_id": job_id, "owner": owner}).first()
    if job is None:
        raise _missing(job_id)
    return job


def cancel_job(session: Session, owner: str, job_id: str) -> JobRow:
    """Cancel: a waiting job at once, a running one as soon as its worker has ended it. Asking again changes nothing."""
    job = get_job(session, owner, job_id, for_update=True)
    refuse_part(job)
    state = State(job.state)
    if state in TERMINAL:
        raise Conflict(
            f"job {job_id} is already {state}", code="job_finished", fix="A finished job stays as it is; delete it."
        )
    if state is State.QUEUED:
        ended = {"finished_at": db_now()}
        return _moved(move(session, job_id, sources=[State.QUEUED], target=State.CANCELLED, values=ended))
    if state is State.RUNNING:
        moved = _moved(move(session, job_id, sources=[State.RUNNING], target=State.CANCELLING))
        if job.action in MADE_OF_PARTS:
            cancel_parts(session, job_id)
        return moved
    return job


def retry_job(session: Session, settings: Settings, owner: str, job_id: str, *, fresh: bool = False) -> JobRow:
    """Queue a failed or cancelled job again, with a fresh set of attempts; one made of parts goes on where it ended.

    It goes on from its last checkpoint; with `fresh` it forgets them and starts from the beginning.
    """
    require_room_for_job(session, settings, owner)
    job = get_job(session, owner, job_id, for_update=True)
    refuse_part(job)
    if State(job.state) not in (State.FAILED, State.CANCELLED):
        raise Conflict(
            f"job {job_id} is {job.state}; only failed and cancelled jobs can be retried",
            code="job_not_retryable",
            fix="Submit a new job to run the recipe once more.",
        )
    if job.model_id is None:
        raise Conflict(
            f"the model of job {job_id} was deleted",
            code="model_deleted",
            fix="Upload the model again and submit a new job.",
        )
    data = (job.recipe or {}).get("data") or {}
    for column in ("dataset_id", "evaluation_dataset_id"):
        if data.get(column) is not None and getattr(job, column) is None:
            raise Conflict(
                f"dataset {data[column]} of job {job_id} was deleted",
                code="dataset_deleted",
                fix="Upload the dataset again and submit a new job.",
            )
    for model_id in _name_other_models(job):
        # Locked, so that it is not deleted before this transaction ends.
        teacher = select(ModelRow.id).where(ModelRow.id == model_id, ModelRow.owner == owner)
        if session.scalar(teacher.with_for_update(read=True)) is None:
            raise Conflict(
                f"model {model_id}, a teacher of job {job_id}, was deleted",
                code="model_deleted",
                fix="Upload the model again and submit a new job.",
            )
    if fresh:
        for each in (job_id, *name_parts(session, job_id)):
            drop_checkpoints(session, each)
    values = WAITING | {
        # Attempts count on, so that the logs of earlier ones keep their numbers.
        "max_attempts": job.attempt + settings.max_attempts,
        "error": null(),
        "started_at": null(),
        "finished_at": null(),
        "isolation": [],
        "resumed_from": null(),
    }
    sources = [State.FAILED, State.CANCELLED]
    moved = _moved(move(session, job_id, sources=sources, target=State.QUEUED, reason="retry", values=values))
    if job.action in MADE_OF_PARTS:
        parts = read_parts(session, job_id)
        retry_parts(session, settings, job_id, make_plan(moved).choose_retries(parts))
        return start_parent(session, moved)
    enqueue(session, job_id)
    return moved


def delete_job(session: Session, owner: str, job_id: str) -> list[str]:
    """Delete a finished job with its events, logs, checkpoints, artifacts and parts; return the ids that went."""
    job = get_job(session, owner, job_id, for_update=True)
    refuse_part(job)
    if State(job.state) not in TERMINAL:
        raise Conflict(f"job {job_id} is {job.state}", code="job_unfinished", fix="Cancel it first.")
    gone = [job_id, *name_parts(session, job_id)]
    session.expunge(job)
    session.execute(delete(JobRow).where(JobRow.id == job_id).execution_options(synchronize_session=False))
    delete_made_models(session, job_id)
    return gone


def _name_other_models(job: JobRow) -> tuple[str, ...]:
    """Return the ids of the models, beside its own, that a job needs."""
    if job.action in MADE_OF_PARTS:
        return name_teachers(Distillation.model_validate(job.recipe).student_recipe())
    return name_teachers(Recipe.model_validate(job.recipe))


def _missing(job_id: str) -> NotFound:
    return NotFound(f"there is no job {job_id}")


def _moved(job: JobRow | None) -> JobRow:
    assert job is not None, "the row was locked, nobody else can have moved it"
    return job
