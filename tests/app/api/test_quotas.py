"""What an owner may have: refused with the standard's words beyond it, never exceeded by a race, on both databases."""

import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from importlib import import_module
from multiprocessing.synchronize import Barrier
from typing import Any

import pytest
from sqlalchemy import event, text
from starlette.testclient import TestClient

from app import jobs
from app.access.limits import Limits, set_overrides
from app.access.windows import WINDOW_SECONDS, take_block
from app.db.clock import db_now
from app.db.session import Database
from app.db.tables import ArtifactRow
from app.errors import Unavailable
from app.jobs import Capacity
from app.jobs.checkpoints import Place, StoredCheckpoint
from app.jobs.quotas import measure_usage
from app.recipes.plan import EngineError
from app.settings import Settings
from app.storage.base import Blob
from tests.app.api.keyed import bearer, create_keyed_app, make_token, open_client
from tests.app.jobs.world import OWNER, World

RECIPE = {"steps": [{"kind": "prune_magnitude"}]}
TYPE = "https://iana.org/assignments/http-problem-types#quota-exceeded"
CPU = Capacity(("cpu",), memory_bytes=8, num_threads=4)


def limit(world: World, owner: str = OWNER, **limits: int) -> None:
    with world.database.session() as session:
        set_overrides(session, owner, Limits(**limits))


def submit(client: TestClient, world: World) -> Any:
    return client.post("/v1/jobs", json={"model_id": world.model_id, "recipe": RECIPE})


def test_fifty_submissions_at_once_find_the_one_place_that_is_left(both: tuple[TestClient, World]) -> None:
    client, world = both
    limit(world, queued_jobs=3)
    world.submit()
    world.submit()
    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _: submit(client, world), range(50)))
    refused = [answer for answer in answers if answer.status_code != 202]
    # Where fifty wait for one lock, some may hear that the service has no capacity left for them.
    assert {answer.status_code for answer in refused} <= {429, 503}
    assert len(refused) == 49
    assert client.get("/v1/me").json()["usage"]["queued_jobs"] == 3
    problem = next(answer for answer in refused if answer.status_code == 429)
    told = problem.json()
    assert (told["type"], told["code"], told["violated-policies"]) == (TYPE, "quota_exceeded", ["queued-jobs"])
    assert told["retryable"] is True
    assert int(problem.headers["retry-after"]) > 0


def test_retries_need_a_place_too(both: tuple[TestClient, World]) -> None:
    client, world = both
    job_id = world.submit()
    world.cancel(job_id)
    limit(world, queued_jobs=0)
    assert client.post(f"/v1/jobs/{job_id}/retry").status_code == 429
    limit(world, queued_jobs=1)
    assert client.post(f"/v1/jobs/{job_id}/retry").status_code == 202


def test_storage_is_counted_once_for_the_same_bytes_and_refused_beyond(both: tuple[TestClient, World]) -> None:
    client, world = both
    before = client.get("/v1/me").json()["usage"]["stored_bytes"]
    for _ in range(2):
        assert client.post("/v1/models", content=b"a" * 100).status_code == 201
    assert client.get("/v1/me").json()["usage"]["stored_bytes"] == before + 100
    limit(world, stored_bytes=before + 150)
    answer = client.post("/v1/models", content=b"b" * 51)
    told = answer.json()
    assert (answer.status_code, told["violated-policies"], told["retryable"]) == (429, ["stored-bytes"], False)
    assert "retry-after" not in answer.headers
    assert client.post("/v1/models", content=iter([b"b" * 30, b"b" * 30])).status_code == 429  # no declared length
    assert client.post("/v1/datasets", params={"format": "npz"}, content=b"c" * 51).status_code == 429
    assert client.post("/v1/models", content=b"b" * 50).status_code == 201
    assert submit(client, world).json()["violated-policies"] == ["stored-bytes"], "its artifacts would find no place"
    assert client.get("/v1/me").json()["usage"]["stored_bytes"] == before + 150


