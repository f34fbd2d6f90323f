"""A real service for the client's tests: the app on a loopback port, with real SQLite and storage, and a bad wire.

There is no engine here: `Hands` does a worker's part through the same use cases, so every answer of the app is real.
"""

import contextlib
import hashlib
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import pytest
import structlog
import uvicorn

from app.db.session import Database
from app.jobs import claim, record_progress, succeed
from app.jobs.finish import fail
from app.main import create_app
from app.recipes.facts import ColumnFacts, DatasetFacts, ModelFacts, TensorFacts
from app.recipes.metrics import Metrics
from app.recipes.plan import ArtifactFile, EngineError, EngineResult, Progress
from app.settings import Settings
from app.storage import Storage, open_storage, owner_storage
from app.storage.base import Blob
from pare.client import Client


@dataclass
class Hands:
    """Does what a worker does, when a test says so."""

    database: Database
    storage: Storage

    def check_model(self, id: str, names: tuple[str, ...] = ("x",)) -> None:
        """Accept a model with these float inputs."""
        tensors = tuple(TensorFacts(name=name, dtype="float32", shape=("batch", 3)) for name in names)
        facts = ModelFacts(
            inputs=tensors,
            outputs=(TensorFacts(name="output", dtype="float32", shape=("batch", 2)),),
            dynamic_batch=True,
            batch_size=None,
            exported_in="eval",
            parameters=8,
            buffers=0,
            parameter_bytes=32,
            macs=6,
            uncounted_operators=(),
            layers=(),
            tied=(),
            capabilities=(),
        )
        self._settle(id, "check_model", EngineResult(model=facts))

    def check_dataset(self, id: str) -> None:
        """Accept a dataset of ten rows with columns x and y."""
        columns = (
            ColumnFacts(name="x", dtype="float32", shape=(3,)),
            ColumnFacts(name="y", dtype="int64", shape=()),
        )
        self._settle(id, "check_dataset", EngineResult(dataset=DatasetFacts(num_rows=10, columns=columns)))

    def reject(self, id: str) -> None:
        """Reject an upload."""
        error = EngineError(code="not_a_program", detail="the archive has no model.json", fix="Export it again.")
        with self.database.session() as session:
            held = claim(session, self._job_of(session, id), "hands", 30)
            assert held is not None
            assert fail(session, held, error)

    def run(
        self,
        job_id: str,
        artifacts: dict[str, bytes] | None = None,
        error: EngineError | None = None,
        pause_seconds: float = 0.0,
    ) -> None:
        """Run a job: three lines of progress, then success with these artifacts, or failure."""
        with self.database.session() as session:
            held = claim(session, job_id, "hands", 30)
        assert held is not None
        for fraction in (0.1, 0.5, 0.9):
            time.sleep(pause_seconds)
            with self.database.session() as session:
                assert record_progress(session, job_id, held.epoch, Progress(stage="finetune", fraction=fraction))
        log = self._store(b"epoch 1\n")
        with self.database.session() as session:
            if error is not None:
                assert fail(session, held, error, log)
                return
            blobs = {name: self._store(content) for name, content in (artifacts or {}).items()}
            files = tuple(
                ArtifactFile(name=n, media_type="application/octet-stream", size_bytes=b.size_bytes, sha256=b.sha256)
                for n, b in blobs.items()
            )
            result = EngineResult(metrics=make_metrics(), artifacts=files)
            assert succeed(session, held, result, blobs, ("bubblewrap",), log)

    def _store(self, content: bytes) -> Blob:
        with owner_storage(self.storage, "local").writer() as writer:
            writer.write(content)
            return writer.commit()

    def _settle(self, id: str, action: str, result: EngineResult) -> None:
        with self.database.session() as session:
            held = claim(session, self._job_of(session, id), "hands", 30)
            assert held is not None
            assert held.action == action
            assert succeed(session, held, result, {}, ())

    def _job_of(self, session: Any, id: str) -> str:
        from sqlalchemy import or_, select

        from app.db.tables import JobRow

        chosen = select(JobRow.id).where(or_(JobRow.model_id == id, JobRow.dataset_id == id))
        found: str = session.scalars(chosen.where(JobRow.action != "optimize")).one()
        return found


