"""Distillations: jobs made of stages and trials. Everything but their beginning and their parts is under /v1/jobs."""

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import ConfigDict, Field
from pydantic.config import JsonDict
from sqlalchemy.orm import Session

from app.api.glances import Glance
from app.api.idempotency import REPLAYED, IdempotencyKey, submit_once
from app.api.job_views import JobView, NeedsView, ProgressView, WaitView, describe_job, describe_needs, describe_wait
from app.api.jobs import MAX_LABELS, JobId, LabelName, LabelValue, describe_one
from app.api.openapi import CREATED, problems
from app.api.owner import Owner
from app.api.service import Parts
from app.api.views import ErrorView, View
from app.db.tables import JobRow
from app.errors import NotFound
from app.jobs import State, derive_needs, get_job
from app.jobs.checks import Record
from app.jobs.distillation import DistillationPlan
from app.jobs.parents import describe_part, list_parts
from app.jobs.submit_distillation import submit_distillation, validate_distillation
from app.jobs.trials import list_outcomes
from app.recipes.base import Spec
from app.recipes.metrics import Trial
from app.recipes.pipelines import Distillation

router = APIRouter(prefix="/v1/distillations", tags=["distillations"])

EXAMPLE: JsonDict = {
    "model_id": "mdl_k3v0q7m2c9x1f8z5a4b6n0p2r7",
    "distillation": {
        "teacher_training": {"kind": "finetune", "epochs": 2},
        "student": {"kind": "derive_student", "width": 0.5, "depth": 0.5},
        "training": {"kind": "distill", "epochs": 9},
        "tuning": {"num_trials": 8},
        "data": {
            "dataset_id": "dst_k3v0q7m2c9x1f8z5a4b6n0p2r7",
            "inputs": {"image": {"column": "image"}},
            "label_column": "label",
            "task": "classification",
        },
    },
}


class DistillationRequest(Spec):
    """A request to teach a student."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    model_id: str = Field(pattern=r"^mdl_[a-z0-9]{26}$")
    """The model that teaches; it is ready."""
    distillation: Distillation
    """How."""
    labels: dict[LabelName, LabelValue] = Field(default={}, max_length=MAX_LABELS)
    """Your own notes on the job; Pare only keeps them."""
    priority: int = Field(0, ge=-10, le=10)
    """Of all its parts, as for jobs."""
    deadline_seconds: int | None = Field(None, ge=1, le=31_536_000)
    """Time limit of all stages together; null takes the service's default for one job."""
    webhook_id: str | None = Field(None, pattern=r"^whk_[a-z0-9]{26}$")
    """A webhook that hears of this job, also one that hears of no others."""


class StageView(View):
    """What a stage needs, and whether a worker has it."""

    part: str
    """teacher, trials, student or student_alone."""
    needs: NeedsView
    """What the worker must have that runs a job of this stage."""
    waiting: WaitView | None
    """Why none of them would start: no worker has what it needs; null where one has."""


class DistillationDryRunView(View):
    """A distillation that would be accepted."""

    valid: Literal[True]
    """Always true: what would not be accepted is answered with the problem itself."""
    num_jobs: int
    """The most jobs it would run, checks aside."""
    rungs: list[dict[str, int]]
    """Rounds of trials: num_trials and epochs of each."""
    stages: list[StageView]
    """The stages in their order."""


class PartView(View):
    """One job of a distillation."""

    part: str
    """teacher, teacher_check, trial_<rung>_<number>, student or student_alone."""
    job_id: str
    """The job; a teacher_check is not shown under /v1/jobs."""
    status: State
    """Where it is in its life."""
    stage: str | None
    """What the engine is doing, or did last."""
    progress: ProgressView
    """How far it is."""
    attempt: int
    """Executions so far, the current one included."""
    worker: str | None
    """The worker that runs it, or ran its latest attempt; null while it waits."""
    waiting: WaitView | None
    """While it is queued: why no living worker can run it; null where one can, be it busy."""
    error: ErrorView | None
    """Why it failed."""


class DistillationView(View):
    """A distillation and its parts."""

    job: JobView
    """The job: its progress, events, metrics and artifacts are under /v1/jobs."""
    distillation: Distillation
    """What it does, with all defaults filled in."""
    parts: list[PartView]
    """Its jobs, in the order in which they were queued."""
    trials: list[Trial]
    """Hyper-parameters tried, and what became of each."""