def test_resumable_uploads_take_their_room_when_they_begin(both: tuple[TestClient, World]) -> None:
    client, world = both
    before = client.get("/v1/me").json()["usage"]["stored_bytes"]
    limit(world, stored_bytes=before + 10)
    protocol = {"Tus-Resumable": "1.0.0", "Upload-Length": "7"}
    begun = client.post("/v1/uploads", headers=protocol)
    assert begun.status_code == 201
    refused = client.post("/v1/uploads", headers=protocol)
    assert (refused.status_code, refused.json()["violated-policies"]) == (429, ["stored-bytes"])
    assert client.post("/v1/models", content=b"1234").status_code == 429
    part = {"Tus-Resumable": "1.0.0", "Upload-Offset": "0", "Content-Type": "application/offset+octet-stream"}
    assert client.patch(begun.headers["location"], headers=part, content=b"7 bytes").status_code == 204
    completion = {"upload_id": begun.json()["id"], "sha256": sha256(b"7 bytes").hexdigest()}
    assert client.post("/v1/models", json=completion).status_code == 201, "its bytes count once"
    assert client.get("/v1/me").json()["usage"]["stored_bytes"] == before + 7
    gone = client.post("/v1/uploads", headers={**protocol, "Upload-Length": "3"})
    assert client.delete(gone.headers["location"], headers=protocol).status_code == 204
    assert client.post("/v1/models", content=b"123").status_code == 201


def test_uploads_at_once_do_not_exceed_the_storage_together(both: tuple[TestClient, World]) -> None:
    client, world = both
    before = client.get("/v1/me").json()["usage"]["stored_bytes"]
    limit(world, stored_bytes=before + 250)
    with ThreadPoolExecutor(8) as pool:
        contents = [bytes([number]) * 100 for number in range(8)]
        answers = list(pool.map(lambda content: client.post("/v1/models", content=content), contents))
    assert sorted(answer.status_code for answer in answers) == [201] * 2 + [429] * 6
    assert client.get("/v1/me").json()["usage"]["stored_bytes"] == before + 200


def test_artifacts_logs_and_checkpoints_count(world: World) -> None:
    with world.database.read() as session:
        before = measure_usage(session, OWNER).stored_bytes
    claim = world.start()
    with world.database.session() as session:
        checkpoint = StoredCheckpoint(Place("finetune", 0, 0.5), Blob("c" * 64, 1000))
        jobs.record_checkpoint(session, claim.job_id, claim.epoch, checkpoint)
        session.add(
            ArtifactRow(
                id="art_" + "a" * 26, job_id=claim.job_id, owner=OWNER, name="n", media_type="t", size_bytes=200,
                sha256="d" * 64, epoch=1, created_at=db_now(),
            )
        )  # fmt: skip
    with world.database.read() as session:
        usage = measure_usage(session, OWNER)
        assert (usage.stored_bytes, usage.running_jobs) == (before + 1200, 1)
    with world.database.session() as session:
        jobs.fail(session, claim, EngineError(code="x", detail="d", fix="f"), log=Blob("e" * 64, 30))
    with world.database.read() as session:
        usage = measure_usage(session, OWNER)
        assert (usage.stored_bytes, usage.running_jobs) == (before + 1230, 0)
        assert measure_usage(session, "somebody").stored_bytes == 0


def take(world: World, max_running: int | None = None) -> str | None:
    with world.database.session() as session:
        claim = jobs.claim_next(session, CPU, "w1", 30, max_running)
        return claim.job_id if claim else None


