"""Lists: newest first, in pages that stay true while rows come and go."""

from base64 import urlsafe_b64encode
from hashlib import sha256

import pytest
from starlette.testclient import TestClient

from app.api.cursors import CHECK_CHARACTERS, decode_cursor, encode_cursor
from app.errors import InvalidRequest
from tests.app.jobs.world import World

Both = tuple[TestClient, World]


def test_pages_cover_everything_once_newest_first(both: Both) -> None:
    client, world = both
    made = [world.submit() for _ in range(7)]
    seen: list[str] = []
    cursor = None
    pages = 0
    while True:
        page = client.get("/v1/jobs", params={"limit": 3} | ({"cursor": cursor} if cursor else {})).json()
        seen += [item["id"] for item in page["items"]]
        pages += 1
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert sorted(seen) == sorted(made)
    times = [client.get(f"/v1/jobs/{job_id}").json()["created_at"] for job_id in seen]
    assert times == sorted(times, reverse=True)
    assert pages == 3


def test_rows_that_come_and_go_shift_nothing(both: Both) -> None:
    client, world = both
    made = [world.submit() for _ in range(9)]
    seen: list[str] = []
    cursor = None
    removed: str | None = None
    while True:
        page = client.get("/v1/jobs", params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
        seen += [item["id"] for item in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
        world.submit()  # newer than all pages still to come
        if removed is None:  # the very row that the cursor names
            removed = seen[-1]
            world.cancel(removed)
            assert client.delete(f"/v1/jobs/{removed}").status_code == 204
    assert len(seen) == len(set(seen))
    assert sorted(seen) == sorted(made)


def test_last_page_is_known_to_be_the_last(client: TestClient, world: World) -> None:
    for _ in range(4):
        world.submit()
    first = client.get("/v1/jobs?limit=2").json()
    second = client.get("/v1/jobs", params={"limit": 2, "cursor": first["next_cursor"]}).json()
    assert (len(second["items"]), second["next_cursor"]) == (2, None)


@pytest.mark.parametrize("noun", ["models", "datasets", "jobs"])
@pytest.mark.parametrize("cursor", ["x", ".", "%00", "W10.0", "\u00e4", "a" * 300])
def test_made_up_cursors_are_400(client: TestClient, noun: str, cursor: str) -> None:
    answer = client.get(f"/v1/{noun}", params={"cursor": cursor})
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_cursor")


def test_cursor_of_another_list_and_changed_cursors_are_400(client: TestClient, world: World) -> None:
    for _ in range(2):
        world.add_model()
    cursor = client.get("/v1/models?limit=1").json()["next_cursor"]
    assert client.get("/v1/models", params={"cursor": cursor}).status_code == 200
    assert client.get("/v1/jobs", params={"cursor": cursor}).status_code == 400
    for position in range(len(cursor)):
        changed = cursor[:position] + ("A" if cursor[position] != "A" else "B") + cursor[position + 1 :]
        if changed.partition(".")[0] != cursor.partition(".")[0] or changed[-16:] != cursor[-16:]:
            with pytest.raises(InvalidRequest):
                decode_cursor("models", changed)
    assert encode_cursor("models", *decode_cursor("models", cursor)) == cursor


FORGED = ["[1,2]", '["x","y"]', "{}", '["2020-01-01T00:00:00","a"]', '["9999-12-31T23:59:59-12:00","a"]',
          '["2020-01-01T00:00:00+00:00","\\u0000"]']  # fmt: skip


@pytest.mark.parametrize("content", FORGED)
def test_a_forged_cursor_with_the_right_checksum_is_refused(both: Both, content: str) -> None:
    encoded = urlsafe_b64encode(content.encode()).decode().rstrip("=")
    checksum = sha256(b"jobs\0" + content.encode()).hexdigest()[:CHECK_CHARACTERS]

    answer = both[0].get("/v1/jobs", params={"cursor": f"{encoded}.{checksum}"})

    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_cursor")
