"""A distillation is accepted only when the jobs of all its stages would be."""

from collections.abc import Iterator

from sqlalchemy.orm import Session

from app.db.tables import DatasetRow, JobRow
from app.errors import InvalidRequest, Problem
from app.jobs.bindings import TEXT, find_column
from app.jobs.checks import Record, queue_job
from app.jobs.needs import derive_needs
from app.jobs.parents import start_parent
from app.jobs.quotas import require_room_for_job
from app.jobs.submit import validate_submission
from app.jobs.workers import list_workers, require_isolation
from app.recipes.facts import DatasetFacts, ModelFacts
from app.recipes.pipelines import Distillation
from app.recipes.recipe import Recipe
from app.recipes.students import DeriveStudent
from app.settings import Settings

ROOT = "/distillation"


def submit_distillation(
    session: Session,
    settings: Settings,
    *,
    owner: str,
    model_id: str,
    request: Distillation,
    labels: dict[str, str],
    priority: int,
    deadline_seconds: int | None,
    webhook_id: str | None = None,
    record: Record | None = None,
) -> JobRow:
    """Start a distillation, or raise InvalidRequest with every problem, or NotReady while an upload is checked.

    `record` makes a row that is written with the job.
    """
    require_isolation(list_workers(session, settings.worker_seen_seconds))
    require_room_for_job(session, settings, owner)
    validate_distillation(
        session,
        settings,
        owner=owner,
        model_id=model_id,
        request=request,
        deadline_seconds=deadline_seconds,
        webhook_id=webhook_id,
        lock=True,
    )
    job = queue_job(
        session,
        owner=owner,
        action="distill",
        model_id=model_id,
        dataset_id=request.data.dataset_id,
        evaluation_dataset_id=request.data.evaluation_dataset_id,
        recipe=request.model_dump(mode="json"),
        labels=labels,
        priority=priority,
        deadline_seconds=deadline_seconds or settings.default_deadline_seconds,
        max_attempts=1,
        webhook_id=webhook_id,
        record=record,
    )
    return start_parent(session, job)


def validate_distillation(
    session: Session,
    settings: Settings,
    *,
    owner: str,
    model_id: str,
    request: Distillation,
    deadline_seconds: int | None,
    webhook_id: str | None = None,
    lock: bool = False,
) -> None:
    """Raise what `submit_distillation` would raise. Problems point into the request, not into recipes made of it."""
    stages: list[tuple[Recipe | None, list[str]]] = [
        (request.teacher_recipe(), ["teacher_training"]),
        (request.student_recipe(), ["student", "training"]),
        (request.alone_recipe(), ["student", "training"]),
    ]
    problems: dict[Problem, None] = {}
    facts: ModelFacts | None = None
    for recipe, places in stages:
        if recipe is None:
            continue
        try:
            facts = validate_submission(
                session,
                settings,
                owner=owner,
                model_id=model_id,
                recipe=recipe,
                deadline_seconds=deadline_seconds,
                webhook_id=webhook_id,
                lock=lock,
            )
            derive_needs(recipe, request.needs)
        except InvalidRequest as refused:
            problems |= dict.fromkeys(_translate(problem, places) for problem in refused.errors)
    if facts is not None:
        dataset = session.get(DatasetRow, request.data.dataset_id)
        assert dataset is not None, "validated"
        found = _check_student(request, facts, DatasetFacts.model_validate(dataset.facts))
        problems |= dict.fromkeys(found)
    if problems:
        raise InvalidRequest(list(problems))


def _translate(problem: Problem, places: list[str]) -> Problem:
    parts = problem.pointer.split("/")
    if parts[1] == "needs":
        return Problem(f"{ROOT}{problem.pointer}", problem.detail)
    if parts[1] != "recipe":
        return problem
    if parts[2] == "steps" and len(parts) > 3:
        inner = [part for part in parts[4:] if part != "kind" or len(parts) > 5]
        return Problem("/".join([ROOT, places[int(parts[3])], *inner]), problem.detail)
    return Problem("/".join([ROOT, *parts[2:]]), problem.detail)


def _check_student(request: Distillation, model: ModelFacts, dataset: DatasetFacts) -> Iterator[Problem]:
    capabilities = {capability.kind: capability for capability in model.capabilities}
    student = request.student
    if isinstance(student, DeriveStudent):
        derive, narrow = capabilities.get("derive_student"), capabilities.get("prune_structured")
        if student.depth < 1 and derive is not None and derive.missing is not None:
            yield Problem(f"{ROOT}/student/depth", derive.missing)
        widths = (student.width, *(request.tuning.width if request.tuning else ()))
        if min(widths) < 1 and narrow is not None and not narrow.applicable:
            yield Problem(f"{ROOT}/student/width", f"no layer can become narrower: {narrow.missing}")
    texts = [
        binding.column
        for binding in request.data.inputs.values()
        if (column := find_column(dataset, binding.column)) is not None and column.dtype == TEXT
    ]
    if texts and request.teacher_training is not None:
        yield Problem(
            f"{ROOT}/teacher_training",
            f"column {texts[0]!r} is text, and a trained teacher is handed on without its tokenizer; train it in a job "
            "of its own, or bind columns of numbers",
        )