def test_no_more_jobs_of_an_owner_run_than_may(database: Database, settings: Settings) -> None:
    world = World(database, settings)
    limit(world, "ann", running_jobs=1)
    model_id = world.add_model(owner="ann")
    anns = [world.submit(owner="ann", model_id=model_id, priority=5) for _ in range(2)]
    mine = world.submit()
    assert take(world) == anns[0]
    assert take(world) == mine, "a lower priority, but ann has her one"
    assert take(world) is None
    check = world.check(dataset_id=world.add_dataset("checking"))
    with database.session() as session:
        session.execute(text("UPDATE jobs SET owner = 'ann' WHERE id = :id"), {"id": check})
    assert take(world) == check, "checks do not count"
    with database.session() as session:
        session.execute(text("UPDATE jobs SET state = 'succeeded' WHERE id = :id"), {"id": anns[0]})
    assert take(world) == anns[1]


def test_the_settings_limit_is_that_of_owners_without_their_own(database: Database, settings: Settings) -> None:
    world = World(database, settings)
    first, second = world.submit(), world.submit()
    limit(world, "bob", running_jobs=2)
    model_id = world.add_model(owner="bob")
    bobs = {world.submit(owner="bob", model_id=model_id) for _ in range(3)}
    taken = [take(world, max_running=1) for _ in range(4)]
    assert taken[3] is None
    assert {taken[0], taken[1], taken[2]} - bobs == {first}
    assert second not in taken


def test_idle_workers_are_not_woken_for_jobs_that_may_not_run(database: Database, settings: Settings) -> None:
    world = World(database, settings)
    with database.session() as session:
        facts = {"accepts": ["cpu"], "memory_bytes": 8, "num_threads": 4}
        jobs.register_worker(session, "idle", host="h", queue="pare.cpu", facts=facts)
    world.submit_many(2)
    world.clear_outbox()

    def wake(max_running: int | None) -> list[str]:
        with database.session() as session:
            session.execute(text("DELETE FROM outbox"))
            workers = jobs.list_workers(session, 60)
            return jobs.wake_workers(session, workers, {"cpu": 0, "gpu": 0}, 0.0, max_running)

    assert take(world) is not None
    time.sleep(0.01)
    assert wake(2) != []
    assert wake(1) == []


def _claim_all(url: str, barrier: Barrier) -> None:
    database = Database(url)
    barrier.wait(60)
    for _ in range(3):
        try:
            with database.session() as session:
                jobs.claim_next(session, CPU, "w", 300, 5)
        except Unavailable:
            continue
    database.dispose()


