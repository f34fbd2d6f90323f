"""Parents go on: what the dispatcher does with jobs that are made of others. See app/jobs/parents.py."""

import json
from functools import lru_cache

import structlog
from sqlalchemy import ColumnElement, null, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from app.db.clock import db_now
from app.db.session import Database
from app.db.tables import ArtifactRow, JobRow
from app.errors import PareError
from app.files import hold
from app.ids import new_id
from app.jobs.distillation import DistillationPlan
from app.jobs.endings import end_cancelled, end_failed
from app.jobs.events import change_with_event
from app.jobs.lifecycle import MADE_OF_PARTS, OWNED, State, move
from app.jobs.naming import name_for_logs
from app.jobs.parents import Ending, Outlook, Parts, PartsPlan, cancel_parts, queue_part, read_parts
from app.jobs.waiting import explain_wait
from app.jobs.workers import list_workers
from app.recipes.pipelines import Distillation
from app.recipes.plan import EngineError
from app.settings import Settings
from app.storage import Blob, Storage, owner_storage

PROGRESS_STEP = 0.02
"""Progress smaller than this, of nothing but running parts, is no event."""
REPORT = "report.md"
_DEFECT = EngineError(
    code="pipeline_failed",
    detail="the dispatcher could not decide what comes next; its log says why",
    fix="Report this as a defect of Pare, with the dispatcher's log.",
)

log = structlog.get_logger(__name__)


def make_plan(job: JobRow) -> PartsPlan:
    """Return what a parent does."""
    assert job.action == "distill"
    return DistillationPlan(_parse(json.dumps(job.recipe)), job.model_id)


@lru_cache(maxsize=64)
def _parse(text: str) -> Distillation:
    # Its checks build the recipe of every trial, and a parent is looked at every second.
    return Distillation.model_validate_json(text)


def advance_parents(database: Database, settings: Settings, storage: Storage) -> int:
    """Look at every parent that is not over, each in a transaction of its own; return how many went on.

    A parent that our own code cannot advance fails: it must not keep the others waiting.
    """
    query = (
        select(JobRow.id)
        .where(JobRow.state.in_(OWNED), JobRow.action.in_(MADE_OF_PARTS))
        .order_by(JobRow.created_at, JobRow.id)
    )
    with database.read() as session:
        job_ids = list(session.scalars(query))
    num_advanced = 0
    for job_id in job_ids:
        try:
            num_advanced += advance_parent(database, settings, storage, job_id)
        except (PareError, SQLAlchemyError, OSError):
            raise  # of the surroundings; tried again
        except Exception:
            with database.session() as session:
                for names in name_for_logs(session, [job_id]):
                    log.exception("a job made of others cannot go on", **names)
                cancel_parts(session, job_id)
                num_advanced += end_failed(session, job_id, _DEFECT, only_if=()) is not None
    return num_advanced


def advance_parent(database: Database, settings: Settings, storage: Storage, job_id: str) -> bool:
    """Do what comes next for one parent; return whether anything did. Safe to run in many places at once."""
    with database.session() as session:
        ending = _advance(session, settings, job_id)
        owner = session.scalar(select(JobRow.owner).where(JobRow.id == job_id))
    if isinstance(ending, bool):
        return ending
    assert owner is not None, "locked, and not deleted since"
    section = owner_storage(storage, owner)
    # A slow disk must not hold the database. Parts that are over do not change, so the report stays right.
    with section.writer() as writer:
        writer.write(ending.report.encode())
        report = writer.commit()
    with database.session() as session:
        hold(session, section, [report])
        job = _lock(session, job_id)
        return job is not None and _succeed(session, job, ending, report)


def _advance(session: Session, settings: Settings, job_id: str) -> bool | Ending:
    """Return whether something changed, or how the parent ends."""
    job = _lock(session, job_id)
    if job is None:
        return False
    if job.state == State.CANCELLING:
        return not cancel_parts(session, job_id) and end_cancelled(session, job_id, only_if=()) is not None
    parts = read_parts(session, job_id)
    outlook = make_plan(job).look(parts)
    if outlook.ending is not None:
        return outlook.ending
    error = outlook.error or _find_lateness(session, job)
    if error is not None:
        _report(session, job, parts, outlook)
        return not cancel_parts(session, job_id) and end_failed(session, job_id, error, only_if=()) is not None
    for new in outlook.queue:
        queue_part(session, settings, job, new)
    told = _tell_wait(session, settings, job, parts)
    return _report(session, job, parts, outlook) or told or bool(outlook.queue)


def _lock(session: Session, job_id: str) -> JobRow | None:
    """Return the parent, held until the transaction ends; None where it is over, gone, or another has it."""
    query = (
        select(JobRow)
        .where(JobRow.id == job_id, JobRow.state.in_(OWNED), JobRow.action.in_(MADE_OF_PARTS))
        .with_for_update(skip_locked=True)
        .execution_options(populate_existing=True)
    )
    return session.scalar(query)