@router.post(
    "",
    operation_id="submit_distillation",
    status_code=202,
    response_model=JobView,
    responses={
        200: {"model": DistillationDryRunView, "description": "`dry_run`: it would be accepted; nothing was queued."},
        202: {
            "description": "The distillation has begun.",
            "headers": {**CREATED["headers"], **REPLAYED},
        },
        **problems(400, 409, 413, 415, 422, 507),
    },
)
def post_distillation(
    request: Request,
    service: Parts,
    owner: Owner,
    body: DistillationRequest,
    idempotency_key: IdempotencyKey = None,
    dry_run: Annotated[bool, Query(description="Check the request and estimate, but queue nothing.")] = False,
) -> Response:
    """Start a distillation: one job that trains the teacher, tries hyper-parameters, and teaches the student."""
    if dry_run:
        with service.database.read() as session:
            validate_distillation(
                session,
                service.settings,
                owner=owner,
                model_id=body.model_id,
                request=body.distillation,
                deadline_seconds=body.deadline_seconds,
                webhook_id=body.webhook_id,
            )
        glance = service.glances.look(owner)
        return JSONResponse(_estimate(body.distillation, glance).model_dump(mode="json"))

    glance = service.glances.look(owner)

    def submit(session: Session, record: Record) -> JobView:
        job = submit_distillation(
            session,
            service.settings,
            owner=owner,
            model_id=body.model_id,
            request=body.distillation,
            labels=body.labels,
            priority=body.priority,
            deadline_seconds=body.deadline_seconds,
            webhook_id=body.webhook_id,
            record=record,
        )
        return describe_one(session, glance, job)

    return submit_once(
        service,
        request,
        owner=owner,
        route="POST /v1/distillations",
        header=idempotency_key,
        body=body,
        work=submit,
    )


@router.get("/{job_id}", operation_id="get_distillation", responses=problems(404))
def show_distillation(service: Parts, owner: Owner, job_id: JobId) -> DistillationView:
    """Show a distillation with its stages and trials as they are now."""
    glance = service.glances.look(owner)
    with service.database.read() as session:
        job = get_job(session, owner, job_id)
        if job.action != "distill":
            raise NotFound(f"job {job_id} is no distillation", fix=f"Look at it with GET /v1/jobs/{job_id}.")
        return _describe(job, describe_one(session, glance, job), list_parts(session, job_id), glance)


def _describe(job: JobRow, view: JobView, rows: list[JobRow], glance: Glance) -> DistillationView:
    request = Distillation.model_validate(job.recipe)
    parts = {part.name: part for part in map(describe_part, rows)}
    runs = DistillationPlan(request, job.model_id).list_trials(parts)
    if job.metrics is not None:
        trials = job.metrics["distillation"]["trials"]
    else:
        trials = [trial.model_dump(mode="json") for trial in list_outcomes(runs, chosen=None)]
    return DistillationView(
        job=view,
        distillation=request,
        parts=[_describe_part(row, glance) for row in rows],
        trials=[Trial.model_validate(trial) for trial in trials],
    )


def _describe_part(row: JobRow, glance: Glance) -> PartView:
    view = describe_job(row, glance.workers)
    shared = ("status", "stage", "progress", "attempt", "worker", "waiting", "error")
    return PartView.model_validate(
        {"part": row.part, "job_id": row.id, **{name: getattr(view, name) for name in shared}}
    )


def _estimate(request: Distillation, glance: Glance) -> DistillationDryRunView:
    rungs = DistillationPlan(request, None).rungs
    trial = request.trial_recipe({}, request.training.epochs) if rungs else None
    named = {
        "teacher": request.teacher_recipe(),
        "trials": trial,
        "student": request.student_recipe(),
        "student_alone": request.alone_recipe(),
    }
    needs = {name: derive_needs(recipe, request.needs) for name, recipe in named.items() if recipe is not None}
    return DistillationDryRunView(
        valid=True,
        num_jobs=len(needs.keys() - {"trials"}) + sum(rung.num_trials for rung in rungs),
        rungs=[{"num_trials": rung.num_trials, "epochs": rung.epochs} for rung in rungs],
        stages=[
            StageView(part=name, needs=describe_needs(each), waiting=describe_wait(each, glance.workers))
            for name, each in needs.items()
        ],
    )
