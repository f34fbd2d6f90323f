"""Clients that send one request after the other on connections that stay open, as fast as they are answered.

They are threads of one process of their own, on plain sockets: `http.client` and the like need as long for a request as
the service. What the process can do at most is measured too (`ceiling` in benchmarks/load/rates.py).
"""

import multiprocessing
import re
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import cycle
from uuid import uuid4

FRESH = b"@" * 32
"""In a request: every time other text of this length."""
WARM_UP_SECONDS = 0.5
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class Plan:
    """What to send, and for how long."""

    port: int
    requests: tuple[tuple[bytes, ...], ...]
    """For each connection the requests that it sends in turn, for ever."""
    status: int
    """The only answer that is right."""
    seconds: float


@dataclass
class Outcome:
    """What came of a plan after a warm-up."""

    seconds: float
    num_sent: int = 0
    """Requests of the warm-up included."""
    milliseconds: list[float] = field(default_factory=list)
    """From the first byte of a request to the last of its answer."""

    @property
    def per_second(self) -> float:
        """Requests answered in a second."""
        return len(self.milliseconds) / self.seconds


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value that this share of all is not above."""
    ordered = sorted(values)
    return ordered[max(0, round(share * len(ordered)) - 1)]


def start_clients() -> ProcessPoolExecutor:
    """Return a process that drives one plan at a time."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def drive(plan: Plan) -> Outcome:
    """Carry out a plan; raises where an answer is not right."""
    outcome = Outcome(plan.seconds)
    errors: list[BaseException] = []
    lock = threading.Lock()
    begin = time.perf_counter() + WARM_UP_SECONDS

    def work(requests: tuple[bytes, ...]) -> None:
        try:
            num_sent, taken = _drive_one(plan, requests, begin)
            with lock:
                outcome.num_sent += num_sent
                outcome.milliseconds += taken
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(requests,)) for requests in plan.requests]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return outcome


def _drive_one(plan: Plan, requests: tuple[bytes, ...], begin: float) -> tuple[int, list[float]]:
    num_sent, taken = 0, list[float]()
    end = begin + plan.seconds
    order = cycle(requests)
    with socket.create_connection(("127.0.0.1", plan.port), timeout=60) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while (started := time.perf_counter()) < end:
            request = next(order)
            connection.sendall(request.replace(FRESH, uuid4().hex.encode()))
            status, body = read_answer(connection)
            finished = time.perf_counter()
            num_sent += 1
            if status != plan.status:
                raise AssertionError(f"{request.partition(b' HTTP')[0]!r} was answered {status}: {body[:500]!r}")
            if begin <= finished < end:
                taken.append((finished - started) * 1000)
    return num_sent, taken


def read_answer(connection: socket.socket) -> tuple[int, bytes]:
    """Return the status and the body of one answer, which says its length."""
    data = connection.recv(65536)
    while (end := data.find(b"\r\n\r\n")) < 0:
        more = connection.recv(65536)
        if not more:
            raise AssertionError(f"the connection was closed after {data[:200]!r}")
        data += more
    found = _LENGTH.search(data, 0, end)
    if found is None:
        raise AssertionError(f"an answer without its length: {data[:end]!r}")
    parts, missing = [data[end + 4 :]], int(found[1]) - (len(data) - end - 4)
    while missing > 0:
        parts.append(connection.recv(min(missing, 1 << 20)))
        if not parts[-1]:
            raise AssertionError(f"the connection was closed {missing} bytes before the end of an answer")
        missing -= len(parts[-1])
    return int(data[9:12]), b"".join(parts)


def make_request(method: str, path: str, token: str = "", body: bytes = b"", *headers: str) -> bytes:
    """Return the bytes of a request."""
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", "Accept: application/json", "User-Agent: load", *headers]
    if token:
        lines.append(f"Authorization: Bearer {token}")
    if method == "POST":
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + body