def _find_lateness(session: Session, job: JobRow) -> EngineError | None:
    assert job.deadline_seconds is not None
    late: ColumnElement[bool] = JobRow.started_at < db_now(-float(job.deadline_seconds))
    if session.scalar(select(JobRow.id).where(JobRow.id == job.id, late)) is None:
        return None
    return EngineError(
        code="deadline_exceeded",
        detail=f"all parts together took longer than deadline_seconds = {job.deadline_seconds}",
        fix="Retry the job, which goes on where it stopped; or submit it with a larger deadline_seconds.",
    )


def _tell_wait(session: Session, settings: Settings, job: JobRow, parts: Parts) -> bool:
    """Show and write down that no living worker can run a part that waits, or that one can again."""
    queued = [part for part in parts.values() if part.state is State.QUEUED]
    workers = list_workers(session, settings.worker_seen_seconds) if queued else []
    waits = {part.name: wait for part in queued if (wait := explain_wait(part.needs, workers)) is not None}
    shown = None
    if waits:
        name, wait = next(iter(waits.items()))
        shown = {"reason": wait.reason, "detail": f"{name}: {wait.detail}", "fix": wait.fix}
    if job.progress.get("waiting") == shown:
        return False
    changes = {"progress": job.progress | {"waiting": shown}}
    return change_with_event(session, job.id, "waiting", shown or {"reason": None}, values=changes) is not None


def _report(session: Session, job: JobRow, parts: Parts, outlook: Outlook) -> bool:
    """Show the progress, and write an event for every part that ended and for progress worth one."""
    told: list[str] = job.progress.get("told", [])
    before = float(job.progress["fraction"])
    fraction = max(outlook.fraction, before)
    changed = False
    for name in (each for each in outlook.notes if each not in told and parts[each].is_over):
        told = [*told, name]
        _write_progress(session, job, outlook, fraction, told, outlook.notes[name])
        changed = True
    stale = job.stage != outlook.stage or job.progress["message"] != outlook.message
    if changed or stale or fraction - before >= PROGRESS_STEP:
        _write_progress(session, job, outlook, fraction, told, outlook.message)
        return True
    return False


def _write_progress(
    session: Session, job: JobRow, outlook: Outlook, fraction: float, told: list[str], message: str
) -> None:
    begun = job.progress.get("begun", fraction)
    eta_seconds = _estimate(session, job, fraction, begun)
    shown = {"fraction": fraction, "eta_seconds": eta_seconds, "message": message[:2000]}
    change_with_event(
        session,
        job.id,
        "progress",
        {"stage": outlook.stage, "step": None, "metrics": {}, **shown},
        values={"stage": outlook.stage, "progress": job.progress | shown | {"told": told, "begun": begun}},
    )


def _estimate(session: Session, job: JobRow, fraction: float, begun: float) -> float | None:
    """Return the seconds left at the pace since the beginning, a retry's when `begun` of the work was done already."""
    done = fraction - begun
    if done < PROGRESS_STEP or job.progress.get("waiting") is not None:
        return None
    assert job.started_at is not None, "a parent runs from its submission on"
    now = session.execute(select(db_now())).scalar_one()
    return round((now - job.started_at).total_seconds() * (1.0 - fraction) / done, 1)


def _succeed(session: Session, job: JobRow, ending: Ending, report: Blob) -> bool:
    metrics = ending.metrics.model_dump(mode="json")
    parts = read_parts(session, job.id)
    isolation = session.scalar(select(JobRow.isolation).where(JobRow.id == parts[ending.isolation_of].job_id))
    outlook = make_plan(job).look(parts)
    for name in (each for each in parts if each not in job.progress.get("told", [])):
        _write_progress(session, job, outlook, 1.0, list(parts), outlook.notes[name])
    moved = move(
        session,
        job.id,
        sources=[State.RUNNING],
        target=State.SUCCEEDED,
        values={
            "finished_at": db_now(),
            "error": null(),
            "metrics": metrics,
            "verdict": metrics["verdict"],
            "isolation": isolation or [],
            "progress": {"fraction": 1.0, "eta_seconds": 0.0, "message": ""},
        },
    )
    if moved is None:
        return False
    for part, name, renamed in ending.artifacts:
        if part in parts:
            _share_artifacts(session, moved, parts[part].job_id, name, renamed)
    _add_artifact(session, moved, REPORT, "text/markdown", report.size_bytes, report.sha256)
    return True


def _share_artifacts(session: Session, job: JobRow, part_id: str, name: str, renamed: str) -> None:
    """Let files of a part be files of the parent too: rows alone, for the bytes are stored once."""
    query = select(ArtifactRow).where(ArtifactRow.job_id == part_id, ArtifactRow.name != REPORT)
    if name != "*":
        query = query.where(ArtifactRow.name == name)
    for row in session.scalars(query.order_by(ArtifactRow.name)).all():
        _add_artifact(session, job, renamed or row.name, row.media_type, row.size_bytes, row.sha256)


def _add_artifact(session: Session, job: JobRow, name: str, media_type: str, size_bytes: int, sha256: str) -> None:
    session.add(
        ArtifactRow(
            id=new_id("art"),
            job_id=job.id,
            owner=job.owner,
            name=name,
            media_type=media_type,
            size_bytes=size_bytes,
            sha256=sha256,
            epoch=job.epoch,
            created_at=db_now(),
        )
    )
