"""Jobs: submit, look, cancel, retry, delete, numbers and logs."""

from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import ConfigDict, Field, StringConstraints, model_validator
from pydantic.config import JsonDict
from sqlalchemy import Row, select
from sqlalchemy.orm import Session, defer

from app.api.cursors import Cursor, Limit, read_page
from app.api.downloads import begin
from app.api.frame import HEAD_ONLY
from app.api.glances import Glance
from app.api.idempotency import REPLAYED, IdempotencyKey, submit_once
from app.api.job_views import JobPage, JobView, NeedsView, WaitView, describe_job, describe_needs, describe_wait
from app.api.openapi import CREATED, problems
from app.api.owner import Owner
from app.api.service import Parts, Service
from app.api.views import View, answer_view
from app.db.tables import JobRow, LogRow
from app.errors import Conflict, NotFound
from app.jobs import (
    State,
    cancel_job,
    delete_bytes,
    delete_job,
    derive_needs,
    find_newest,
    get_job,
    name_parts,
    retry_job,
    show_job,
    submit_job,
    validate_submission,
)
from app.jobs.checks import Record
from app.jobs.lifecycle import CHECKS, MADE_OF_PARTS
from app.recipes.base import Spec
from app.recipes.metrics import Metrics
from app.recipes.needs import Needs
from app.recipes.recipe import Format, Recipe
from app.storage import owner_storage

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

JobId = Annotated[
    str, Path(pattern=r"^job_[a-z0-9]{26}$", description="The job.", examples=["job_k3v0q7m2c9x1f8z5a4b6n0p2r7"])
]
MAX_LABELS = 32
LabelName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,62}$")]
LabelValue = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]*$", max_length=256)]

EXAMPLE: JsonDict = {
    "model_id": "mdl_k3v0q7m2c9x1f8z5a4b6n0p2r7",
    "recipe": {"steps": [{"kind": "prune_magnitude", "sparsity": 0.5}], "target": {"num_threads": 1}},
    "labels": {"team": "vision"},
}


class JobRequest(Spec):
    """A request to run a recipe on a model."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    model_id: str = Field(pattern=r"^mdl_[a-z0-9]{26}$")
    """A model that is ready."""
    recipe: Recipe
    """What to do to it."""
    labels: dict[LabelName, LabelValue] = Field(default={}, max_length=MAX_LABELS)
    """Your own notes on the job; Pare only keeps them."""
    priority: int = Field(0, ge=-10, le=10)
    """Waiting jobs with a higher priority start first, whoever they belong to and however old others are."""
    deadline_seconds: int | None = Field(None, ge=1, le=31_536_000)
    """Run time limit of one attempt; null takes the service's default."""
    needs: Needs = Needs()
    """What the worker must have that runs it; what is left out follows from the recipe."""
    webhook_id: str | None = Field(None, pattern=r"^whk_[a-z0-9]{26}$")
    """A webhook that hears of this job, also one that hears of no others."""

    @model_validator(mode="after")
    def _check_device(self) -> Self:
        if self.needs.device == "cpu" and self.recipe.target.device == "cuda":
            raise ValueError(
                "needs.device is 'cpu', and recipe.target.device 'cuda' can be measured on a GPU only; leave out "
                "needs.device, or set the target to 'cpu'"
            )
        return self


class DryRunView(View):
    """A job that would be accepted."""

    valid: Literal[True]
    """Always true: a job that would not be accepted is answered with the problem itself."""
    formats: list[Format]
    """The files the job would make."""
    form: Literal["module", "coded", "integer"]
    """The form of its result."""
    deadline_seconds: int
    """Its run time limit."""
    num_jobs_ahead: int
    """Waiting jobs that would start before it, checks of uploads included."""
    needs: NeedsView
    """What the worker must have that runs it."""
    waiting: WaitView | None
    """Why it would not start: no worker has what it needs; null where one has."""


