"""What the user sees of a job."""

from datetime import datetime

from sqlalchemy.orm import Session

from app.api.views import ErrorView, View
from app.db.tables import CheckpointRow, JobRow
from app.jobs import State, find_newest
from app.recipes.metrics import Verdict
from app.recipes.recipe import Recipe


class ProgressView(View):
    """How far a job is."""

    fraction: float
    """From 0 to 1."""
    eta_seconds: float | None
    """Expected time to the end, where it can be told."""
    message: str
    """What is being done."""


class PlaceView(View):
    """A place in a job's work."""

    stage: str
    """What the engine was doing."""
    step: int | None
    """Index into the recipe's steps where the stage is a step."""
    fraction: float
    """Of the whole job, from 0 to 1."""


class CheckpointView(PlaceView):
    """What the job can go on from after a crash."""

    size_bytes: int
    """Its size in storage."""
    created_at: datetime
    """When it was taken."""


class JobLinks(View):
    """Where to find what belongs to a job."""

    self: str
    """The job."""
    events: str
    """What happened, as a list or a stream."""
    metrics: str
    """The numbers, once it has succeeded."""
    artifacts: str
    """The files it made."""
    logs: str
    """What the engine wrote."""
    cancel: str
    """POST here to cancel."""
    model: str | None
    """The model; null once that is deleted."""


class JobView(View):
    """A request to run a recipe on a model."""

    id: str
    """Names the job."""
    model_id: str | None
    """The model it works on; null once that is deleted."""
    status: State
    """Where it is in its life; succeeded, failed and cancelled are final."""
    stage: str | None
    """What the engine is doing, or did last."""
    progress: ProgressView
    """How far it is."""
    attempt: int
    """Executions so far, the current one included."""
    max_attempts: int
    """Executions before a retryable failure is final."""
    checkpoint: CheckpointView | None
    """The newest checkpoint; null where there is none, and once the job has succeeded."""
    resumed_from: PlaceView | None
    """Where the latest attempt went on; null where it started from the beginning."""
    error: ErrorView | None
    """Why it failed."""
    verdict: Verdict | None
    """The comparison in words, once it has succeeded."""
    isolation: list[str]
    """What separated the latest attempt from the machine."""
    recipe: Recipe
    """What it does, with all defaults filled in."""
    labels: dict[str, str]
    """Your notes."""
    priority: int
    """From -10 to 10."""
    deadline_seconds: int | None
    """Run time limit of one attempt."""
    created_at: datetime
    """When it was submitted."""
    started_at: datetime | None
    """When its first attempt started."""
    finished_at: datetime | None
    """When it ended."""
    links: JobLinks
    """Related URL paths."""


class JobPage(View):
    """One page of jobs, newest first."""

    items: list[JobView]
    """The jobs."""
    next_cursor: str | None
    """For the `cursor` of the next page; null on the last."""


def describe_one(session: Session, row: JobRow) -> JobView:
    """Return what the user sees of a row and its newest checkpoint."""
    return describe_job(row, find_newest(session, [row.id]).get(row.id))


def describe_job(row: JobRow, checkpoint: CheckpointRow | None = None) -> JobView:
    """Return what the user sees of a row."""
    places = ("stage", "step", "fraction")
    own = f"/v1/jobs/{row.id}"
    progress = row.progress
    return JobView.model_validate(
        {
            "id": row.id,
            "model_id": row.model_id,
            "status": row.state,
            "stage": row.stage,
            "progress": {name: progress[name] for name in ("fraction", "eta_seconds", "message")},
            "attempt": row.attempt,
            "max_attempts": row.max_attempts,
            "checkpoint": None
            if checkpoint is None
            else {name: getattr(checkpoint, name) for name in (*places, "size_bytes", "created_at")},
            "resumed_from": row.resumed_from,
            "error": row.error,
            "verdict": row.verdict,
            "isolation": row.isolation,
            "recipe": row.recipe,
            "labels": row.labels,
            "priority": row.priority,
            "deadline_seconds": row.deadline_seconds,
            "created_at": row.created_at,
            "started_at": row.started_at,
            "finished_at": row.finished_at,
            "links": {
                "self": own,
                **{name: f"{own}/{name}" for name in ("events", "metrics", "artifacts", "logs", "cancel")},
                "model": f"/v1/models/{row.model_id}" if row.model_id else None,
            },
        }
    )
