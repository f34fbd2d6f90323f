"""One attempt: signed as the specification says, sent to where it was checked, never in the receiver's hands."""

import json
import socket
import ssl
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest
from standardwebhooks.webhooks import Webhook

from app.settings import Settings
from app.webhooks.addresses import Destinations, Resolve, resolve_name
from app.webhooks.endpoints import make_secret, require_destination
from app.webhooks.sending import MAX_ANSWER_BYTES, Outcome, Parcel, Sender, parse_retry_after, sign
from pare.errors import WebhookInvalid
from pare.webhooks import verify_webhook
from tests.app.webhooks.receiver import Answer, Receiver, say

SECRET, OLD_SECRET = make_secret(), make_secret()
BODY = json.dumps({"type": "job.succeeded", "data": {"job_id": "job_x"}})


def parcel(url: str, *secrets: str) -> Parcel:
    return Parcel("msg_1", "whk_1", 1, url, BODY, secrets or (SECRET,))


def open_sender(
    tmp_path: Path, port: int, resolve: Resolve = resolve_name, *, tls: ssl.SSLContext | None = None,
    timeout_seconds: float = 15.0,
) -> Sender:  # fmt: skip
    """A sender that may reach 127.0.0.1, at one port."""
    settings = Settings(
        data_dir=tmp_path, webhook_schemes=("http", "https"), webhook_ports=(port,),
        webhook_networks=(IPv4Network("127.0.0.1/32"),),
    )  # fmt: skip
    return Sender(Destinations(settings, resolve), tls=tls, timeout_seconds=timeout_seconds)


def send_to(tmp_path: Path, answer: Answer, timeout_seconds: float = 15.0) -> tuple[Outcome, Receiver]:
    with Receiver(answer) as receiver:
        outcome = open_sender(tmp_path, receiver.port, timeout_seconds=timeout_seconds).send(parcel(receiver.url))
    return outcome, receiver


def test_what_arrives_is_signed_and_verifies(tmp_path: Path) -> None:
    outcome, receiver = send_to(tmp_path, say(204))
    assert (outcome.status, outcome.error, outcome.is_delivered) == (204, None, True)
    (got,) = receiver.received
    assert got.line == "POST /hook HTTP/1.1"
    assert got.headers["host"] == f"127.0.0.1:{receiver.port}"
    assert got.headers["content-type"] == "application/json"
    assert got.headers["webhook-id"] == "msg_1"
    assert "authorization" not in got.headers
    assert "cookie" not in got.headers
    assert verify_webhook(SECRET, got.headers, got.body) == json.loads(BODY)


def test_signature_is_that_of_the_specification() -> None:
    # The example of the specification's reference library.
    message = Parcel(
        "msg_p5jXN8AQM9LWM0D4loKWxJek", "w", 1, "u", '{"test": 2432232314}',
        ("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",),
    )  # fmt: skip
    headers = sign(message, datetime.fromtimestamp(1614265330, UTC))
    assert headers == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


def test_both_secrets_verify_while_one_replaces_the_other() -> None:
    headers = sign(parcel("u", SECRET, OLD_SECRET), datetime.now(UTC))
    for secret in (SECRET, OLD_SECRET):
        assert verify_webhook(secret, headers, BODY.encode())
    with pytest.raises(WebhookInvalid):
        verify_webhook(make_secret(), headers, BODY)


@pytest.mark.parametrize(
    "change",
    [
        {"webhook-id": "msg_2"},
        {"webhook-timestamp": "+60"},
        {"webhook-timestamp": "x"},
        {"webhook-signature": "v1,AAAA"},
        {"webhook-signature": "v2,AAAA v1a,AAAA"},
        {"webhook-signature": "nothing"},
        {"webhook-signature": "v1,%%%"},
        {"webhook-signature": ""},
    ],
)
def test_changed_headers_do_not_verify(change: dict[str, str]) -> None:
    if change.get("webhook-timestamp") == "+60":
        change = {"webhook-timestamp": str(int(time.time()) + 60)}
    headers = sign(parcel("u"), datetime.now(UTC)) | change
    with pytest.raises(WebhookInvalid):
        verify_webhook(SECRET, headers, BODY)


@pytest.mark.parametrize("body", [BODY + " ", BODY.replace("job_x", "job_y"), b"\xff\xfe", b""])
def test_a_changed_body_does_not_verify(body: str | bytes) -> None:
    with pytest.raises(WebhookInvalid):
        verify_webhook(SECRET, sign(parcel("u"), datetime.now(UTC)), body)


@pytest.mark.parametrize("minutes", [-10, 10])
def test_an_old_message_is_not_taken_again(minutes: int) -> None:
    headers = sign(parcel("u"), datetime.now(UTC) + timedelta(minutes=minutes))
    with pytest.raises(WebhookInvalid, match="too"):
        verify_webhook(SECRET, headers, BODY)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_a_failure_and_is_not_followed(tmp_path: Path, status: int) -> None:
    with Receiver(say(200)) as internal:
        outcome, _ = send_to(tmp_path, say(status, f"Location: {internal.url}"))
    assert (outcome.status, outcome.is_delivered) == (status, False)
    assert internal.num_connections == 0


