"""A job is accepted only when the facts of its model and data say that it can run."""

from collections.abc import Sequence
from typing import Any, TypeVar

from sqlalchemy import bindparam, select
from sqlalchemy.orm import Session, load_only

from app.db.tables import DatasetRow, JobRow, ModelRow, WorkerRow
from app.errors import Conflict, InvalidRequest, NotReady, Problem
from app.jobs.bindings import point
from app.jobs.checks import CHECKING, REJECTED, queue_job
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

Upload = TypeVar("Upload", ModelRow, DatasetRow)
_FACTS: dict[str, ModelFacts] = {}
"""Of the models that jobs were submitted for, by id."""
_MAX_FACTS = 100


def _make_query(table: type[ModelRow] | type[DatasetRow], lock: bool) -> Any:
    query = select(table).where(table.id == bindparam("upload_id"), table.owner == bindparam("owner"))
    if table is ModelRow:
        query = query.options(load_only(ModelRow.state, ModelRow.error))
        query = query.where(ModelRow.made_by.is_(None))  # such a model goes with its job
    return (query.with_for_update(read=True) if lock else query).execution_options(populate_existing=True)


_FIND = {(table, lock): _make_query(table, lock) for table in (ModelRow, DatasetRow) for lock in (False, True)}
"""Made once: to build a query takes longer than to ask it."""


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
) -> JobRow:
    """Queue a job, or raise InvalidRequest with every problem, or NotReady while an upload is still checked.

    Raises QuotaExceeded where the owner has as many jobs waiting as it may. The caller may know already which workers
    there are, and that the owner is far from its limits (`has_room`).
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
    model = _find(session, ModelRow, model_id, owner, lock)
    if model is None:
        problems.append(Problem("/model_id", f"there is no model {model_id}"))
    datasets: dict[str, DatasetRow | None] = {}
    data = recipe.data
    named = {"dataset_id": data.dataset_id, "evaluation_dataset_id": data.evaluation_dataset_id} if data else {}
    for field, dataset_id in named.items():
        if dataset_id is not None:
            datasets[field] = _find(session, DatasetRow, dataset_id, owner, lock)
            if datasets[field] is None:
                problems.append(Problem(f"/recipe/data/{field}", f"there is no dataset {dataset_id}"))
    teachers: dict[str, ModelRow] = {}
    for index, field, teacher_id in list_teachers(recipe):
        teacher = _find(session, ModelRow, teacher_id, owner, lock)
        if teacher is None:
            place = point(STEPS, index, field)
            problems.append(Problem(place, f"there is no model {teacher_id}"))
        else:
            teachers[teacher_id] = teacher
    if problems:
        raise InvalidRequest(problems)
    assert model is not None
    for row in (model, *datasets.values(), *teachers.values()):
        assert row is not None
        _require_ready(row)
    model_facts = _read_facts(session, model)
    facts = {field: DatasetFacts.model_validate(row.facts) for field, row in datasets.items() if row}
    problems = find_problems(recipe, model_facts, facts.get("dataset_id"), facts.get("evaluation_dataset_id"))
    taught_by = {teacher_id: _read_facts(session, row) for teacher_id, row in teachers.items()}
    problems += find_teacher_problems(recipe, model_facts, taught_by)
    if problems:
        raise InvalidRequest(problems)
    return model_facts


def _require_ready(row: ModelRow | DatasetRow) -> None:
    noun = "model" if isinstance(row, ModelRow) else "dataset"
    if row.state == CHECKING:
        raise NotReady(f"{noun} {row.id} is still being checked", code=f"{noun}_not_ready")
    if row.state == REJECTED:
        reason = (row.error or {}).get("detail", "")
        raise Conflict(
            f"{noun} {row.id} was rejected: {reason}",
            code=f"{noun}_rejected",
            fix=f"Upload a {noun} that passes the check.",
        )


def _read_facts(session: Session, model: ModelRow) -> ModelFacts:
    """Return the facts of a model that is ready: they never change, and are long."""
    facts = _FACTS.get(model.id)
    if facts is None:
        facts = ModelFacts.model_validate(session.scalar(select(ModelRow.facts).where(ModelRow.id == model.id)))
        if len(_FACTS) >= _MAX_FACTS:
            _FACTS.clear()
        _FACTS[model.id] = facts
    return facts


def _find(session: Session, table: type[Upload], upload_id: str, owner: str, lock: bool) -> Upload | None:
    found: Upload | None = session.scalar(_FIND[table, lock], {"upload_id": upload_id, "owner": owner})
    return found
