"""Idempotency-Key: one job for each key, however often and however concurrently it is sent."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.api.idempotency import answer_once, forget_expired, parse_key
from app.db.clock import db_now
from app.db.tables import IdempotencyRow
from app.errors import IdempotencyMismatch, InvalidRequest, Unavailable
from tests.app.jobs.world import World

Both = tuple[TestClient, World]


def submit(both: Both, key: str | None, **changes: Any) -> Any:
    client, world = both
    body = {"model_id": world.model_id, "recipe": {"steps": [{"kind": "prune_magnitude"}]}, **changes}
    return client.post("/v1/jobs", json=body, headers={"Idempotency-Key": key} if key is not None else {})


def count_jobs(both: Both) -> int:
    return len(both[0].get("/v1/jobs").json()["items"])


def test_repeat_gets_the_first_answer_and_makes_no_second_job(both: Both) -> None:
    first, second = submit(both, '"k1"'), submit(both, '"k1"')
    assert first.status_code == second.status_code == 202
    assert first.content == second.content
    assert first.headers["location"] == second.headers["location"] == first.json()["links"]["self"]
    assert "idempotency-replayed" not in first.headers
    assert second.headers["idempotency-replayed"] == "true"
    assert count_jobs(both) == 1
    assert len(both[1].outbox()) == 1


def test_repeat_after_the_job_moved_on_still_gets_the_first_answer(both: Both) -> None:
    first = submit(both, "k1")
    both[1].cancel(first.json()["id"])
    assert submit(both, "k1").json()["status"] == "queued"


def test_quoted_and_bare_are_the_same_key_and_spelled_out_defaults_the_same_request(both: Both) -> None:
    first = submit(both, "k1")
    same = submit(both, '"k1"', priority=0, labels={})
    assert same.json()["id"] == first.json()["id"]


def test_other_request_with_the_same_key_is_refused(both: Both) -> None:
    submit(both, "k1")
    answer = submit(both, "k1", priority=1)
    assert (answer.status_code, answer.json()["code"]) == (422, "idempotency_key_reused")
    assert count_jobs(both) == 1


def test_other_key_is_another_job(both: Both) -> None:
    assert submit(both, "k1").json()["id"] != submit(both, "k2").json()["id"]
    assert submit(both, None).json()["id"] != submit(both, None).json()["id"]
    assert count_jobs(both) == 4


def test_twenty_at_once_make_one_job(both: Both) -> None:
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: submit(both, "k1"), range(20)))
    made = [answer for answer in answers if answer.status_code == 202]
    refused = [answer for answer in answers if answer.status_code != 202]
    assert len({answer.content for answer in made}) == 1
    assert sum("idempotency-replayed" not in answer.headers for answer in made) == 1
    assert {(answer.status_code, answer.json()["code"]) for answer in refused} <= {(409, "idempotency_key_in_use")}
    assert count_jobs(both) == 1


def test_repeat_is_refused_while_the_first_is_worked_on(both: Both) -> None:
    """SQLite lets the second wait for the first; on PostgreSQL it hears so at once."""
    _, world = both
    if world.database.dialect != "postgresql":
        pytest.skip("one transaction writes at a time")
    with world.database.session() as session:
        begun = answer_once(
            session, owner="local", route="POST /v1/jobs", key="k1", request="first", work=lambda: (202, "{}")
        )
        assert not begun.replayed
        answer = submit(both, "k1")
        assert (answer.status_code, answer.json()["code"]) == (409, "idempotency_key_in_use")
        assert answer.headers["retry-after"] == "1"
        assert submit(both, "k2").status_code == 202
        session.rollback()
    assert submit(both, "k1").status_code == 202


def test_repeat_is_answered_while_another_repeat_is(both: Both) -> None:
    _, world = both
    if world.database.dialect != "postgresql":
        pytest.skip("one transaction writes at a time")
    first = submit(both, "k1")
    mine = {"owner": "local", "route": "POST /v1/jobs", "key": "k1"}
    with world.database.session() as session:
        with pytest.raises(IdempotencyMismatch):
            answer_once(session, **mine, request="another", work=lambda: (202, "{}"))
        assert submit(both, "k1").content == first.content


def test_expired_answer_is_not_given_while_the_key_is_used_anew(both: Both) -> None:
    _, world = both
    if world.database.dialect != "postgresql":
        pytest.skip("one transaction writes at a time")
    submit(both, "k1")
    with world.database.session() as session:
        session.get_one(IdempotencyRow, ("local", "POST /v1/jobs", "k1")).created_at = db_now(-24 * 3600 - 1)
    with world.database.session() as session:
        answer_once(session, owner="local", route="POST /v1/jobs", key="k1", request="first", work=lambda: (202, "{}"))
        assert submit(both, "k1").json()["code"] == "idempotency_key_in_use"


def test_distillations_have_keys_of_their_own(both: Both) -> None:
    submit(both, "k1")
    data = {"dataset_id": "dst_" + "a" * 26, "inputs": {"x": {"column": "image"}}}
    body = {"model_id": both[1].model_id, "distillation": {"student": {"kind": "derive_student"}, "data": data}}
    answer = both[0].post("/v1/distillations", json=body, headers={"Idempotency-Key": "k1"})
    assert answer.json()["code"] == "invalid_request", "judged by itself, not as a repeat of the job's request"


def test_server_errors_are_not_kept(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise Unavailable

    with monkeypatch.context() as broken:
        broken.setattr("app.api.jobs.describe_one", fail)
        assert submit(both, "k1").status_code == 503
    assert count_jobs(both) == 0
    again = submit(both, "k1")
    assert again.status_code == 202
    assert "idempotency-replayed" not in again.headers


def test_refused_request_leaves_its_key_free(both: Both) -> None:
    refused = submit(both, "k1", model_id="mdl_" + "a" * 26)
    assert refused.status_code == 422
    assert submit(both, "k1").status_code == 202


def test_keys_of_others_are_not_ours(both: Both) -> None:
    submit(both, "k1")
    with both[1].database.session() as session:
        row = session.get_one(IdempotencyRow, ("local", "POST /v1/jobs", "k1"))
        row.owner = "somebody else"
        row.body = "theirs"
    assert submit(both, "k1").json()["status"] == "queued"
    assert count_jobs(both) == 2


def test_key_is_free_again_after_a_day(both: Both) -> None:
    first = submit(both, "k1")
    with both[1].database.session() as session:
        session.get_one(IdempotencyRow, ("local", "POST /v1/jobs", "k1")).created_at = db_now(-24 * 3600 - 1)
    assert submit(both, "k1").json()["id"] != first.json()["id"]


def test_old_answers_are_forgotten(both: Both) -> None:
    submit(both, "old")
    submit(both, "new")
    with both[1].database.session() as session:
        session.get_one(IdempotencyRow, ("local", "POST /v1/jobs", "old")).created_at = db_now(-24 * 3600 - 1)
    with both[1].database.session() as session:
        forget_expired(session)
    with both[1].database.read() as session:
        assert session.get(IdempotencyRow, ("local", "POST /v1/jobs", "old")) is None
        assert session.get(IdempotencyRow, ("local", "POST /v1/jobs", "new")) is not None


@pytest.mark.parametrize("key", ["", '""', "x" * 256, '"' + "x" * 256 + '"', '"open', "a b", "a,b", 'a"b'])
def test_bad_keys_are_400(both: Both, key: str) -> None:
    answer = submit(both, key)
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_idempotency_key")
    assert count_jobs(both) == 0


@pytest.mark.parametrize(
    ("header", "key"),
    [("abc", "abc"), ('"abc"', "abc"), (' "a b" ', "a b"), (r'"a\"b\\c"', r'a"b\c'), ("x" * 255, "x" * 255)],
)
def test_parsing(header: str, key: str) -> None:
    assert parse_key(header) == key


def test_parsing_refuses_what_is_not_ascii() -> None:
    with pytest.raises(InvalidRequest):
        parse_key("\u00e4")