@router.post(
    "",
    operation_id="submit_job",
    status_code=202,
    response_model=JobView,
    responses={
        200: {"model": DryRunView, "description": "`dry_run`: the job would be accepted; nothing was queued."},
        202: {
            "description": "The job is queued.",
            "headers": {**CREATED["headers"], **REPLAYED},
        },
        **problems(400, 409, 413, 415, 422, 507),
    },
)
def post_job(
    request: Request,
    service: Parts,
    owner: Owner,
    body: JobRequest,
    idempotency_key: IdempotencyKey = None,
    dry_run: Annotated[bool, Query(description="Check the request and estimate, but queue nothing.")] = False,
) -> Response:
    """Submit a job. It is durable when this answers, and starts as soon as a worker is free."""
    if dry_run:
        return JSONResponse(_try(service, owner, body).model_dump(mode="json"))

    glance = service.glances.look(owner)

    def submit(session: Session, record: Record) -> JobView:
        job = submit_job(
            session,
            service.settings,
            owner=owner,
            model_id=body.model_id,
            recipe=body.recipe,
            labels=body.labels,
            priority=body.priority,
            deadline_seconds=body.deadline_seconds,
            needs=body.needs,
            webhook_id=body.webhook_id,
            workers=glance.workers,
            has_room=glance.has_room(owner),
            record=record,
        )
        glance.places.add(job)
        return describe_one(session, glance, job)

    return submit_once(
        service,
        request,
        owner=owner,
        route="POST /v1/jobs",
        header=idempotency_key,
        body=body,
        work=submit,
    )


@router.get("", operation_id="list_jobs", response_model=JobPage, responses=problems(400, 422))
def list_jobs(
    service: Parts,
    owner: Owner,
    cursor: Cursor = None,
    limit: Limit = 50,
    status: Annotated[State | None, Query(description="Only jobs in this state.")] = None,
    parent_id: Annotated[
        str | None,
        Query(pattern=r"^job_[a-z0-9]{26}$", description="The parts of this job; without it, no parts."),
    ] = None,
) -> Response:
    """List jobs, newest first."""
    workers = service.glances.look(owner).workers
    # A comparison with None is IS NULL.
    query = select(JobRow).options(defer(JobRow.metrics))
    query = query.where(JobRow.action.not_in(CHECKS), JobRow.parent_id == parent_id)
    if status is not None:
        query = query.where(JobRow.state == status)
    with service.database.read() as session:
        rows, next_cursor = read_page(session, JobRow, owner, cursor, limit, query)
        newest = find_newest(session, rows)
    items = [describe_job(row, workers, checkpoint=newest.get(row.id)) for row in rows]
    return answer_view(JobPage(items=items, next_cursor=next_cursor))


@router.get("/{job_id}", operation_id="get_job", response_model=JobView, responses=problems(404))
def get_one(service: Parts, owner: Owner, job_id: JobId) -> Response:
    """Show one job as it is now."""
    glance = service.glances.look(owner)
    with service.database.read() as session:
        return answer_view(describe_one(session, glance, show_job(session, owner, job_id)))


@router.post("/{job_id}/cancel", operation_id="cancel_job", status_code=202, responses=problems(404, 409))
def post_cancel(service: Parts, owner: Owner, job_id: JobId) -> JobView:
    """Cancel a job: a waiting one at once, a running one as soon as its processes have ended."""
    glance = service.glances.look(owner)
    with service.database.session() as session:
        return describe_one(session, glance, cancel_job(session, owner, job_id))


@router.post("/{job_id}/retry", operation_id="retry_job", status_code=202, responses=problems(404, 409, 422))
def post_retry(
    service: Parts,
    owner: Owner,
    job_id: JobId,
    fresh: Annotated[bool, Query(description="Start from the beginning, not from the last checkpoint.")] = False,
) -> JobView:
    """Queue a failed or cancelled job again, with a fresh set of attempts; it goes on from its last checkpoint."""
    glance = service.glances.look(owner)
    with service.database.session() as session:
        row = retry_job(session, service.settings, owner, job_id, fresh=fresh)
        glance.places.add(row)
        job = describe_one(session, glance, row)
        forgotten = [job_id, *name_parts(session, job_id)] if fresh else []
    for each in forgotten:
        delete_bytes(service.storage, each)
    return job