def make_metrics() -> Metrics:
    """Return plausible numbers."""
    latency = {
        "batch_size": 1,
        "num_threads": 1,
        "num_runs": 10,
        "p50_ms": 2.0,
        "p90_ms": 2.5,
        "p99_ms": 3.0,
        "mean_ms": 2.1,
    }
    measurement = {
        "quality": {
            "metric": "accuracy",
            "value": 0.95,
            "higher_is_better": True,
            "num_examples": 100,
            "standard_error": 0.02,
        },
        "latency": latency,
        "throughput_per_second": 500.0,
        "peak_memory_bytes": 1_000_000,
        "file_bytes": 4000,
        "parameters": 1000,
        "nonzero_parameters": 1000,
        "macs": 5000,
    }
    return Metrics.model_validate(
        {
            "baseline": measurement,
            "result": {**measurement, "file_bytes": 1000, "parameters": 400, "nonzero_parameters": 300},
            "comparison": {
                "latency_ratio": {"value": 0.5, "low": 0.45, "high": 0.56},
                "file_ratio": 0.25,
                "parameters_ratio": 0.4,
                "macs_ratio": 0.5,
                "peak_memory_ratio": 1.0,
                "quality_change": 0.0,
                "equivalence": [
                    {"output": "output", "cosine": 0.999, "snr_db": 30.5, "max_abs_error": 0.1, "num_examples": 100}
                ],
            },
            "steps": [],
            "layers": [],
            "verdict": {"outcome": "better", "summary": "half the time", "better": ["file: 4000 -> 1000 bytes"]},
            "environment": {
                "processor": "p",
                "num_cores": 2,
                "runtime": "onnxruntime",
                "num_threads": 1,
                "versions": {"torch": "2.13.0"},
            },
        }
    )


@dataclass
class Wire:
    """A TCP relay in front of the service that can be told to misbehave."""

    port: int
    target_port: int
    cut_after: list[int] = field(default_factory=list)
    """For the next answers, one after the other: close the connection after so many bytes of them."""
    cut_requests_after: list[int] = field(default_factory=list)
    """For the next requests that are longer: close the connection after so many bytes that came from the client."""
    change: Callable[[bytes], bytes] = bytes
    """Applied to every piece of an answer."""
    change_requests: Callable[[bytes], bytes] = bytes
    """Applied to every piece that comes from the client."""
    num_connections: int = 0
    requests: list[bytes] = field(default_factory=list)
    """The first bytes of everything that clients sent."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def relay(self, client: socket.socket) -> None:
        """Carry bytes both ways until one side closes."""
        self.num_connections += 1
        with client, contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.target_port)) as server:
            threading.Thread(target=self._carry_requests, args=(client, server), daemon=True).start()
            answered = 0
            while piece := server.recv(4096):
                limit = self.cut_after[0] if self.cut_after else None
                if limit is not None and answered + len(piece) > limit:
                    client.sendall(self.change(piece[: limit - answered]))
                    self.cut_after.pop(0)
                    client.shutdown(socket.SHUT_RDWR)
                    return
                answered += len(piece)
                client.sendall(self.change(piece))

    def _carry_requests(self, client: socket.socket, server: socket.socket) -> None:
        sent = 0
        with contextlib.suppress(OSError):
            while piece := client.recv(65536):
                sent += len(piece)
                self.requests.append(piece[:2000])
                if self.cut_requests_after and sent > self.cut_requests_after[0]:
                    self.cut_requests_after.pop(0)
                    server.shutdown(socket.SHUT_RDWR)
                    client.shutdown(socket.SHUT_RDWR)
                    return
                server.sendall(self.change_requests(piece))
            server.shutdown(socket.SHUT_WR)


@pytest.fixture
def service_settings(tmp_path: Path, sqlite_url: str) -> Settings:
    return Settings(data_dir=tmp_path / "service", database_url=sqlite_url, max_dataset_bytes=5_000_000)


@pytest.fixture
def service_port(service_settings: Settings) -> Iterator[int]:
    """The app behind a real server. Its log goes nowhere: a command's output is what these tests read."""
    before = structlog.get_config()
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    config = uvicorn.Config(
        create_app(service_settings), host="127.0.0.1", port=0, log_level="error", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()
    structlog.configure(**before)


@pytest.fixture
def url(service_port: int) -> str:
    return f"http://127.0.0.1:{service_port}"


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url) as client:
        yield client


@pytest.fixture
def hands(service_settings: Settings, service_port: int) -> Iterator[Hands]:
    assert service_port, "the app must have made its directories"
    database = Database(service_settings.database_url)
    yield Hands(database, open_storage(service_settings.storage_url))
    database.dispose()


@pytest.fixture
def wire(service_port: int) -> Iterator[Wire]:
    listener = socket.create_server(("127.0.0.1", 0))
    wire = Wire(listener.getsockname()[1], service_port)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=wire.relay, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    yield wire
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


@pytest.fixture
def model_id(client: Client, hands: Hands, tmp_path: Path) -> str:
    """A checked model with the input x. What is in the file does not matter where no engine looks at it."""
    file = tmp_path / "net.pt2"
    file.write_bytes(b"PK" + hashlib.sha256(b"net").digest() * 10)
    model = client.models.upload(file)
    hands.check_model(model.id)
    return model.id


@pytest.fixture
def dataset_id(client: Client, hands: Hands, tmp_path: Path) -> str:
    """A checked dataset with columns x and y."""
    buffer = io.BytesIO()
    numpy.savez(buffer, x=numpy.zeros((10, 3), numpy.float32), y=numpy.zeros(10, numpy.int64))
    file = tmp_path / "data.npz"
    file.write_bytes(buffer.getvalue())
    dataset = client.datasets.upload(file)
    hands.check_dataset(dataset.id)
    return dataset.id
