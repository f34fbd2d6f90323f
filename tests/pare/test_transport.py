"""Retries: only where repeating is harmless, as long as the service asks for, and never hiding what it said."""

import http.server
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from pare.errors import (
    AccessDenied,
    Conflict,
    InvalidRequest,
    NotFound,
    NotReachable,
    Refused,
    TooLarge,
    Unavailable,
    UsageError,
)
from pare.transport import Transport

Answer = tuple[int, dict[str, str], Any]


@dataclass
class Script:
    """A server that gives the answers it was told, in order; the last one again and again. 0 = hang up instead."""

    url: str = ""
    answers: list[Answer] = field(default_factory=list)
    seen: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)


@pytest.fixture
def script() -> Iterator[Script]:
    script = Script()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_anything(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            script.seen.append((self.command, self.path, dict(self.headers), body))
            status, headers, answer = script.answers.pop(0) if len(script.answers) > 1 else script.answers[0]
            self.close_connection = True
            if status == 0:
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_DELETE = do_anything  # noqa: N815 - the names that http.server looks for

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    script.url = f"http://127.0.0.1:{server.server_port}"
    yield script
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def transport(script: Script) -> Iterator[Transport]:
    transport = Transport(script.url)
    yield transport
    transport.close()


HANG_UP: Answer = (0, {}, None)
BUSY: Answer = (
    503,
    {"Retry-After": "0"},
    {"code": "database_busy", "detail": "locked", "fix": "Wait.", "retryable": True},
)
FINE: Answer = (200, {}, {"ok": True})


@pytest.mark.parametrize("trouble", [HANG_UP, BUSY])
def test_a_get_is_repeated_until_it_is_answered(script: Script, transport: Transport, trouble: Any) -> None:
    script.answers = [trouble, trouble, FINE]

    assert transport.get("/v1/jobs") == {"ok": True}
    assert len(script.seen) == 3


def test_a_post_is_not_repeated_after_a_lost_answer_unless_it_says_it_may(script: Script, transport: Transport) -> None:
    script.answers = [HANG_UP, FINE]
    with pytest.raises(NotReachable) as caught:
        transport.request("POST", "/v1/jobs/x/retry")
    assert caught.value.code == "not_reachable"
    assert script.url in caught.value.detail
    assert len(script.seen) == 1

    script.answers = [HANG_UP, FINE]
    assert transport.request("POST", "/v1/jobs", json={"a": 1}, repeatable=True).status_code == 200
    assert [body for _, _, _, body in script.seen[1:]] == [b'{"a":1}', b'{"a":1}']


def test_a_post_is_repeated_when_the_service_says_that_it_did_nothing(script: Script, transport: Transport) -> None:
    script.answers = [BUSY, FINE]

    assert transport.request("POST", "/v1/jobs/x/retry").status_code == 200


def test_the_last_problem_is_what_the_user_reads(script: Script, transport: Transport) -> None:
    script.answers = [BUSY]

    with pytest.raises(Unavailable) as caught:
        transport.get("/v1/jobs")

    assert (caught.value.code, caught.value.detail, caught.value.fix) == ("database_busy", "locked", "Wait.")
    assert len(script.seen) == transport.attempts


def test_a_delete_whose_answer_was_lost_is_done(script: Script, transport: Transport) -> None:
    script.answers = [HANG_UP, (404, {}, {"code": "not_found"})]

    assert transport.request("DELETE", "/v1/jobs/x").status_code == 404


def test_a_delete_of_something_unknown_is_refused(script: Script, transport: Transport) -> None:
    script.answers = [(404, {}, {"code": "not_found", "detail": "no job x"})]

    with pytest.raises(NotFound, match="no job x"):
        transport.request("DELETE", "/v1/jobs/x")


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, InvalidRequest), (409, Conflict), (413, TooLarge), (422, InvalidRequest), (418, Refused), (500, Refused)],
)
def test_a_refusal_is_not_repeated_and_keeps_every_reason(
    script: Script, transport: Transport, status: int, kind: type[Refused]
) -> None:
    errors = [{"pointer": "/recipe/steps/0", "detail": "unknown kind"}]
    problem = {"code": "c", "detail": "d", "fix": "f", "request_id": "r", "errors": errors}
    script.answers = [(status, {"Content-Type": "application/problem+json"}, problem)]

    with pytest.raises(kind) as caught:
        transport.get("/v1/jobs")

    error = caught.value
    assert (error.status, error.code, error.fix, error.request_id) == (status, "c", "f", "r")
    assert "/recipe/steps/0: unknown kind" in str(error)
    assert len(script.seen) == 1


