"""The invariants of the job contract, read from what a case has left: rows, events, blobs, answers, logs, processes.

I1 every accepted job is over, once.  I2 no move that the table forbids.  I3 artifacts only of the newest epoch of a
job that succeeded.  I4 bytes have their digest.  I5 no process is left.  I6 what belongs to a job has its owner.
I7 attempts within the limit.  I8 every refusal is a problem document, none of the service's own making that is not
planned.  I9 nothing half-written is left.  I10 event numbers have no gaps.  I11 no secret and no path of the host is
told.  I12 (recovery in time) is measured by the cases themselves.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.db.session import Database
from app.db.tables import (
    ArtifactRow,
    CheckpointRow,
    DatasetRow,
    EventRow,
    JobRow,
    LogRow,
    ModelRow,
    OutboxRow,
)
from app.errors import PareError
from app.jobs.lifecycle import MOVES, OWNED, TERMINAL, State
from app.storage import Storage, checkpoint_storage, owner_storage

PLANNED = frozenset({503, 507})
"""Answers of 500 and above that a fault may cause."""


@dataclass
class Answer:
    """One answer of the API."""

    method: str
    path: str
    status: int
    media_type: str
    body: bytes


@dataclass
class History:
    """What a case did and was told, beside what the service has written down."""

    accepted: set[str] = field(default_factory=set)
    """Jobs whose submission was answered with 2xx."""
    cancelled: set[str] = field(default_factory=set)
    """Jobs whose cancel was answered with 2xx."""
    answers: list[Answer] = field(default_factory=list)


def find_violations(
    database: Database, storage: Storage, history: History, *, secrets: Iterable[str] = (), logs: Iterable[Path] = ()
) -> list[str]:
    """Return every invariant that does not hold once the service has come to rest, in words."""
    with database.read() as session:
        jobs = list(session.scalars(select(JobRow)))
        found = [*_check_accepted(jobs, history)]
        for job in jobs:
            found += [f"{problem} (job {job.id})" for problem in _check_job(session, storage, job, history)]
        found += _check_blobs(session, storage)
        found += [f"I1: a hint is still unsent ({hint})" for hint in session.scalars(select(OutboxRow.job_id))]
    found += _check_answers(history.answers)
    return [*found, *_check_secrets(history, storage, database, list(secrets), list(logs))]


def _check_accepted(jobs: list[JobRow], history: History) -> Iterator[str]:
    known = {job.id for job in jobs}
    for job_id in history.accepted - known:
        yield f"I1: accepted job {job_id} is lost"
    for job in jobs:
        if State(job.state) not in TERMINAL:
            yield f"I1: job {job.id} is not over: {job.state}, attempt {job.attempt}"


def _check_job(session: Session, storage: Storage, job: JobRow, history: History) -> Iterator[str]:
    events = list(session.scalars(select(EventRow).where(EventRow.job_id == job.id).order_by(EventRow.seq)))
    numbers = [event.seq for event in events]
    if numbers != list(range(1, job.last_seq + 1)):
        yield f"I10: events are numbered {numbers}, the job says {job.last_seq}"
    states = [event.data for event in events if event.kind == "state"]
    yield from _check_moves(job, [(State(data["state"]), data.get("reason")) for data in states])
    num_claims = sum(data["state"] == State.RUNNING for data in states)
    if not num_claims == job.epoch == job.attempt:
        yield f"I2: {num_claims} claims, epoch {job.epoch}, attempt {job.attempt}"
    if job.attempt > job.max_attempts:
        yield f"I7: attempt {job.attempt} of {job.max_attempts}"
    if job.lease_until is not None and job.state not in OWNED:
        yield f"I2: {job.state} with a lease"
    retried = any(data.get("reason") == "retry" for data in states)
    if job.id in history.cancelled and job.state != State.CANCELLED and not retried:
        yield f"I2: its cancel was accepted, and it {job.state}"
    yield from _check_artifacts(session, job)
    for checkpoint in session.scalars(select(CheckpointRow).where(CheckpointRow.job_id == job.id)):
        if job.state == State.SUCCEEDED:
            yield "I9: it succeeded, and its checkpoints are still there"
        elif not checkpoint_storage(storage, job.id).exists(checkpoint.sha256):
            yield f"I4: checkpoint {checkpoint.seq} has no bytes"


def _check_moves(job: JobRow, states: list[tuple[State, str | None]]) -> Iterator[str]:
    if not states or states[-1][0] != job.state:
        yield f"I2: its events end with {states[-1:]}, its state is {job.state}"
    for (before, _), (after, reason) in pairwise(states):
        if after not in MOVES[before] or (before in TERMINAL and reason != "retry"):
            yield f"I2: it moved from {before} to {after}"


def _check_artifacts(session: Session, job: JobRow) -> Iterator[str]:
    artifacts = list(session.scalars(select(ArtifactRow).where(ArtifactRow.job_id == job.id)))
    if artifacts and job.state != State.SUCCEEDED:
        yield f"I3: it {job.state}, and shows artifacts"
    if not artifacts and job.state == State.SUCCEEDED and job.action == "optimize":
        yield "I3: it succeeded without artifacts"
    for artifact in artifacts:
        if artifact.epoch != job.epoch:
            yield f"I3: an artifact of epoch {artifact.epoch}, the job's is {job.epoch}"
        if artifact.owner != job.owner:
            yield f"I6: an artifact of {artifact.owner}, the job is {job.owner}'s"
    for model_id in filter(None, [job.model_id]):
        model = session.get(ModelRow, model_id)
        if model is None or model.owner != job.owner:
            yield f"I6: its model {model_id} is not {job.owner}'s"


def _check_blobs(session: Session, storage: Storage) -> Iterator[str]:
    for owner, sha256, size_bytes, table in _list_named(session):
        digest, num_bytes = hashlib.sha256(), 0
        try:
            for chunk in owner_storage(storage, owner).open(sha256):
                digest.update(chunk)
                num_bytes += len(chunk)
        except PareError as error:
            yield f"I4: {table} name a blob that cannot be read: {error.detail}"
            continue
        if (digest.hexdigest(), num_bytes) != (sha256, size_bytes):
            yield f"I4: blob {sha256} of {table} has other bytes"


def _list_named(session: Session) -> Iterator[tuple[str, str, int, str]]:
    """Yield owner, digest, size and table of everything that rows name."""
    for table in (ModelRow, DatasetRow, ArtifactRow):
        for row in session.execute(select(table.owner, table.sha256, table.size_bytes).distinct()):
            yield (*row, table.__tablename__)
    logs = select(JobRow.owner, LogRow.sha256, LogRow.size_bytes).join(JobRow, JobRow.id == LogRow.job_id)
    for row in session.execute(logs):
        yield (*row, LogRow.__tablename__)


def _check_answers(answers: list[Answer]) -> Iterator[str]:
    for answer in answers:
        if answer.status < 400:
            continue
        told = f"{answer.method} {answer.path} -> {answer.status}"
        if answer.status >= 500 and answer.status not in PLANNED:
            yield f"I8: {told}"
        try:
            problem = json.loads(answer.body)
        except ValueError:
            problem = {}
        if answer.media_type != "application/problem+json" or not problem.get("code") or not problem.get("detail"):
            yield f"I8: {told} is no problem document"


def _check_secrets(
    history: History, storage: Storage, database: Database, secrets: list[str], logs: list[Path]
) -> Iterator[str]:
    """Users must see neither; the service's own log, of which the paths are the operator's, no secret."""
    shown = [(f"{answer.method} {answer.path}", answer.body) for answer in history.answers]
    with database.read() as session:
        told = [row for row in _list_named(session) if row[3] == LogRow.__tablename__]
        shown += [
            (f"event of {event.job_id}", json.dumps(event.data).encode()) for event in session.scalars(select(EventRow))
        ]
    for owner, sha256, _, _ in told:
        with suppress(PareError):  # I4 has said so
            shown.append((f"log {sha256}", b"".join(owner_storage(storage, owner).open(sha256))))
    host = [line for log in logs for line in [str(log.parent)]][:1]
    for where, body in shown:
        for text in (*secrets, *host):
            if text.encode() in body:
                yield f"I11: {where} tells {text!r}"
    for log in logs:
        text_of_log = log.read_bytes()
        for secret in secrets:
            if secret.encode() in text_of_log:
                yield f"I11: {log.name} tells a secret"