@router.delete("/{job_id}", operation_id="delete_job", status_code=204, responses=problems(404, 409))
def remove_job(service: Parts, owner: Owner, job_id: JobId) -> None:
    """Delete a finished job with its events, logs, checkpoints and artifacts."""
    with service.database.session() as session:
        gone = delete_job(session, owner, job_id)
    for each in gone:
        delete_bytes(service.storage, each)


@router.get("/{job_id}/metrics", operation_id="get_metrics", response_model=Metrics, responses=problems(404, 409))
def get_metrics(service: Parts, owner: Owner, job_id: JobId) -> Response:
    """Show everything measured on the original and on the result of a succeeded job."""
    with service.database.read() as session:
        job = get_job(session, owner, job_id)
        if job.metrics is None:
            raise Conflict(
                f"job {job_id} is {job.state}; metrics exist once it has succeeded",
                code="metrics_not_ready",
                fix="Wait until its status is 'succeeded'.",
                retryable=State(job.state) in (State.QUEUED, State.RUNNING),
            )
        return JSONResponse(job.metrics)  # checked when it was written


@router.get(
    "/{job_id}/logs",
    operation_id="get_logs",
    response_class=Response,
    responses={
        200: {
            "description": "The log, cut in the middle where it was too long.",
            "content": {"text/plain": {"schema": {"type": "string"}}},
        },
        **problems(404, 422),
    },
)
def get_logs(
    request: Request,
    service: Parts,
    owner: Owner,
    job_id: JobId,
    attempt: Annotated[
        int | None, Query(ge=1, le=1_000_000, description="Which attempt; the latest if left out.")
    ] = None,
) -> Response:
    """Download what the engine wrote during an attempt that has ended."""
    with service.database.read() as session:
        job = get_job(session, owner, job_id)
        if job.action in MADE_OF_PARTS:
            raise NotFound(
                f"job {job_id} is made of other jobs, each of which has a log of its own",
                code="log_not_found",
                fix=f"GET /v1/jobs?parent_id={job_id} lists them.",
            )
        query = select(LogRow).where(LogRow.job_id == job_id).order_by(LogRow.attempt.desc()).limit(1)
        row = session.scalar(query if attempt is None else query.where(LogRow.attempt == attempt))
    if row is None:
        which = "yet" if attempt is None else f"of attempt {attempt}"
        raise NotFound(f"job {job_id} has no log {which}", code="log_not_found", fix="A log is there after an attempt.")
    headers = {"Content-Length": str(row.size_bytes), "X-Attempt": str(row.attempt)}
    if request.scope.get(HEAD_ONLY):
        return Response(headers=headers, media_type="text/plain")
    chunks = owner_storage(service.storage, owner).read(row.sha256, row.size_bytes)
    return StreamingResponse(begin(chunks), headers=headers, media_type="text/plain")


def _try(service: Service, owner: str, body: JobRequest) -> DryRunView:
    with service.database.read() as session:
        validate_submission(
            session,
            service.settings,
            owner=owner,
            model_id=body.model_id,
            recipe=body.recipe,
            deadline_seconds=body.deadline_seconds,
            webhook_id=body.webhook_id,
        )
    needs = derive_needs(body.recipe, body.needs)
    glance = service.glances.look(owner)
    return DryRunView(
        valid=True,
        formats=list(body.recipe.formats),
        form=body.recipe.form.value,
        deadline_seconds=body.deadline_seconds or service.settings.default_deadline_seconds,
        num_jobs_ahead=glance.places.count_ahead(needs.device, body.priority, owner),
        needs=describe_needs(needs),
        waiting=describe_wait(needs, glance.workers),
    )


def describe_one(session: Session, glance: Glance, job: JobRow | Row[Any]) -> JobView:
    """Return the view of one job, with its place in the queue and its newest checkpoint."""
    num_jobs_ahead = None
    if State(job.state) is State.QUEUED:
        num_jobs_ahead = glance.places.count_ahead(job.needs_device, job.priority, job.owner, job.id)
    return describe_job(job, glance.workers, num_jobs_ahead, find_newest(session, [job]).get(job.id))
