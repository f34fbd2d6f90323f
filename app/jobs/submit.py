"""A job is accepted only when the facts of its model and data say that it can run."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

from sqlalchemy import Row, bindparam, select
from sqlalchemy.orm import Session

from app.db.tables import Base, JobRow, ModelRow, WorkerRow
from app.errors import Conflict, InvalidRequest, NotReady, Problem
from app.jobs.bindings import point
from app.jobs.checks import CHECKING, REJECTED, Record, queue_job
from app.jobs.needs import derive_needs
from app.jobs.quotas import require_room_for_job
from app.jobs.teachers import STEPS, find_teacher_problems, list_teachers
from app.jobs.validate import find_problems
from app.jobs.workers import list_workers, require_isolation
from app.recipes.facts import DatasetFacts, ModelFacts
from app.recipes.needs import Needs
from app.recipes.recipe import Recipe
from app.settings import Settings
from app.webhooks.endpoints import has_endpoint

Noun = Literal["model", "dataset"]
_FACTS: dict[str, ModelFacts] = {}
"""Of the models that jobs were submitted for, by id."""
_MAX_FACTS = 100


def _make_query(noun: Noun, lock: bool) -> Any:
    table = Base.metadata.tables[f"{noun}s"]
    names = ["id", "state", "error"] + (["facts"] if noun == "dataset" else [])  # a model's are long, and read once
    query = select(*(table.c[name] for name in names))
    query = query.where(table.c.id == bindparam("upload_id"), table.c.owner == bindparam("owner"))
    if noun == "model":
        query = query.where(table.c.made_by.is_(None))  # such a model goes with its job
    return query.with_for_update(read=True) if lock else query


_NOUNS: tuple[Noun, ...] = get_args(Noun)
_FIND = {(noun, lock): _make_query(noun, lock) for noun in _NOUNS for lock in (False, True)}
"""Made once, and past the ORM: to build a query, and a thing of its answer, takes longer than to ask it."""


def submit_job(
    session: Session,
    settings: Settings,
    *,
    owner: str,
    model_id: str,
    recipe: Recipe,
    labels: dict[str, str],
    priority: int,
    deadline_seconds: int | None,
    needs: Needs | None = None,
    webhook_id: str | None = None,
    workers: Sequence[WorkerRow] | None = None,
    has_room: bool = False,
    record: Record | None = None,
) -> JobRow:
    """Queue a job, or raise InvalidRequest with every problem, or NotReady while an upload is still checked.

    Raises QuotaExceeded where the owner has as many jobs waiting as it may. The caller may know already which workers
    there are, and that the owner is far from its limits (`has_room`). `record` makes a row that is written with
    the job.
    """
    require_isolation(list_workers(session, settings.worker_seen_seconds) if workers is None else workers)
    if not has_room:
        require_room_for_job(session, settings, owner)
    validate_submission(
        session,
        settings,
        owner=owner,
        model_id=model_id,
        recipe=recipe,
        deadline_seconds=deadline_seconds,
        webhook_id=webhook_id,
        lock=True,
    )
    data = recipe.data
    return queue_job(
        session,
        owner=owner,
        action="optimize",
        model_id=model_id,
        dataset_id=data.dataset_id if data else None,
        evaluation_dataset_id=data.evaluation_dataset_id if data else None,
        recipe=recipe.model_dump(mode="json"),
        labels=labels,
        priority=priority,
        deadline_seconds=deadline_seconds or settings.default_deadline_seconds,
        max_attempts=settings.max_attempts,
        needs=derive_needs(recipe, needs),
        webhook_id=webhook_id,
        record=record,
    )


def validate_submission(
    session: Session,
    settings: Settings,
    *,
    owner: str,
    model_id: str,
    recipe: Recipe,
    deadline_seconds: int | None,
    webhook_id: str | None = None,
    lock: bool = False,
) -> ModelFacts:
    """Raise what `submit_job` would raise; return the model's facts. For dry runs.

    `lock` keeps model and datasets from being deleted until the transaction ends.
    """
    problems: list[Problem] = []
    if deadline_seconds is not None and deadline_seconds > settings.max_deadline_seconds:
        limit = settings.max_deadline_seconds
        problems.append(Problem("/deadline_seconds", f"{deadline_seconds} is more than the service allows, {limit}"))
    if webhook_id is not None and not has_endpoint(session, owner, webhook_id, lock=lock):
        problems.append(Problem("/webhook_id", f"there is no webhook {webhook_id}"))
    model = _find(session, "model", model_id, owner, lock)
    if model is None:
        problems.append(Problem("/model_id", f"there is no model {model_id}"))
    datasets: dict[str, Row[Any] | None] = {}
    data = recipe.data
    named = {"dataset_id": data.dataset_id, "evaluation_dataset_id": data.evaluation_dataset_id} if data else {}
    for field, dataset_id in named.items():
        if dataset_id is not None:
            datasets[field] = _find(session, "dataset", dataset_id, owner, lock)
            if datasets[field] is None:
                problems.append(Problem(f"/recipe/data/{field}", f"there is no dataset {dataset_id}"))
    teachers: dict[str, Row[Any]] = {}
    for index, field, teacher_id in list_teachers(recipe):
        teacher = _find(session, "model", teacher_id, owner, lock)
        if teacher is None:
            place = point(STEPS, index, field)
            problems.append(Problem(place, f"there is no model {teacher_id}"))
        else:
            teachers[teacher_id] = teacher
    if problems:
        raise InvalidRequest(problems)
    assert model is not None
    for noun, rows in (("model", (model,)), ("dataset", datasets.values()), ("model", teachers.values())):
        for row in rows:
            assert row is not None
            _require_ready(noun, row)
    model_facts = _read_facts(session, model.id)
    facts = {field: DatasetFacts.model_validate(row.facts) for field, row in datasets.items() if row}
    problems = find_problems(recipe, model_facts, facts.get("dataset_id"), facts.get("evaluation_dataset_id"))
    taught_by = {teacher_id: _read_facts(session, teacher_id) for teacher_id in teachers}
    problems += find_teacher_problems(recipe, model_facts, taught_by)
    if problems:
        raise InvalidRequest(problems)
    return model_facts


def _require_ready(noun: str, row: Row[Any]) -> None:
    if row.state == CHECKING:
        raise NotReady(f"{noun} {row.id} is still being checked", code=f"{noun}_not_ready")
    if row.state == REJECTED:
        reason = (row.error or {}).get("detail", "")
        raise Conflict(
            f"{noun} {row.id} was rejected: {reason}",
            code=f"{noun}_rejected",
            fix=f"Upload a {noun} that passes the check.",
        )


def _read_facts(session: Session, model_id: str) -> ModelFacts:
    """Return the facts of a model that is ready: they never change, and are long."""
    facts = _FACTS.get(model_id)
    if facts is None:
        facts = ModelFacts.model_validate(session.scalar(select(ModelRow.facts).where(ModelRow.id == model_id)))
        if len(_FACTS) >= _MAX_FACTS:
            _FACTS.clear()
        _FACTS[model_id] = facts
    return facts


def _find(session: Session, noun: Noun, upload_id: str, owner: str, lock: bool) -> Row[Any] | None:
    found: Row[Any] | None = session.execute(_FIND[noun, lock], {"upload_id": upload_id, "owner": owner}).one_or_none()
    return found
