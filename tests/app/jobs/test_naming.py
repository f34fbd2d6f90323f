"""The request that submitted a job is known wherever the job is: to its parts, its hints, its claims and its logs."""

import pytest
from asgi_correlation_id import correlation_id
from sqlalchemy import update

from app import jobs
from app.db.session import Database
from app.db.tables import JobRow
from app.jobs import Hint, name_for_logs
from app.settings import Settings
from app.storage import Storage
from tests.app.jobs.pipeline_world import PipelineWorld
from tests.app.jobs.test_distillation import train_teacher
from tests.app.jobs.world import OWNER

TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.fixture
def world(database: Database, settings: Settings, storage: Storage) -> PipelineWorld:
    world = PipelineWorld(database, settings)
    world.storage = storage
    return world


def test_a_job_keeps_the_request_that_submitted_it(world: PipelineWorld) -> None:
    token = correlation_id.set("submit-0001")
    try:
        job_id = world.submit()
    finally:
        correlation_id.reset(token)
    other = world.submit()
    hints: list[Hint] = []
    jobs.relay_outbox(world.database, hints.append)
    assert [(hint.owner, hint.request_id) for hint in hints if hint.job_id == job_id] == [(OWNER, "submit-0001")]
    assert world.start(job_id).request_id == "submit-0001"
    with world.database.read() as session:
        names = {each["job_id"]: each for each in name_for_logs(session, [job_id, other, "job_gone"])}
    assert names == {
        job_id: {"job_id": job_id, "owner": OWNER, "epoch": 1, "request_id": "submit-0001"},
        other: {"job_id": other, "owner": OWNER, "epoch": 0, "request_id": None},
    }


def test_parts_carry_the_request_and_the_trace_of_their_parent(world: PipelineWorld) -> None:
    parent = world.distill()
    with world.database.session() as session:
        session.execute(update(JobRow).where(JobRow.id == parent).values(request_id="submit-0001", traceparent=TRACE))
    train_teacher(world, parent)
    rows = [world.job(part.job_id) for part in world.parts(parent).values()]
    carried = {(row.part, row.request_id, row.traceparent) for row in rows if row.part != "teacher"}
    assert carried == {(name, "submit-0001", TRACE) for name in ("teacher_check", "student", "student_alone")}
