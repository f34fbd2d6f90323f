"""A service for one machine keeps out web pages that its user looks at."""

import pytest
from starlette.testclient import TestClient

from app.main import create_app
from app.settings import Settings


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("127.0.0.1:8000", None, 201),
        ("localhost:8000", None, 201),
        ("[::1]:8000", None, 201),
        ("127.0.0.1:8000", "http://127.0.0.1:8000", 201),
        ("evil.example:8000", None, 403),
        ("evil.example:8000", "http://evil.example:8000", 403),
        ("127.0.0.1.evil.example", None, 403),
        ("user@evil.example", None, 403),
        ("[127.0.0.1", None, 403),
        ("127.0.0.1:8000", "http://evil.example", 403),
        ("127.0.0.1:8000", "null", 403),
        ("127.0.0.1:8000", "http://127.0.0.1:9999", 403),
    ],
)
def test_requests_that_a_web_page_caused_are_refused(
    settings: Settings, host: str, origin: str | None, status: int
) -> None:
    headers = {"Host": host} | ({"Origin": origin} if origin else {})
    with TestClient(create_app(settings, local_only=True)) as client:
        answer = client.post("/v1/models", content=b"bytes", headers=headers)
        models = client.get("/v1/models", headers={"Host": "127.0.0.1"}).json()["items"]

    assert answer.status_code == status
    assert len(models) == (2 if status == 201 else 1), "the world has one"
    if status == 403:
        assert answer.json()["code"] == "not_local"
        assert answer.json()["request_id"] == answer.headers["x-request-id"]


def test_a_service_for_others_is_called_by_any_name(client: TestClient) -> None:
    assert client.get("/v1/models", headers={"Host": "pare.example", "Origin": "https://ui.example"}).status_code == 200