def test_an_answer_that_is_no_problem_document_is_still_an_error(script: Script, transport: Transport) -> None:
    script.answers = [(500, {}, b"<html>proxy says no</html>")]

    with pytest.raises(Refused) as caught:
        transport.get("/")

    assert caught.value.code == "http_500"
    assert "proxy says no" in caught.value.detail


def test_nobody_there_is_said_with_the_address() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(NotReachable) as caught:
            Transport(url, attempts=2).get("/v1/jobs")

    assert url in caught.value.detail
    assert "pare serve" in caught.value.fix


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://[::1"])
def test_what_is_no_address_is_a_usage_error(url: str) -> None:
    with pytest.raises(UsageError):
        Transport(url)


def test_address_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARE_URL", "http://127.0.0.1:1234/")
    assert Transport().url == "http://127.0.0.1:1234"
    assert Transport("http://other").url == "http://other"
    monkeypatch.delenv("PARE_URL")
    assert Transport().url == "http://127.0.0.1:8000"


def test_the_key_goes_with_every_request(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    script.answers = [(200, {}, {})]
    monkeypatch.delenv("PARE_API_KEY", raising=False)
    Transport(script.url).get("/v1/me")
    monkeypatch.setenv("PARE_API_KEY", "pare_from_the_environment\n")
    Transport(script.url).get("/v1/me")
    Transport(script.url, api_key="pare_given").get("/v1/me")
    sent = [headers.get("Authorization") for _, _, headers, _ in script.seen]
    assert sent == [None, "Bearer pare_from_the_environment", "Bearer pare_given"]
    with pytest.raises(UsageError) as refused:
        Transport(script.url, api_key="pare\r\nX-Evil: 1")
    assert "Evil" not in str(refused.value)


@pytest.mark.parametrize("status", [401, 403])
def test_a_missing_key_is_an_error_of_its_own(script: Script, status: int) -> None:
    script.answers = [(status, {}, {"code": "key_missing", "detail": "d", "fix": "f"})]
    with pytest.raises(AccessDenied) as refused:
        Transport(script.url).get("/v1/jobs")
    assert refused.value.code == "key_missing"
    assert len(script.seen) == 1


def test_a_full_store_is_not_asked_again_and_a_full_queue_is(script: Script) -> None:
    full = {"code": "quota_exceeded", "detail": "d", "retryable": False}
    script.answers = [(429, {}, full)]
    with pytest.raises(Unavailable):
        Transport(script.url).request("POST", "/v1/jobs", json={}, repeatable=True)
    assert len(script.seen) == 1
    script.answers = [(429, {"Retry-After": "0"}, {**full, "retryable": True}), (202, {}, {"id": "job"})]
    assert Transport(script.url).request("POST", "/v1/jobs", json={}, repeatable=True).json() == {"id": "job"}


def test_a_first_try_that_is_still_worked_on_is_asked_for_again(script: Script) -> None:
    running = {"code": "idempotency_key_in_use", "detail": "d", "retryable": True}
    script.answers = [(409, {"Retry-After": "0"}, running), (202, {}, {"id": "job"})]
    assert Transport(script.url).request("POST", "/v1/jobs", json={}, repeatable=True).json() == {"id": "job"}
