"""Events: pages, and streams that can be cut and resumed without a gap or a twin."""

import asyncio
import json
import threading
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from app.api.event_stream import stream_events
from app.jobs import record_progress
from app.recipes.plan import Progress
from tests.app.api.conftest import serve, wait_until
from tests.app.jobs.world import REFUSAL, World

STREAM = {"Accept": "text/event-stream"}


def read_stream(text: str) -> list[dict[str, Any]]:
    """Parse a stream's messages; comments and `retry` are left out."""
    messages = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if ": " in line and not line.startswith(":"))
        if "data" in fields:
            messages.append({"seq": int(fields["id"]), "kind": fields["event"], "data": json.loads(fields["data"])})
    return messages


def finish(world: World, num_progress: int = 3) -> str:
    """Run a job to its (bad) end, with some progress on the way."""
    claim = world.start()
    for index in range(num_progress):
        with world.database.session() as session:
            progress = Progress(stage="train", fraction=index / num_progress, message=f"line {index}\nnext")
            assert record_progress(session, claim.job_id, claim.epoch, progress)
    world.fail(claim, REFUSAL)
    return claim.job_id


def test_page_and_stream_tell_the_same(both: tuple[TestClient, World]) -> None:
    client, world = both
    job_id = finish(world)
    page = client.get(f"/v1/jobs/{job_id}/events").json()
    assert [item["seq"] for item in page["items"]] == [1, 2, 3, 4, 5, 6]
    assert [item["kind"] for item in page["items"]] == ["state", "state", *["progress"] * 3, "state"]
    assert (page["last_seq"], page["finished"]) == (6, True)
    answer = client.get(f"/v1/jobs/{job_id}/events", headers=STREAM)
    assert answer.headers["content-type"].startswith("text/event-stream")
    shown = [{name: item[name] for name in ("seq", "kind", "data")} for item in page["items"]]
    assert read_stream(answer.text) == shown


def test_pages_follow_each_other(client: TestClient, world: World) -> None:
    job_id = finish(world)
    url = f"/v1/jobs/{job_id}/events"
    first = client.get(f"{url}?limit=4").json()
    rest = client.get(f"{url}?after={first['items'][-1]['seq']}").json()
    assert [item["seq"] for item in first["items"] + rest["items"]] == [1, 2, 3, 4, 5, 6]
    assert client.get(f"{url}?after=6").json()["items"] == []


@pytest.mark.parametrize(("last_id", "first_seq"), [("3", 4), ("0", 1), ("99", 1), ("x", 1), ("-1", 1), ("9" * 99, 1)])
def test_stream_resumes_and_replays_all_after_an_unknown_id(
    client: TestClient, world: World, last_id: str, first_seq: int
) -> None:
    job_id = finish(world)
    answer = client.get(f"/v1/jobs/{job_id}/events", headers={**STREAM, "Last-Event-ID": last_id})
    assert [item["seq"] for item in read_stream(answer.text)] == list(range(first_seq, 7))


def test_stream_resumed_after_the_last_event_is_204(client: TestClient, world: World) -> None:
    job_id = finish(world)
    answer = client.get(f"/v1/jobs/{job_id}/events", headers={**STREAM, "Last-Event-ID": "6"})
    assert (answer.status_code, answer.content) == (204, b"")


def test_stream_of_no_job_is_404(client: TestClient) -> None:
    answer = client.get(f"/v1/jobs/job_{'a' * 26}/events", headers=STREAM)
    assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")


def test_stream_of_a_retried_job_goes_past_its_earlier_end(client: TestClient, world: World) -> None:
    job_id = finish(world)
    client.post(f"/v1/jobs/{job_id}/retry")
    world.cancel(job_id)
    states = [
        item["data"].get("state")
        for item in read_stream(client.get(f"/v1/jobs/{job_id}/events", headers=STREAM).text)
        if item["kind"] == "state"
    ]
    assert states == ["queued", "running", "failed", "queued", "cancelled"]


def test_cut_streams_have_no_gap_while_events_are_written(live: httpx2.Client, world: World) -> None:
    claim = world.start()
    num_events = 120

    def write() -> None:
        for index in range(num_events):
            with world.database.session() as session:
                record_progress(
                    session, claim.job_id, claim.epoch, Progress(stage="train", fraction=index / num_events)
                )
        world.fail(claim, REFUSAL)

    writer = threading.Thread(target=write)
    writer.start()
    seen: list[int] = []
    cuts = 0
    url = f"/v1/jobs/{claim.job_id}/events"
    while True:
        headers = STREAM | ({"Last-Event-ID": str(seen[-1])} if seen else {})
        with live.stream("GET", url, headers=headers) as answer:
            if answer.status_code == 204:
                break
            messages = (message for message in httpx2.EventSource(answer) if message.data)
            for taken, message in enumerate(messages, start=1):
                seen.append(int(message.id))
                if taken == 17:
                    cuts += 1
                    break  # leaves the connection as a client does that dies
    writer.join()
    assert seen == list(range(1, num_events + 4))
    assert cuts >= 7


def test_silence_is_broken_by_comments(app: FastAPI, world: World) -> None:
    job_id = world.submit()

    async def listen() -> list[str]:
        parts = []
        async for part in stream_events(app.state.service, "local", job_id, 1, keep_alive_seconds=0.0):
            parts.append(part)
            if len(parts) == 3:
                break
        return parts

    assert asyncio.run(listen()) == ["retry: 1000\n\n", ": keep-alive\n\n", ": keep-alive\n\n"]


def test_open_stream_does_not_hold_a_server_that_stops(app: FastAPI, world: World) -> None:
    job_id = world.submit()
    with serve(app) as (url, server), httpx2.Client(base_url=url, timeout=60, trust_env=False) as client:
        with client.stream("GET", f"/v1/jobs/{job_id}/events", headers=STREAM) as answer:
            lines = answer.iter_lines()
            while next(lines) != "id: 1":
                pass
            server.handle_exit(15, None)
            list(lines)  # the stream ends in order, not broken
        wait_until(lambda: not server.servers or not server.servers[0].is_serving())