def test_a_name_that_changes_its_address_leads_nowhere(tmp_path: Path) -> None:
    """DNS rebinding: public when the webhook is created, inside when a message is sent."""
    answers = iter([["8.8.8.8"], ["127.0.0.1"], ["8.8.8.8", "127.0.0.1"]])
    with Receiver(say(200)) as internal:
        settings = Settings(data_dir=tmp_path, webhook_schemes=("http",), webhook_ports=(internal.port,))
        destinations = Destinations(settings, lambda _host, _port: next(answers))
        require_destination(destinations, f"http://rebinding.example:{internal.port}/")
        for _ in range(2):
            outcome = Sender(destinations).send(parcel(f"http://rebinding.example:{internal.port}/"))
            assert outcome.error == "destination_refused"
    assert internal.num_connections == 0


def test_the_connection_goes_to_the_address_that_was_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the system resolves the name to a moment later, nothing asks it."""
    asked: list[str] = []

    def resolve_once(host: str, _port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["127.0.0.2"]

    real = socket.getaddrinfo
    names: list[object] = []

    def watch(host: str, *rest: Any, **more: Any) -> Any:
        names.append(host)
        return real(host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", watch)
    with Receiver(say(200)) as receiver:
        sender = open_sender(tmp_path, receiver.port, resolve_once)
        outcome = sender.send(parcel(f"http://hook.example:{receiver.port}/"))
    assert outcome.status == 200
    assert asked == ["hook.example"]
    assert set(names) <= {"127.0.0.1"}
    assert receiver.received[0].headers["host"] == f"hook.example:{receiver.port}"


def test_proxies_of_the_environment_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Receiver(say(200)) as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        outcome, _ = send_to(tmp_path, say(200))
    assert outcome.status == 200
    assert proxy.num_connections == 0


def resolve_here(_host: str, _port: int) -> Sequence[str]:
    return ["127.0.0.1"]


def drip(connection: socket.socket) -> None:
    """Send a head that never ends, one byte at a time."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    while True:
        connection.sendall(b"a")
        time.sleep(0.05)


def flood(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        connection.sendall(b"X-Header: " + b"a" * 60_000 + b"\r\n")


def answer_with_flood(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")
    while True:
        connection.sendall(b"a" * 65536)


def greet_like_ssh(connection: socket.socket) -> None:
    connection.sendall(b"SSH-2.0-OpenSSH\r\n")


def hang_up(connection: socket.socket) -> None:
    connection.shutdown(socket.SHUT_RDWR)


def stay_silent(connection: socket.socket) -> None:
    connection.recv(1)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (drip, "timeout"),
        (stay_silent, "timeout"),
        (flood, "bad_answer"),
        (greet_like_ssh, "bad_answer"),
        (hang_up, "bad_answer"),
    ],
    ids=["drips", "silent", "floods", "not_http", "closes"],
)
def test_a_bad_receiver_costs_a_bounded_time(tmp_path: Path, answer: Answer, expected: str) -> None:
    started_at = time.monotonic()
    outcome, _ = send_to(tmp_path, answer, timeout_seconds=1.0)
    assert (outcome.status, outcome.error, outcome.is_delivered) == (None, expected, False)
    assert time.monotonic() - started_at < 10


def test_an_endless_body_is_not_read(tmp_path: Path) -> None:
    outcome, _ = send_to(tmp_path, answer_with_flood)
    assert outcome.status == 200
    assert MAX_ANSWER_BYTES < 10**6


def test_nobody_listens(tmp_path: Path) -> None:
    with Receiver(say(200)) as receiver:
        pass
    assert open_sender(tmp_path, receiver.port).send(parcel(receiver.url)).error == "connection_failed"


def test_a_certificate_that_is_not_trusted_or_for_another_name_is_refused(
    tmp_path: Path, certificate: tuple[Path, Path]
) -> None:
    served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    served.load_cert_chain(*certificate)
    trusting = ssl.create_default_context(cafile=str(certificate[0]))
    with Receiver(say(200), tls=served) as receiver:
        url = f"https://hook.example:{receiver.port}/"
        assert open_sender(tmp_path, receiver.port, resolve_here).send(parcel(url)).error == "tls_failed"
        sender = open_sender(tmp_path, receiver.port, resolve_here, tls=trusting)
        assert sender.send(parcel(url)).status == 200, "the name in the URL is the one of the certificate"
        other = sender.send(parcel(f"https://other.example:{receiver.port}/"))
        assert other.error == "tls_failed"
    assert len(receiver.received) == 1


@pytest.mark.parametrize(("text", "seconds"), [("120", 120.0), ("0", 0.0), ("", None), ("soon", None), ("-5", None)])
def test_retry_after_is_read(text: str, seconds: float | None) -> None:
    assert parse_retry_after(text) == seconds


def test_retry_after_can_be_a_date() -> None:
    found = parse_retry_after(format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True))
    assert found is not None
    assert 80 < found <= 90
    assert parse_retry_after("Thu, 01 Jan 1970 00:00:00 GMT") == 0


def test_the_reference_library_accepts_what_we_sign() -> None:
    headers = sign(parcel("u"), datetime.now(UTC))
    assert Webhook(SECRET).verify(BODY, headers) == json.loads(BODY)
