"""Jobs made of other jobs. A parent has parts: ordinary jobs, spread over all workers, claimed and retried like any.

No worker claims a parent. The dispatcher advances it: it looks at the parts that ended, asks the parent's plan what
comes next, and writes that, all in one transaction that holds the parent's row. A crash between two looks loses
nothing, and of two dispatchers at once the second finds the work done: what comes next depends on the rows alone, and
the name of a part is unique in its parent.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from sqlalchemy import delete, null, select
from sqlalchemy.orm import Session

from app.db.clock import db_now
from app.db.tables import ArtifactRow, JobRow, ModelRow
from app.errors import Conflict
from app.jobs.checks import check_again, queue_job
from app.jobs.claim import NO_PROGRESS
from app.jobs.endings import WAITING
from app.jobs.lifecycle import CHECK_PRIORITY, TERMINAL, State, move
from app.jobs.needs import JobNeeds, derive_needs, needs_of
from app.jobs.outbox import enqueue
from app.jobs.uploads import make_model
from app.recipes.metrics import Metrics
from app.recipes.needs import Needs
from app.recipes.plan import EngineError
from app.recipes.recipe import Recipe
from app.settings import Settings
from app.storage.base import Blob

HANDED_ON = "model.pt2"
"""The artifact by which the result of a part reaches the next one."""


@dataclass(frozen=True)
class Part:
    """A part as the plan sees it."""

    name: str
    job_id: str
    state: State
    model_id: str | None
    fraction: float
    metrics: Metrics | None
    error: EngineError | None
    needs: JobNeeds

    @property
    def is_over(self) -> bool:
        """Whether it will not change by itself any more."""
        return self.state in TERMINAL


Parts = Mapping[str, Part]
"""Name -> part."""


@dataclass(frozen=True)
class NewPart:
    """A job to queue."""

    name: str
    recipe: Recipe | None = None
    """What to do with `model_id`."""
    model_id: str | None = None
    needs: Needs | None = None
    """What the worker must have; what is left out follows from the recipe."""
    checks_result_of: str | None = None
    """Instead: check the file that this part left behind, like an upload, and make a model of it."""


@dataclass(frozen=True)
class Ending:
    """A parent that has succeeded."""

    metrics: Metrics
    report: str
    """Text of report.md."""
    artifacts: tuple[tuple[str, str, str], ...]
    """(part, name of its artifact, name in the parent)."""
    isolation_of: str
    """The part whose isolation the parent shows."""


@dataclass(frozen=True)
class Outlook:
    """What a plan says about a parent whose parts stand as they do."""

    stage: str
    message: str
    fraction: float
    queue: tuple[NewPart, ...] = ()
    error: EngineError | None = None
    ending: Ending | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    """Part that is over -> a sentence for the events."""


class PartsPlan(Protocol):
    """What a parent does: a pure function of its parts."""

    def look(self, parts: Parts) -> Outlook:
        """Return what comes next."""

    def choose_retries(self, parts: Parts) -> tuple[str, ...]:
        """Return the parts that failed and must succeed when the parent is tried again."""


def list_parts(session: Session, parent_id: str) -> list[JobRow]:
    """Return the rows of the parts there are, in the order in which they were queued, else by name."""
    query = (
        select(JobRow)
        .where(JobRow.parent_id == parent_id)
        .order_by(JobRow.created_at, JobRow.part)
        .execution_options(populate_existing=True)
    )
    return list(session.scalars(query))


def read_parts(session: Session, parent_id: str) -> dict[str, Part]:
    """Return name -> part of those there are, in that order."""
    return {part.name: part for part in map(describe_part, list_parts(session, parent_id))}


def start_parent(session: Session, job: JobRow) -> JobRow:
    """Let a parent that waits run, in the transaction that queued it."""
    moved = move(
        session,
        job.id,
        sources=[State.QUEUED],
        target=State.RUNNING,
        values={
            "attempt": JobRow.attempt + 1,
            "max_attempts": JobRow.attempt + 1,
            "started_at": db_now(),
            "finished_at": null(),
            "published_at": null(),
            "progress": NO_PROGRESS,
        },
    )
    assert moved is not None, "queued in this transaction"
    return moved


def queue_part(session: Session, settings: Settings, parent: JobRow, new: NewPart) -> JobRow:
    """Queue a part; the result of an earlier one becomes a model of its own, and is checked like any upload."""
    common: dict[str, Any] = {
        "owner": parent.owner,
        "max_attempts": settings.max_attempts,
        "parent_id": parent.id,
        "part": new.name,
        "request_id": parent.request_id,
        "traceparent": parent.traceparent,
    }
    if new.checks_result_of is not None:
        made = _make_model(session, parent, new.checks_result_of)
        return queue_job(
            session,
            action="check_model",
            model_id=made,
            deadline_seconds=settings.check_deadline_seconds,
            priority=CHECK_PRIORITY,
            **common,
        )
    assert new.recipe is not None
    assert parent.deadline_seconds is not None
    return queue_job(
        session,
        action="optimize",
        model_id=new.model_id,
        dataset_id=parent.dataset_id,
        evaluation_dataset_id=parent.evaluation_dataset_id,
        recipe=new.recipe.model_dump(mode="json"),
        deadline_seconds=parent.deadline_seconds,
        priority=parent.priority,
        needs=derive_needs(new.recipe, new.needs),
        **common,
    )


def name_parts(session: Session, parent_id: str) -> list[str]:
    """Return the ids of a parent's parts."""
    return list(session.scalars(select(JobRow.id).where(JobRow.parent_id == parent_id).order_by(JobRow.id)))


