"""Clients that are no friends, over raw sockets and curl, against everything as `pare serve` starts it."""

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest

from tests.worker.conftest import wait_until
from tests.worker.test_serve import START, find_service, read_url

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
    port: int
    api: int

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def cpu_seconds(self) -> float:
        """Return what its API has computed so far."""
        fields = Path(f"/proc/{self.api}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_bytes(self) -> int:
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{self.api}/status").read_text())
        assert found is not None
        return int(found[1]) * 1024

    def is_well(self) -> bool:
        return httpx2.get(f"{self.url}/v1/jobs", timeout=20, trust_env=False).status_code == 200


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    directory = tmp_path_factory.mktemp("clients")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PARE_")}
    with (directory / "serve.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", START, str(directory / "data")],
            stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
        )  # fmt: skip
    try:
        url = read_url(process)
        apis = subprocess.run(
            ["pgrep", "-P", str(process.pid), "-f", "m app$"], capture_output=True, text=True, check=True
        )
        yield Live(url, int(url.rpartition(":")[2]), int(apis.stdout))
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()
        wait_until(lambda: not find_service(directory), 60, "the end of every process")


def read_answer(connection: socket.socket) -> bytes:
    """Return what comes until the other side closes, or the first answer is whole."""
    answer = b""
    with suppress(ConnectionError):
        while more := connection.recv(65536):
            answer += more
            head, end, body = answer.partition(LINE * 2)
            length = re.search(rb"content-length: (\d+)", head.lower())
            if end and length and len(body) >= int(length[1]):
                break
    return answer


def send_all(connection: socket.socket, data: bytes) -> None:
    """Send; a service that has had enough closes."""
    with suppress(ConnectionError):
        connection.sendall(data)


POST = b"POST /v1/models HTTP/1.1\r\nHost: localhost\r\n"
MANY_PARTS = b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\nx\r\n' * 10_000 + b"--b--\r\n"
FORM = POST + b"Content-Type: multipart/form-data; boundary=b\r\n"
CHUNKS = b"Transfer-Encoding: chunked\r\n\r\n"
CHUNKED = POST + CHUNKS
HOSTILE = {
    "many-headers": b"GET /v1/jobs HTTP/1.1\r\nHost: localhost\r\n" + b"X-A: y\r\n" * 10_000 + LINE,
    "one-huge-header": b"GET /v1/jobs HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 2**20 + LINE * 2,
    "huge-target": b"GET /" + b"a" * 2**20 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "many-parts": FORM + b"Content-Length: %d\r\n\r\n" % len(MANY_PARTS) + MANY_PARTS,
    "huge-preamble": FORM + b"Content-Length: %d\r\n\r\n" % 2**20 + b"p" * 2**20,
    "two-lengths": POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
    "length-and-chunks": POST + b"Content-Length: 4\r\n" + CHUNKS + b"0\r\n\r\nGET /smuggled HTTP/1.1\r\n",
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
        with suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
        answer = read_answer(connection)
    assert re.match(rb"HTTP/1.1 4\d\d ", answer) or not answer, answer[:200]
    assert b"problem+json" in answer or not answer
    assert b"smuggled" not in answer
    assert b"HTTP/1.1 2" not in answer
    assert live.is_well()
    assert live.cpu_seconds() - before < CPU_SECONDS


def test_d3_bodies_without_end_take_no_memory(live: Live) -> None:
    """JSON, and an upload of a length that it does not keep to."""
    before = live.memory_bytes()
    for path, status in ((b"/v1/jobs", b"413"), (b"/v1/techniques", b"4")):
        with live.connect() as connection:
            send_all(connection, b"POST %s HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" % path)
            for _ in range(256):
                send_all(connection, b"100000\r\n" + b"[" * 2**20 + LINE)
            answer = read_answer(connection)
        assert answer[9:].startswith(status) or not answer, answer[:100]
    assert live.memory_bytes() - before < 64 * 2**20
    assert live.is_well()


def trickle(connection: socket.socket, data: Iterator[bytes], stopped: threading.Event) -> None:
    """Send a byte each second for as long as it is taken."""
    with suppress(OSError):
        for each in data:
            connection.sendall(each)
            if stopped.wait(1.0):
                return


def endless_head() -> Iterator[bytes]:
    yield b"GET /v1/jobs HTTP/1.1\r\nHost: localhost\r\nX: "
    while True:
        yield b"x"


def endless_body() -> Iterator[bytes]:
    yield POST + b"Content-Length: 1000000\r\n\r\n"
    while True:
        yield b"x"


def endless_json() -> Iterator[bytes]:
    yield POST.replace(b"models", b"jobs") + b"Content-Type: application/json\r\nContent-Length: 100000\r\n\r\n"
    while True:
        yield b" "


def silence() -> Iterator[bytes]:
    yield b""
    while True:
        yield b""


def closed_body() -> Iterator[bytes]:
    """Announced, and never sent."""
    yield POST + b"Content-Length: 1000000\r\n\r\n"
    while True:
        yield b""


SLOW = (endless_head, endless_body, endless_json, silence, closed_body)


def test_d4_slow_clients_are_sent_away_and_hold_up_nobody(live: Live) -> None:
    stopped = threading.Event()
    with ExitStack() as connections:
        slow = [(kind, connections.enter_context(live.connect())) for kind in SLOW for _ in range(20)]
        threads = [
            threading.Thread(target=trickle, args=(connection, kind(), stopped), daemon=True)
            for kind, connection in slow
        ]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        worst = 0.0
        remaining = dict(enumerate(slow))
        while remaining and time.monotonic() - began < CLOSED_WITHIN_SECONDS:
            asked = time.monotonic()
            assert live.is_well()
            worst = max(worst, time.monotonic() - asked)
            for index, (_, connection) in list(remaining.items()):
                connection.settimeout(0.001)
                with suppress(TimeoutError):
                    answer = read_to_the_end(connection)
                    assert not answer or answer.startswith((b"HTTP/1.1 408 ", b"HTTP/1.1 400 ")), answer[:200]
                    del remaining[index]
            time.sleep(0.2)
        stopped.set()
        for thread in threads:
            thread.join(20)
        assert not remaining, (
            f"still open after {CLOSED_WITHIN_SECONDS:g} s: {[kind for kind, _ in remaining.values()]}"
        )
        assert worst < 10, "somebody else had to wait"


def read_to_the_end(connection: socket.socket) -> bytes:
    """Return what came before the other side closed; TimeoutError where it has not."""
    answer = b""
    try:
        while more := connection.recv(65536):
            answer += more
    except ConnectionError:
        pass
    return answer


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
