"""Clients that are no friends, over raw sockets and curl, against everything as `pare serve` starts it."""

import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest

from tests.faults.watching import watch_peak
from tests.worker.serving import clean_environment, serve

pytestmark = pytest.mark.faults

CLOSED_WITHIN_SECONDS = 45.0
"""Promised are 30 from one look at a connection to the next, which begin at different times; and a slow machine."""
CPU_SECONDS = 1.0
"""That one hostile request may cost."""
LINE = b"\r\n"


@dataclass(frozen=True)
class Live:
    """A service and the process of its API."""

    url: str
    api: int

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", int(self.url.rpartition(":")[2])), timeout=60)

    def cpu_seconds(self) -> float:
        """Return what its API has computed so far."""
        fields = Path(f"/proc/{self.api}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def is_well(self) -> bool:
        return httpx2.get(f"{self.url}/v1/jobs", timeout=20, trust_env=False).status_code == 200


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serve(clean_environment(), tmp_path_factory.mktemp("clients")) as serving:
        yield Live(serving.url, serving.find_api())


def read_to_the_end(connection: socket.socket) -> bytes:
    """Return what comes until the other side closes; TimeoutError where it does not."""
    answer = b""
    with suppress(ConnectionError):
        while more := connection.recv(65536):
            answer += more
    return answer


def send_all(connection: socket.socket, data: bytes) -> None:
    """Send; a service that has had enough closes."""
    with suppress(ConnectionError):
        connection.sendall(data)


POST = b"POST /v1/models HTTP/1.1\r\nHost: localhost\r\n"
MANY_PARTS = b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\nx\r\n' * 10_000 + b"--b--\r\n"
FORM = POST + b"Connection: close\r\nContent-Type: multipart/form-data; boundary=b\r\n"
CHUNKS = b"Transfer-Encoding: chunked\r\n\r\n"
CHUNKED = POST + CHUNKS
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
HOSTILE = {
    "many-headers": b"GET /v1/jobs HTTP/1.1\r\nHost: localhost\r\n" + b"X-A: y\r\n" * 10_000 + LINE,
    "one-huge-header": b"GET /v1/jobs HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 2**20 + LINE * 2,
    "huge-target": b"GET /" + b"a" * 2**20 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "many-parts": FORM + b"Content-Length: %d\r\n\r\n" % len(MANY_PARTS) + MANY_PARTS,
    "huge-preamble": FORM + b"Content-Length: %d\r\n\r\n" % 2**20 + b"p" * 2**20,
    "two-lengths": POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
    "length-and-chunks": POST + b"Content-Length: 4\r\n" + CHUNKS + b"0\r\n\r\n" + SMUGGLED,
    "negative-length": POST + b"Content-Length: -1\r\n\r\n",
    "endless-length": POST + b"Content-Length: " + b"9" * 4000 + b"\r\n\r\n",
    "huge-chunk": CHUNKED + b"f" * 40 + b"\r\n",
    "chunk-extension": CHUNKED + b"1;" + b"e" * 2**20 + b"\r\nx\r\n",
    "other-coding": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "no-version": b"GET /v1/jobs\r\n\r\n",
    "http2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "tls": bytes.fromhex("16030100c8010000c40303") + bytes(200),
    "nul": b"GET /v1/jobs HTTP/1.1\r\nHost: localhost\r\nX: a\0b\r\n\r\n",
    "folded": b"GET /v1/jobs HTTP/1.1\r\nHost: localhost\r\nX: a\r\n\x0bb\r\n\r\n",
    "no-host": b"GET /v1/jobs HTTP/1.1\r\n\r\n",
    "blank-lines": LINE * 100_000,
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_d3_what_is_too_much_or_no_http_is_refused_at_little_cost(live: Live, name: str) -> None:
    before = live.cpu_seconds()
    with live.connect() as connection:
        send_all(connection, HOSTILE[name])
        answer = read_to_the_end(connection)
    assert re.match(rb"HTTP/1.1 4\d\d ", answer), answer[:200]
    assert b"problem+json" in answer
    num_answers = 2 if name == "http2" else 1  # its preface is two requests
    assert answer.count(b"HTTP/1.1 ") == num_answers, "what a request had inside was answered too"
    assert live.is_well()
    assert live.cpu_seconds() - before < CPU_SECONDS


def test_d3_bodies_without_end_take_no_memory(live: Live) -> None:
    """JSON, and a body to where none is taken."""
    for path, status in ((b"/v1/jobs", b"413"), (b"/v1/techniques", b"405")):
        peak = watch_peak(live.api)
        with live.connect() as connection:
            send_all(connection, b"POST %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n%s" % (path, CHUNKS))
            for _ in range(256):
                send_all(connection, b"100000\r\n" + b"[" * 2**20 + LINE)
            answer = read_to_the_end(connection)
        assert answer[9:].startswith(status), answer[:100]
        assert peak() < 64, "MiB"
    assert live.is_well()


def head_and_then(start: bytes, each: bytes) -> Iterator[bytes]:
    yield start
    while True:
        yield each


LENGTH = b"Content-Length: 1000000\r\n\r\n"
JSON = POST.replace(b"models", b"jobs") + b"Content-Type: application/json\r\n"
SLOW = {
    "head": (b"GET /v1/jobs HTTP/1.1\r\nHost: localhost\r\nX: ", b"x"),
    "body": (POST + LENGTH, b"x"),
    "json": (JSON + b"Content-Length: 100000\r\n\r\n", b" "),
    "silence": (b"", b""),
    "body that never comes": (POST + LENGTH, b""),
}


def trickle(connection: socket.socket, data: Iterator[bytes], stopped: threading.Event) -> None:
    """Send a byte each second for as long as it is taken."""
    with suppress(OSError):
        for each in data:
            connection.sendall(each)
            if stopped.wait(1.0):
                return


def read_what_came(connection: socket.socket, answer: bytearray) -> bool:
    """Add to what was read before; return whether the other side has closed."""
    connection.settimeout(0.001)
    try:
        while more := connection.recv(65536):
            answer += more
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


def test_d4_slow_clients_are_sent_away_and_hold_up_nobody(live: Live) -> None:
    stopped = threading.Event()
    with ExitStack() as connections:
        slow = [(kind, connections.enter_context(live.connect()), bytearray()) for kind in SLOW for _ in range(20)]
        threads = [
            threading.Thread(target=trickle, args=(connection, head_and_then(*SLOW[kind]), stopped), daemon=True)
            for kind, connection, _ in slow
        ]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        worst = 0.0
        remaining = slow
        while remaining and time.monotonic() - began < CLOSED_WITHIN_SECONDS:
            asked = time.monotonic()
            assert live.is_well()
            worst = max(worst, time.monotonic() - asked)
            remaining = [each for each in remaining if not read_what_came(*each[1:])]
            time.sleep(0.2)
        stopped.set()
        for thread in threads:
            thread.join(20)
        assert not remaining, f"still open after {CLOSED_WITHIN_SECONDS:g} s: {[kind for kind, *_ in remaining]}"
        for kind, _, answer in slow:
            # Without a whole head there is nothing to answer.
            expected = b"" if kind in ("head", "silence") else b"HTTP/1.1 408 "
            assert bytes(answer[:13]) == expected, (kind, answer[:200])
        assert worst < 10, "somebody else had to wait"


def test_thousands_of_requests_on_one_connection_are_answered_in_order(live: Live) -> None:
    num_requests = 2000
    with live.connect() as connection:
        one = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n"
        sender = threading.Thread(
            target=send_all, args=(connection, (one + LINE) * (num_requests - 1) + one + b"Connection: close\r\n\r\n")
        )
        sender.start()
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
        sender.join(60)
    assert answer.count(b"HTTP/1.1 200 OK") == num_requests


UPGRADE = ["-H", "Connection: Upgrade, HTTP2-Settings", "-H", "Upgrade: h2c", "-H", "HTTP2-Settings: AAMAAABkAAQAAP__"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_uploads_in_each_way_it_can(live: Live, tmp_path: Path) -> None:
    file = tmp_path / "model.pt2"
    text = "x" * 200_000
    file.write_text(text)
    ways = {
        "plain": ["--data-binary", f"@{file}", "-H", "Content-Type: application/octet-stream"],
        "put-like": ["-X", "POST", "-T", str(file)],
        "chunked": ["-X", "POST", "-T", "-", "-H", "Transfer-Encoding: chunked"],
        "expect": ["--data-binary", f"@{file}", "-H", "Expect: 100-continue"],
        "http1.0": ["--http1.0", "--data-binary", f"@{file}"],
        "upgrade": ["--data-binary", f"@{file}", *UPGRADE],
        "slow": ["--limit-rate", "100k", "-X", "POST", "-T", str(file)],
    }
    curl = ["curl", "--silent", "--show-error", "--write-out", "\n%{http_code}"]
    for name, options in ways.items():
        done = subprocess.run(
            [*curl, *options, f"{live.url}/v1/models?name={name}"],
            capture_output=True, text=True, check=True, timeout=60, input=text if name == "chunked" else None,
        )  # fmt: skip
        body, _, status = done.stdout.rpartition("\n")
        assert status == "201", f"{name}: {status} {body} {done.stderr}"
    form = subprocess.run(
        [*curl, "-F", f"file=@{file}", f"{live.url}/v1/models"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert form.stdout.endswith("\n415")
