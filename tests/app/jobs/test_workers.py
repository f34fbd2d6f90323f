"""Workers come, stay and go."""

from app import jobs
from app.db.clock import db_now
from app.db.session import Database
from app.db.tables import WorkerRow


def register(database: Database, worker_id: str, **facts: str) -> WorkerRow:
    with database.session() as session:
        return jobs.register_worker(session, worker_id, host="node-1", queue="cpu", facts=facts)


def seen(database: Database, seconds: float = 60) -> list[str]:
    with database.read() as session:
        return [worker.id for worker in jobs.list_workers(session, seconds)]


def be_silent(database: Database, worker_id: str, seconds: float) -> None:
    with database.session() as session:
        session.get_one(WorkerRow, worker_id).seen_at = db_now(-seconds)


def test_worker_is_known_with_its_newest_facts(database: Database) -> None:
    register(database, "a", device="cpu")
    worker = register(database, "a", device="cuda")
    assert (worker.host, worker.queue, worker.facts) == ("node-1", "cpu", {"device": "cuda"})
    assert seen(database) == ["a"]


def test_silent_worker_is_not_shown_until_it_is_back(database: Database) -> None:
    register(database, "a")
    register(database, "b")
    be_silent(database, "a", 100)
    assert seen(database) == ["b"]
    with database.session() as session:
        assert jobs.touch_worker(session, "a")
    assert seen(database) == ["a", "b"]


def test_worker_that_is_gone_must_register_again(database: Database) -> None:
    register(database, "a")
    register(database, "b")
    be_silent(database, "a", 100)
    with database.session() as session:
        assert jobs.forget_workers(session, 60) == 1
    with database.session() as session:
        assert not jobs.touch_worker(session, "a")
        jobs.remove_worker(session, "b")
    assert seen(database) == []
