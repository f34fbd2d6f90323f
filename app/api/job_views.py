"""What the user sees of a job."""

import json
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, Literal

from sqlalchemy import Row

from app.api.views import ErrorView, View
from app.db.tables import CheckpointRow, JobRow, WorkerRow
from app.jobs import JobNeeds, State, explain_wait, needs_of
from app.recipes.metrics import Verdict
from app.recipes.needs import DeviceKind
from app.recipes.recipe import Recipe


class ProgressView(View):
    """How far a job is."""

    fraction: float
    """From 0 to 1."""
    eta_seconds: float | None
    """Expected time to the end, where it can be told."""
    message: str
    """What is being done."""


class NeedsView(View):
    """What the worker must have that runs a job."""

    device: DeviceKind
    """The kind of worker."""
    num_devices: int
    """GPUs."""
    memory_bytes: int
    """Main memory for the job; 0: whatever there is."""
    num_threads: int
    """CPU threads for the job."""


class WaitView(View):
    """Why a job waits although nothing can come of it."""

    reason: Literal["no_worker", "no_worker_can_run"]
    """no_worker: none is alive. no_worker_can_run: none of those alive has what the job needs."""
    detail: str
    """What is needed, and what is there."""
    fix: str
    """What to do about it."""


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
    checkpoint: CheckpointView | None
    """The newest checkpoint; null where there is none, and once the job has succeeded."""
    resumed_from: PlaceView | None
    """Where the latest attempt went on; null where it started from the beginning."""
    error: ErrorView | None
    """Why it failed."""
    verdict: Verdict | None
    """The comparison in words, once it has succeeded."""
    worker: str | None
    """The worker that runs it, or ran its latest attempt; null while it waits, and where it is made of parts."""
    isolation: list[str]
    """What separated the latest attempt from the machine."""
    recipe: Recipe | None
    """What it does, with all defaults filled in; null where it is made of parts."""
    parent_id: str | None
    """The job that it is a part of."""
    webhook_id: str | None
    """The webhook that it was submitted with; null without, and once that is deleted."""
    labels: dict[str, str]
    """Your notes."""
    priority: int
    """From -10 to 10."""
    deadline_seconds: int | None
    """Run time limit of one attempt."""
    needs: NeedsView
    """What the worker must have that runs it."""
    waiting: WaitView | None
    """While it, or a part of it, is queued: why no living worker can run that; null where one can, be it busy."""
    num_jobs_ahead: int | None
    """While it is queued: waiting jobs that start before it, if none that runs ends meanwhile. Null in lists."""
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


def describe_needs(needs: JobNeeds) -> NeedsView:
    """Return what the user sees of a job's needs."""
    return NeedsView(
        device=needs.device,
        num_devices=needs.num_devices,
        memory_bytes=needs.memory_bytes,
        num_threads=needs.num_threads,
    )


def describe_wait(needs: JobNeeds, workers: Sequence[WorkerRow]) -> WaitView | None:
    """Return why none of the living workers can run a job; None where one can."""
    wait = explain_wait(needs, workers)
    return WaitView(reason=wait.reason, detail=wait.detail, fix=wait.fix) if wait is not None else None


@lru_cache(maxsize=1000)
def _read_recipe(text: str) -> Recipe:
    """Return a stored recipe with all its defaults. The same ones are asked for again and again, and never change."""
    return Recipe.model_validate(json.loads(text))


def _find_wait(row: JobRow | Row[Any], needs: JobNeeds, workers: Sequence[WorkerRow]) -> WaitView | None:
    if row.state == State.QUEUED:
        return describe_wait(needs, workers)
    # Of a job made of parts, one of which no worker can run (app/jobs/advance.py).
    shown = row.progress.get("waiting") if row.state == State.RUNNING else None
    return WaitView.model_validate(shown) if shown else None


def describe_job(
    row: JobRow | Row[Any],
    workers: Sequence[WorkerRow],
    num_jobs_ahead: int | None = None,
    checkpoint: CheckpointRow | None = None,
) -> JobView:
    """Return what the user sees of a row and its newest checkpoint, the living workers being these."""
    needs = needs_of(row)
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
            "worker": row.worker_id,
            "isolation": row.isolation,
            "recipe": _read_recipe(json.dumps(row.recipe)) if row.action == "optimize" else None,
            "parent_id": row.parent_id,
            "webhook_id": row.webhook_id,
            "labels": row.labels,
            "priority": row.priority,
            "deadline_seconds": row.deadline_seconds,
            "needs": describe_needs(needs),
            "waiting": _find_wait(row, needs, workers),
            "num_jobs_ahead": num_jobs_ahead,
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
