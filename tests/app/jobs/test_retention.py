"""The files of old jobs go; jobs, their numbers, and the files of jobs that are not over stay."""

from datetime import timedelta

import pytest
from sqlalchemy import func, select, update

from app import jobs
from app.db.clock import db_now
from app.db.tables import ArtifactRow, CheckpointRow, JobRow, LogRow
from app.ids import new_id
from tests.app.jobs.world import OWNER, World


def add_files(world: World, job_id: str) -> None:
    described = {"job_id": job_id, "size_bytes": 1, "sha256": "0" * 64, "created_at": db_now()}
    with world.database.session() as session:
        session.add(ArtifactRow(id=new_id("art"), owner=OWNER, name="a", media_type="a/b", epoch=1, **described))
        session.add(LogRow(attempt=1, **described))
        session.add(CheckpointRow(seq=1, epoch=1, stage="s", fraction=0.5, **described))


def end(world: World, job_id: str, state: str, days_ago: float) -> None:
    with world.database.session() as session:
        finished_at = world.now() - timedelta(days=days_ago)
        session.execute(update(JobRow).where(JobRow.id == job_id).values(state=state, finished_at=finished_at))


def count_files(world: World, job_id: str) -> int:
    tables = (ArtifactRow, LogRow, CheckpointRow)
    with world.database.read() as session:
        counts = [session.scalar(select(func.count()).where(table.job_id == job_id)) or 0 for table in tables]
    return sum(counts)


def forget(world: World, days: float) -> int:
    with world.database.session() as session:
        return jobs.forget_files(session, days)


@pytest.mark.parametrize("state", ["succeeded", "failed", "cancelled"])
def test_old_files_go_and_the_job_stays(world: World, state: str) -> None:
    old, new = world.submit(), world.submit()
    for job_id, days_ago in ((old, 8), (new, 6)):
        add_files(world, job_id)
        end(world, job_id, state, days_ago)
    assert forget(world, 7) == 3
    assert (count_files(world, old), count_files(world, new)) == (0, 3)
    assert world.job(old).state == state
    assert forget(world, 7) == 0


def test_files_of_unfinished_jobs_stay(world: World) -> None:
    for job_id in (world.submit(), world.start().job_id):
        add_files(world, job_id)
        assert forget(world, 0) == 0
        assert count_files(world, job_id) == 3


def test_parts_keep_their_files_as_long_as_the_whole(world: World) -> None:
    parent, part = world.submit(), world.submit()
    with world.database.session() as session:
        session.execute(update(JobRow).where(JobRow.id == part).values(parent_id=parent, part="teacher"))
    add_files(world, part)
    end(world, part, "succeeded", 30)
    world.start(parent)
    assert forget(world, 7) == 0
    end(world, parent, "succeeded", 6)
    assert forget(world, 7) == 0
    end(world, parent, "succeeded", 8)
    assert forget(world, 7) == 3