def test_racing_claims_stay_within_the_limit(database: Database, settings: Settings) -> None:
    world = World(database, settings)
    world.submit_many(20)
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(4)
    workers = [context.Process(target=_claim_all, args=(database.url, barrier)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    with database.read() as session:
        assert measure_usage(session, OWNER).running_jobs == 5


def test_claims_that_do_not_wait_for_their_turn_stay_within_the_limit(
    postgres_url: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On PostgreSQL a claim goes on beside one that hangs; then the owner's lock alone holds the limit."""
    monkeypatch.setattr(import_module("app.jobs.claim"), "take_turn", lambda _session: None)
    database = Database(postgres_url)
    world = World(database, settings)
    world.submit_many(20)
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda _: take(world, max_running=3), range(16)))
    assert len([job_id for job_id in taken if job_id]) == 3
    database.dispose()


@pytest.fixture
def limited(settings: Settings, sqlite_database: Database) -> Iterator[tuple[TestClient, str]]:
    """A client whose owner may send ten requests per minute, at the begin of a minute."""
    app = create_keyed_app(settings, quota_requests_per_minute=10)
    token = make_token(sqlite_database, "ann")
    if time.time() % WINDOW_SECONDS > WINDOW_SECONDS - 20:
        time.sleep(WINDOW_SECONDS - time.time() % WINDOW_SECONDS)
    with open_client(app, token) as client:
        yield client, token


def test_requests_beyond_the_limit_are_refused_until_the_minute_ends(
    limited: tuple[TestClient, str], sqlite_database: Database
) -> None:
    client, _ = limited
    left = []
    for _ in range(10):
        answer = client.get("/v1/techniques")
        assert answer.status_code == 200
        assert answer.headers["ratelimit-policy"] == '"requests";q=10;w=60'
        policy, remaining, seconds = answer.headers["ratelimit"].split(";")
        assert policy == '"requests"'
        left.append(int(remaining.removeprefix("r=")))
    assert left == list(range(9, -1, -1))
    answer = client.get("/v1/techniques")
    assert (answer.status_code, answer.json()["type"]) == (429, TYPE)
    assert answer.json()["violated-policies"] == ["requests"]
    seconds = answer.headers["ratelimit"].split("t=")[1]
    assert 0 < int(seconds) <= int(answer.headers["retry-after"]) <= 60
    assert client.get("/health/live").status_code == 200
    other = make_token(sqlite_database, "bob")
    assert client.get("/v1/techniques", headers=bearer(other)).status_code == 200, "each owner has its own"


def test_api_processes_share_the_limit(database: Database) -> None:
    """Each takes blocks; what they get together is the limit, to the request."""

    def take_all(_: int) -> int:
        granted = 0
        while True:
            with database.session() as session:
                block = take_block(session, "ann", 100, 7)
            if not block.granted:
                return granted
            granted += block.granted

    if time.time() % WINDOW_SECONDS > WINDOW_SECONDS - 15:
        time.sleep(WINDOW_SECONDS - time.time() % WINDOW_SECONDS)
    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(take_all, range(4))) == 100
    with database.session() as session:
        session.execute(text('UPDATE request_windows SET "window" = "window" - 1'))
    with database.session() as session:
        assert take_block(session, "ann", 100, 7).granted == 7, "the next minute"
    with database.session() as session:
        session.execute(text('UPDATE request_windows SET "window" = "window" + 2, taken = 100'))
    with database.session() as session:
        assert take_block(session, "ann", 100, 7).granted == 0, "a clock that is read late begins no minute again"


def test_requests_go_on_slowly_while_they_cannot_be_counted(settings: Settings, sqlite_database: Database) -> None:
    app = create_keyed_app(settings, quota_requests_per_minute=40)
    token = make_token(sqlite_database, "ann")
    engine = app.state.service.database.engine

    @event.listens_for(engine, "before_cursor_execute")
    def fail(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "request_windows" in statement:
            raise Unavailable

    with open_client(app, token) as client:
        statuses = [client.get("/v1/techniques").status_code for _ in range(5)]
    assert statuses == [200, 200, 429, 429, 429], "two are a twentieth of forty"


def test_administrators_give_an_owner_other_limits(settings: Settings, sqlite_database: Database) -> None:
    admin, ann = make_token(sqlite_database, "ops", ("admin",)), make_token(sqlite_database, "ann")
    with open_client(create_keyed_app(settings), admin) as client:
        assert client.get("/v1/owners/nobody/quota").status_code == 404
        assert client.get("/v1/owners/ann/quota").json()["own_limits"]["running_jobs"] is None
        answer = client.put("/v1/owners/ann/quota", json={"requests_per_minute": 3, "running_jobs": 2})
        assert answer.status_code == 200
        told = client.get("/v1/owners/ann/quota").json()
        assert told["limits"] == {
            "stored_bytes": None,
            "running_jobs": 2,
            "queued_jobs": 10_000,
            "requests_per_minute": 3,
        }
        assert told["own_limits"]["queued_jobs"] is None
        assert client.get("/v1/me", headers=bearer(ann)).json()["limits"] == told["limits"]
        statuses = [client.get("/v1/me", headers=bearer(ann)).status_code for _ in range(3)]
        assert statuses.count(200) == 2 or time.time() % 60 < 5
        client.put("/v1/owners/ann/quota", json={})
        assert client.get("/v1/me", headers=bearer(ann)).status_code == 200
        assert client.put("/v1/owners/ann/quota", json={"queued_jobs": -1}).status_code == 422
