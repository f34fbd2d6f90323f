"""Messages are written with what they tell of, and tried on a schedule until they are taken."""

import json
import threading
from typing import Any

import pytest
from sqlalchemy import select, update

from app import jobs
from app.db.clock import db_now
from app.db.tables import DeliveryRow, WebhookRow
from app.webhooks import deliveries
from app.webhooks.deliveries import (
    MAX_AT_ONCE_PER_OWNER,
    MAX_ATTEMPTS,
    PAUSES_SECONDS,
    choose_pause,
    claim_due,
    forget_deliveries,
    is_due,
    record_outcome,
)
from app.webhooks.endpoints import create_endpoint
from app.webhooks.sending import Outcome, Parcel
from tests.app.jobs.world import OWNER, REFUSAL, World

ALL = ("job.running", "job.succeeded", "job.failed", "job.cancelled")
OK, BROKEN, GONE = Outcome(200, None, 5), Outcome(500, None, 5), Outcome(410, None, 5)
SILENT = Outcome(None, "timeout", 15_000)


def add_endpoint(world: World, name: str = "a", *, owner: str = OWNER, jobs: str = "all", events: Any = ALL) -> str:
    with world.database.session() as session:
        url = f"https://example.com/{name}"
        return create_endpoint(session, owner=owner, url=url, description="", events=events, jobs=jobs).id


def messages(world: World) -> list[DeliveryRow]:
    with world.database.read() as session:
        return list(session.scalars(select(DeliveryRow).order_by(DeliveryRow.created_at, DeliveryRow.id)))


def take(world: World, limit: int = 8) -> list[Parcel]:
    with world.database.session() as session:
        return claim_due(session, limit)


def note(world: World, parcel: Parcel, outcome: Outcome) -> DeliveryRow:
    with world.database.session() as session:
        record_outcome(session, parcel, outcome)
    with world.database.read() as session:
        return session.scalars(select(DeliveryRow).where(DeliveryRow.id == parcel.delivery_id)).one()


def make_due(world: World, **values: Any) -> None:
    """Let the pauses be over, or a lease."""
    with world.database.session() as session:
        waiting = update(DeliveryRow).where(DeliveryRow.state == "pending")
        session.execute(waiting.values(due_at=db_now(-1), **values))


def endpoint_of(world: World, webhook_id: str) -> WebhookRow:
    with world.database.read() as session:
        return session.scalars(select(WebhookRow).where(WebhookRow.id == webhook_id)).one()


def test_message_and_state_are_written_together(world: World) -> None:
    add_endpoint(world)
    claim = world.start()
    world.fail(claim, REFUSAL)
    assert sorted(row.type for row in messages(world)) == ["job.failed", "job.running"]
    (row,) = [row for row in messages(world) if row.type == "job.failed"]
    body = json.loads(row.body)
    assert body["type"] == "job.failed"
    assert body["data"] == {
        "job_id": claim.job_id,
        "status": "failed",
        "attempt": 1,
        "seq": world.job(claim.job_id).last_seq,
        "error_code": REFUSAL.code,
        "links": {
            "self": f"/v1/jobs/{claim.job_id}",
            **{name: f"/v1/jobs/{claim.job_id}/{name}" for name in ("events", "metrics", "artifacts")},
        },
    }
    assert len(row.body) < 1000

    def crash() -> None:
        with world.database.session() as session:
            jobs.cancel_job(session, OWNER, world_job)
            raise RuntimeError("crash before commit")

    world_job = world.submit()
    with pytest.raises(RuntimeError):
        crash()
    assert [row for row in messages(world) if row.type == "job.cancelled"] == []


def test_who_hears_of_what(world: World) -> None:
    hears_all = add_endpoint(world, "all", events=["job.cancelled"])
    named = add_endpoint(world, "named", jobs="named")
    add_endpoint(world, "stranger", owner="other")
    add_endpoint(world, "success", events=["job.succeeded"])
    world.cancel(world.submit())
    assert [row.webhook_id for row in messages(world)] == [hears_all]
    world.cancel(world.submit(webhook_id=named))
    assert sorted(row.webhook_id for row in messages(world)) == sorted([hears_all, hears_all, named])


def test_checks_of_uploads_and_parts_are_told_to_nobody(world: World) -> None:
    add_endpoint(world)
    check = world.claim(world.check(model_id=world.add_model("checking")))
    assert check is not None
    world.fail(check, REFUSAL)
    with world.database.session() as session:
        parent = jobs.checks.queue_job(session, owner=OWNER, action="distill", deadline_seconds=1, max_attempts=1)
        part = jobs.checks.queue_job(
            session, owner=OWNER, action="optimize", deadline_seconds=9, max_attempts=1, parent_id=parent.id, part="p",
            model_id=world.model_id, recipe={"steps": [{"kind": "prune_magnitude"}]},
        ).id  # fmt: skip
    claim = world.claim(part)
    assert claim is not None
    assert messages(world) == []


