"""Webhooks over HTTP: what is shown, what is refused, and to whom a webhook belongs."""

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import update
from starlette.testclient import TestClient

from app.api.owner import current_owner
from app.db.session import Database
from app.db.tables import DeliveryRow, WebhookRow
from app.main import create_app
from app.settings import Settings
from tests.app.jobs.world import World

URL = "https://8.8.8.8/hook"
MISSING = "whk_" + "a" * 26


def create(client: TestClient, **changes: Any) -> dict[str, Any]:
    answer = client.post("/v1/webhooks", json={"url": URL} | changes)
    assert answer.status_code == 201, answer.text
    view: dict[str, Any] = answer.json()
    assert answer.headers["location"] == view["links"]["self"]
    return view


def test_the_secret_is_shown_once(both: tuple[TestClient, World]) -> None:
    client, _ = both
    created = create(client, description="for the team")
    secret = created.pop("secret")
    assert secret.startswith("whsec_")
    shown = client.get(created["links"]["self"]).json()
    assert shown == created
    assert client.get("/v1/webhooks").json()["items"] == [shown]
    assert shown["events"] == ["job.succeeded", "job.failed", "job.cancelled"]
    assert (shown["jobs"], shown["enabled"], shown["disabled_reason"]) == ("all", True, None)


def test_the_secret_can_be_replaced(both: tuple[TestClient, World]) -> None:
    client, _ = both
    created = create(client)
    rotated = client.post(f"{created['links']['self']}/rotate").json()
    assert rotated["secret"] not in (created["secret"], None)
    assert rotated["old_secret_until"] is not None
    at_once = client.post(f"{created['links']['self']}/rotate?overlap_seconds=0").json()
    assert at_once["old_secret_until"] is None
    assert client.post(f"{created['links']['self']}/rotate?overlap_seconds=-1").status_code == 422


@pytest.mark.parametrize(
    "url",
    [
        "http://8.8.8.8/", "https://127.0.0.1/", "https://2130706433/", "https://[::1]/", "https://169.254.169.254/",
        "https://8.8.8.8:22/", "https://a:b@8.8.8.8/", "file:///etc/passwd", "https://[64:ff9b::7f00:1]/", "nonsense",
    ],
)  # fmt: skip
def test_a_url_that_leads_inside_is_refused(client: TestClient, url: str) -> None:
    answer = client.post("/v1/webhooks", json={"url": url})
    assert (answer.status_code, answer.json()["code"]) == (422, "webhook_url_refused")
    assert answer.json()["errors"][0]["pointer"] == "/url"
    created = create(client)
    assert client.patch(created["links"]["self"], json={"url": url}).status_code == 422
    assert client.get(created["links"]["self"]).json()["url"] == URL


def test_changes(both: tuple[TestClient, World]) -> None:
    client, _ = both
    own = create(client)["links"]["self"]
    other = create(client, url="https://8.8.4.4/")
    assert client.patch(own, json={}).json()["url"] == URL
    changed = client.patch(own, json={"events": ["job.running"], "jobs": "named", "url": "https://1.1.1.1/x"}).json()
    assert (changed["events"], changed["jobs"], changed["url"]) == (["job.running"], "named", "https://1.1.1.1/x")
    assert client.patch(own, json={"enabled": False}).json()["disabled_reason"] == "by_owner"
    assert client.post(f"{own}/test").json()["code"] == "webhook_disabled"
    assert client.patch(own, json={"enabled": True}).json()["disabled_reason"] is None
    twin = client.patch(own, json={"url": other["url"]})
    assert (twin.status_code, twin.json()["code"]) == (409, "webhook_exists")
    refused: tuple[dict[str, Any], ...] = (
        {"events": []},
        {"events": ["job.queued"]},
        {"owner": "x"},
        {"secret": "x"},
        {"jobs": None},
    )
    for wrong in refused:
        assert client.patch(own, json=wrong).status_code == 422, wrong
    assert client.delete(own).status_code == 204
    assert client.get(own).status_code == 404