def cancel_parts(session: Session, parent_id: str) -> bool:
    """Cancel every part that is not over; return whether some of them still have to end."""
    query = select(JobRow.id).where(JobRow.parent_id == parent_id, JobRow.state.not_in(TERMINAL))
    for job_id in session.scalars(query.order_by(JobRow.id)).all():
        ended = {"finished_at": db_now()}
        if move(session, job_id, sources=[State.QUEUED], target=State.CANCELLED, values=ended) is None:
            move(session, job_id, sources=[State.RUNNING], target=State.CANCELLING)
    return session.scalar(query.limit(1)) is not None


def retry_parts(session: Session, settings: Settings, parent_id: str, names: Iterable[str]) -> None:
    """Queue parts that ended without success again, each with a fresh set of attempts."""
    query = select(JobRow.id).where(JobRow.parent_id == parent_id, JobRow.part.in_(list(names)))
    for job_id in session.scalars(query).all():
        values = WAITING | {
            "max_attempts": JobRow.attempt + settings.max_attempts,
            "error": null(),
            "started_at": null(),
            "finished_at": null(),
            "isolation": [],
            "resumed_from": null(),
        }
        sources = [State.FAILED, State.CANCELLED]
        job = move(session, job_id, sources=sources, target=State.QUEUED, reason="retry", values=values)
        if job is None:
            continue
        enqueue(session, job_id)
        if job.action == "check_model":
            assert job.model_id is not None
            check_again(session, job.model_id)


def delete_made_models(session: Session, parent_id: str) -> None:
    """Delete the models that a deleted parent's parts left for each other."""
    session.execute(delete(ModelRow).where(ModelRow.made_by == parent_id).execution_options(synchronize_session=False))


def refuse_part(job: JobRow) -> None:
    """Raise Conflict for a part: the parent decides about it."""
    if job.parent_id is not None:
        raise Conflict(
            f"job {job.id} is a part of job {job.parent_id}",
            code="job_is_a_part",
            fix=f"Do this to job {job.parent_id}; it takes care of its parts.",
        )


def _make_model(session: Session, parent: JobRow, part: str) -> str:
    artifact = session.scalars(
        select(ArtifactRow)
        .join(JobRow, JobRow.id == ArtifactRow.job_id)
        .where(JobRow.parent_id == parent.id, JobRow.part == part, ArtifactRow.name == HANDED_ON)
    ).one()
    blob = Blob(artifact.sha256, artifact.size_bytes)
    return make_model(session, owner=parent.owner, name=f"{part} of {parent.id}", blob=blob, made_by=parent.id)


def describe_part(row: JobRow) -> Part:
    """Return what the plan sees of the row of a part."""
    assert row.part is not None
    return Part(
        row.part,
        row.id,
        State(row.state),
        row.model_id,
        fraction=float(row.progress["fraction"]),
        metrics=Metrics.model_validate(row.metrics) if row.metrics is not None else None,
        error=EngineError.model_validate(row.error) if row.error is not None else None,
        needs=needs_of(row),
    )
