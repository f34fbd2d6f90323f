"""Event streams over an API that is killed and started again, and to a reader that hardly reads."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx2
import pytest
from sqlalchemy import insert

from app.db.clock import db_now
from app.db.session import Database
from app.db.tables import EventRow, JobRow
from app.jobs import record_progress
from app.recipes.plan import Progress
from app.settings import Settings
from benchmarks.upload_memory import find_free_port
from pare.client import Client
from tests.app.jobs.world import REFUSAL, World
from tests.faults.watching import watch_peak
from tests.worker.conftest import wait_until

pytestmark = pytest.mark.faults

NUM_EVENTS = 400
STREAM = {"Accept": "text/event-stream"}


@dataclass
class Api:
    """An API process that is always at the same place."""

    settings: Settings
    port: int = field(default_factory=find_free_port)
    process: "subprocess.Popen[bytes] | None" = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        environment = {
            **os.environ, "PARE_DATA_DIR": str(self.settings.data_dir), "PARE_PORT": str(self.port),
            "PARE_DATABASE_URL": self.settings.database_url,
        }  # fmt: skip
        with (self.settings.data_dir / "api.log").open("ab") as log:
            self.process = subprocess.Popen([sys.executable, "-m", "app"], env=environment, stdout=log, stderr=log)
        wait_until(self._answers, 60, "the API")

    def _answers(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/health/live", trust_env=False).status_code == 200
        except httpx2.TransportError:
            return False

    def end(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(60)


@pytest.fixture
def world(database: Database, settings: Settings) -> World:
    return World(database, settings)


@pytest.fixture
def api(settings: Settings, database_url: str) -> Iterator[Api]:
    api = Api(settings.model_copy(update={"database_url": database_url}))
    api.start()
    yield api
    api.end(signal.SIGKILL)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "stopped"])
def test_g7_a_stream_has_no_gap_over_restarts_of_the_service(api: Api, world: World, how: signal.Signals) -> None:
    claim = world.start()
    seen: list[int] = []

    def follow() -> None:
        with Client(api.url) as client:
            seen.extend(event.seq for event in client.jobs.follow(claim.job_id))

    reader = threading.Thread(target=follow)
    reader.start()
    for number in range(NUM_EVENTS):
        progress = Progress(stage="train", fraction=number / NUM_EVENTS)
        with world.database.session() as session:
            assert record_progress(session, claim.job_id, claim.epoch, progress)
        time.sleep(0.005)
        if number in (50, 150, 250):
            api.end(how)
            api.start()
    world.fail(claim, REFUSAL)
    reader.join(60)
    assert not reader.is_alive()
    assert seen == list(range(1, len(world.events(claim.job_id)) + 1))
    assert len(seen) == NUM_EVENTS + 3


def test_g7_a_reader_that_hardly_reads_costs_no_memory_and_misses_nothing(api: Api, world: World) -> None:
    claim = world.start()
    num_events, text = 9900, "x" * 2000  # nearly as much as there may be: 20 MB
    with world.database.session() as session:
        job = session.get_one(JobRow, claim.job_id)
        event = {"job_id": job.id, "kind": "progress", "data": {"message": text}}
        add = insert(EventRow).values(created_at=db_now())
        session.execute(add, [{**event, "seq": job.last_seq + 1 + each} for each in range(num_events)])
        job.last_seq += num_events
    world.fail(claim, REFUSAL)
    httpx2.get(f"{api.url}/v1/jobs/{claim.job_id}/events?limit=1000", trust_env=False)  # the pages it would hold anyway
    assert api.process is not None
    peak = watch_peak(api.process.pid)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(60)
        connection.connect(("127.0.0.1", api.port))
        head = f"GET /v1/jobs/{claim.job_id}/events HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n"
        connection.sendall(head.encode())
        got = bytearray(connection.recv(100))
        time.sleep(2)
        assert peak() < 12, "MiB: what is not read yet piles up"
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)  # the rest comes faster
        assert httpx2.get(f"{api.url}/v1/jobs", trust_env=False).status_code == 200, "others are served meanwhile"
        while not got.endswith(b"0\r\n\r\n"):
            more = connection.recv(2**20)
            assert more, got[-200:]
            got += more
    assert peak() < 12, "MiB"
    assert [int(each) for each in re.findall(rb"^id: (\d+)\n", got, re.MULTILINE)] == list(range(1, num_events + 4))