def test_twins_and_too_many_are_refused(client: TestClient) -> None:
    create(client)
    twin = client.post("/v1/webhooks", json={"url": URL})
    assert (twin.status_code, twin.json()["code"]) == (409, "webhook_exists")
    for number in range(19):
        create(client, url=f"{URL}/{number}")
    full = client.post("/v1/webhooks", json={"url": f"{URL}/more"})
    assert (full.status_code, full.json()["code"]) == (409, "too_many_webhooks")
    page = client.get("/v1/webhooks?limit=15").json()
    assert len(page["items"]) == 15
    assert len(client.get(f"/v1/webhooks?limit=15&cursor={page['next_cursor']}").json()["items"]) == 5


def test_messages_are_listed_and_sent_again(both: tuple[TestClient, World]) -> None:
    client, world = both
    own = create(client)["links"]["self"]
    tested = client.post(f"{own}/test")
    assert (tested.status_code, tested.json()["type"], tested.json()["state"]) == (202, "webhook.test", "pending")
    job_id = world.submit()
    world.cancel(job_id)
    items = client.get(f"{own}/deliveries").json()["items"]
    assert {item["type"] for item in items} == {"webhook.test", "job.cancelled"}
    (told,) = [item for item in items if item["job_id"] == job_id]
    assert told["links"]["job"] == f"/v1/jobs/{job_id}"
    with world.database.session() as session:
        session.execute(update(DeliveryRow).values(state="failed", due_at=None, num_attempts=10))
    assert client.get(told["links"]["self"]).json()["state"] == "failed"
    again = client.post(told["links"]["redeliver"])
    assert (again.status_code, again.json()["state"], again.json()["id"]) == (202, "pending", told["id"])
    assert again.json()["next_attempt_at"] is not None
    assert client.get(f"/v1/webhooks/{MISSING}/deliveries").status_code == 404
    assert client.post(f"{own}/deliveries/msg_{'a' * 26}/redeliver").status_code == 404


def test_a_job_names_a_webhook(both: tuple[TestClient, World]) -> None:
    client, world = both
    created = create(client, jobs="named")
    request = {"model_id": world.model_id, "recipe": {"steps": [{"kind": "prune_magnitude"}]}}
    job = client.post("/v1/jobs", json=request | {"webhook_id": created["id"]}).json()
    assert job["webhook_id"] == created["id"]
    client.post(f"/v1/jobs/{job['id']}/cancel")
    (item,) = client.get(created["links"]["deliveries"]).json()["items"]
    assert item["job_id"] == job["id"]
    client.delete(created["links"]["self"])
    assert client.get(f"/v1/jobs/{job['id']}").json()["webhook_id"] is None
    refused = client.post("/v1/jobs", json=request | {"webhook_id": MISSING})
    assert refused.status_code == 422
    assert refused.json()["errors"] == [{"pointer": "/webhook_id", "detail": f"there is no webhook {MISSING}"}]


@pytest.fixture
def stranger(settings: Settings) -> Iterator[TestClient]:
    """A client of another owner, beside `client`."""
    app = create_app(settings)
    app.dependency_overrides[current_owner] = lambda: "stranger"
    with TestClient(app) as client:
        yield client


def test_the_webhooks_of_others_are_not_there(client: TestClient, stranger: TestClient, world: World) -> None:
    created = create(client)
    own = created["links"]["self"]
    message = client.post(f"{own}/test").json()["links"]["self"]
    for method, path in (
        ("GET", own), ("PATCH", own), ("DELETE", own), ("POST", f"{own}/rotate"), ("POST", f"{own}/test"),
        ("GET", f"{own}/deliveries"), ("GET", message), ("POST", f"{message}/redeliver"),
    ):  # fmt: skip
        answer = stranger.request(method, path, json={} if method == "PATCH" else None)
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found"), f"{method} {path}"
    assert stranger.get("/v1/webhooks").json()["items"] == []
    model = world.add_model(owner="stranger")
    request = {"model_id": model, "recipe": {"steps": [{"kind": "prune_magnitude"}]}, "webhook_id": created["id"]}
    assert stranger.post("/v1/jobs", json=request).status_code == 422
    assert client.get(own).json()["enabled"] is True


def test_secrets_stay_out_of_every_other_answer(client: TestClient, sqlite_database: Database) -> None:
    created = create(client)
    with sqlite_database.read() as session:
        row = session.get(WebhookRow, created["id"])
        assert row is not None
    own = created["links"]["self"]
    client.post(f"{own}/test")
    for path in (own, "/v1/webhooks", f"{own}/deliveries"):
        assert created["secret"] not in client.get(path).text