def test_ten_attempts_over_three_days_then_no_more(world: World) -> None:
    assert MAX_ATTEMPTS == 10
    assert 75.5 < sum(PAUSES_SECONDS) / 3600 < 75.7
    add_endpoint(world)
    world.cancel(world.submit())
    ids = set()
    for number in range(1, 11):
        (parcel,) = take(world)
        ids.add(parcel.delivery_id)
        row = note(world, parcel, SILENT if number % 2 else BROKEN)
        assert len(row.attempts) == number
        if number < 10:
            assert row.state == "pending"
            pause = (row.due_at - world.now()).total_seconds()  # type: ignore[operator]
            assert 0.85 * PAUSES_SECONDS[number - 1] - 3 < pause < 1.15 * PAUSES_SECONDS[number - 1]
            assert take(world) == []
            make_due(world)
    assert (row.state, row.due_at, len(ids)) == ("failed", None, 1)
    assert row.attempts[0] | {"at": ""} == {"at": "", "status": None, "error": "timeout", "milliseconds": 15_000}
    make_due(world)
    assert take(world) == []


def test_what_was_taken_is_not_sent_again(world: World) -> None:
    add_endpoint(world)
    world.cancel(world.submit())
    (parcel,) = take(world)
    row = note(world, parcel, OK)
    assert (row.state, row.due_at, row.lease_until) == ("delivered", None, None)
    assert row.finished_at is not None
    make_due(world)
    assert take(world) == []


def test_pauses_differ_and_the_receiver_can_ask_for_longer_ones() -> None:
    assert len({choose_pause(2, None) for _ in range(20)}) > 10
    assert all(270 <= choose_pause(2, None) <= 330 for _ in range(100))
    assert choose_pause(1, 3600) == 3600
    assert choose_pause(9, 5) > 20 * 3600
    assert choose_pause(1, 10**9) == 24 * 3600


def test_a_receiver_that_is_gone_gets_nothing_more(world: World) -> None:
    webhook_id = add_endpoint(world)
    world.cancel(world.submit())
    world.cancel(world.submit())
    (parcel,) = take(world)
    note(world, parcel, GONE)
    assert endpoint_of(world, webhook_id).disabled_reason == "gone"
    assert [row.state for row in messages(world)] == ["failed", "failed"]
    world.cancel(world.submit())
    assert len(messages(world)) == 2


def test_one_at_a_time_for_each_endpoint_and_few_for_each_owner(world: World) -> None:
    for number in range(6):
        add_endpoint(world, f"own{number}")
    other = add_endpoint(world, "other", owner="other")
    for _ in range(3):
        world.cancel(world.submit())
    world.cancel(world.submit())
    with world.database.session() as session:
        deliveries.send_test(session, "other", other)
    parcels = take(world)
    endpoints = [parcel.webhook_id for parcel in parcels]
    assert len(endpoints) == len(set(endpoints))
    assert endpoints.count(other) == 1
    assert len(endpoints) == MAX_AT_ONCE_PER_OWNER + 1
    assert take(world) == []
    note(world, parcels[0], OK)
    (parcel,) = take(world, limit=1)
    assert parcel.webhook_id not in endpoints[1:]


def test_a_sender_that_died_is_replaced_and_comes_too_late(world: World) -> None:
    add_endpoint(world)
    world.cancel(world.submit())
    (first,) = take(world)
    make_due(world, lease_until=db_now(-1))
    (second,) = take(world)
    assert (first.delivery_id, first.num_attempts + 1) == (second.delivery_id, second.num_attempts)
    assert note(world, first, BROKEN).attempts == [], "an attempt that was overtaken changed something"
    assert note(world, second, OK).state == "delivered"


def test_dying_in_the_last_attempt_ends_it(world: World) -> None:
    add_endpoint(world)
    world.cancel(world.submit())
    make_due(world, num_attempts=10)
    assert take(world) == []
    assert [row.state for row in messages(world)] == ["failed"]


def test_two_senders_at_once_share_the_work(world: World) -> None:
    for number in range(8):
        owner = f"owner{number}"
        webhook_id = add_endpoint(world, owner=owner)
        with world.database.session() as session:
            deliveries.send_test(session, owner, webhook_id)
    taken: list[str] = []
    barrier = threading.Barrier(2)

    def run() -> None:
        barrier.wait()
        while parcels := take(world, 2):
            taken.extend(parcel.delivery_id for parcel in parcels)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # On PostgreSQL one may pass over what the other is just taking, and find it at the next look.
    while parcels := take(world, 2):
        taken.extend(parcel.delivery_id for parcel in parcels)
    assert len(taken) == len(set(taken)) == 8


def test_looking_without_anything_due(world: World) -> None:
    add_endpoint(world)
    with world.database.read() as session:
        assert not is_due(session)
    world.cancel(world.submit())
    with world.database.read() as session:
        assert is_due(session)


def test_old_messages_go(world: World) -> None:
    add_endpoint(world)
    world.cancel(world.submit())
    with world.database.session() as session:
        assert forget_deliveries(session, 0) == 0, "one that waits was forgotten"
    note(world, take(world)[0], OK)
    with world.database.session() as session:
        assert forget_deliveries(session, 3600) == 0
        session.execute(update(DeliveryRow).values(finished_at=db_now(-7200)))
        assert forget_deliveries(session, 3600) == 1


def test_a_deleted_job_is_still_told_of(world: World) -> None:
    add_endpoint(world)
    job_id = world.submit()
    world.cancel(job_id)
    with world.database.session() as session:
        jobs.delete_job(session, OWNER, job_id)
    (parcel,) = take(world)
    assert job_id in parcel.body
