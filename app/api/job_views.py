"""What the user sees of a job."""

from datetime import datetime

from app.api.views import ErrorView, View
from app.db.tables import JobRow
from app.jobs import State
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
    distillation: str | None
    """Its stages and trials, where it is a distillation."""


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
    error: ErrorView | None
    """Why it failed."""
    verdict: Verdict | None
    """The comparison in words, once it has succeeded."""
    isolation: list[str]
    """What separated the latest attempt from the machine."""
    recipe: Recipe | None
    """What it does, with all defaults filled in; null where it is made of parts."""
    parent_id: str | None
    """The job that it is a part of."""
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


def describe_job(row: JobRow) -> JobView:
    """Return what the user sees of a row."""
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
            "error": row.error,
            "verdict": row.verdict,
            "isolation": row.isolation,
            "recipe": row.recipe if row.action == "optimize" else None,
            "parent_id": row.parent_id,
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
                "distillation": f"/v1/distillations/{row.id}" if row.action == "distill" else None,
            },
        }
    )
