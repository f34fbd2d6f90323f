"""Large uploads arrive over connections that break and past a service that is killed, and are the right bytes."""

import hashlib
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from app.api import appending
from app.settings import Settings
from pare import transfer
from pare.client import Client
from pare.errors import Refused, TransferCorrupt

CONTENT = random.Random(0).randbytes(3_000_000)
MIB = 2**20


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """What takes gigabytes takes megabytes here, except where a real service in a process of its own is used."""
    if "start_service" not in request.fixturenames:
        monkeypatch.setattr(transfer, "RESUMABLE_BYTES", 1_000_000)
        monkeypatch.setattr(appending, "PART_BYTES", 500_000)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "net.pt2"
    path.write_bytes(CONTENT)
    return path


def list_requests(wire: Any, method: str) -> list[str]:
    return [sent.decode(errors="replace") for sent in wire.requests if sent.startswith(method.encode())]


def test_a_large_file_is_sent_part_by_part(wire: Any, file: Path) -> None:
    seen: list[tuple[int, int]] = []
    with Client(wire.url) as client:
        model = client.models.upload(file, name="large", on_bytes=lambda *numbers: seen.append(numbers))
        assert (model.name, model.raw["size_bytes"]) == ("large", len(CONTENT))
        assert [each.id for each in client.models.list()] == [model.id]
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert len(list_requests(wire, "PATCH")) == 1
    assert list_requests(wire, "POST /v1/models")


def test_an_upload_goes_on_where_the_connection_broke(wire: Any, file: Path) -> None:
    wire.cut_requests_after = [1_800_000, 700_000, 200_000]
    with Client(wire.url) as client:
        model = client.models.upload(file)
        assert [each.id for each in client.models.list()] == [model.id]
    starts = [
        int(line.split(":")[1])
        for sent in list_requests(wire, "PATCH")
        for line in sent.splitlines()
        if line.lower().startswith("upload-offset")
    ]
    # One that comes while the service is still putting away what arrived before a cut is told to ask again.
    assert 4 <= len(starts) <= 12
    assert starts == sorted(starts)
    assert starts[-1] >= 1_000_000, "it began again"


def test_a_lost_answer_to_the_last_request_makes_no_second_model(wire: Any, file: Path) -> None:
    with Client(wire.url) as client:

        def cut(done: int, total: int) -> None:
            if done == total:
                wire.cut_after = [0]  # the answer to the last PATCH; the completion comes next

        model = client.models.upload(file, on_bytes=cut)
        assert [each.id for each in client.models.list()] == [model.id]


def test_bytes_that_change_on_the_way_are_found_out_and_taken_back(
    wire: Any, file: Path, service_settings: Settings
) -> None:
    wire.change_requests = lambda piece: piece.replace(b"\xfe", b"\xff")  # headers hold no such byte
    with Client(wire.url) as client:
        with pytest.raises(TransferCorrupt) as caught:
            client.models.upload(file)
        assert hashlib.sha256(CONTENT).hexdigest() in caught.value.detail
        assert client.models.list() == ()
    assert [path for path in (service_settings.data_dir / "store").rglob("*") if path.is_file()] == []


def test_a_refusal_is_told_at_once(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(CONTENT)
    with pytest.raises(Refused, match="no-such-architecture"):
        client.models.upload(path, architecture="no-such-architecture")
    assert client.models.list() == ()


@pytest.fixture
def start_service(service_settings: Settings) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Start a real API process, always at the same place."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = {
        **os.environ, "PARE_DATA_DIR": str(service_settings.data_dir), "PARE_PORT": str(port),
        "PARE_DATABASE_URL": service_settings.database_url,
    }  # fmt: skip
    service_settings.data_dir.mkdir(exist_ok=True)
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        log = (service_settings.data_dir / f"api{len(started)}.log").open("wb")
        with log:
            process = subprocess.Popen([sys.executable, "-m", "app"], env=environment, stdout=log, stderr=log)
        started.append(process)
        return process

    start.url = f"http://127.0.0.1:{port}"  # type: ignore[attr-defined]
    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.timeout(240)
def test_an_upload_outlives_the_service(start_service: Any, tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    path.write_bytes(CONTENT * 14)  # 42 MB: the service makes them safe by 16 MiB
    process = start_service()
    done_after: list[int] = []

    def kill(done: int, _total: int) -> None:
        if process.poll() is None and done >= 30 * MIB:
            process.kill()
            process.wait()
            start_service()
        elif process.poll() is not None:
            done_after.append(done)

    with Client(start_service.url) as client:
        for _ in range(100):  # until it is up
            try:
                client.health()
                break
            except Exception:
                continue
        model = client.models.upload(path, on_bytes=kill)
        assert model.raw["size_bytes"] == 14 * len(CONTENT)
        assert [each.id for each in client.models.list()] == [model.id]
    resumed_at = min(done_after)
    assert 16 * MIB < resumed_at <= 18 * MIB, "it went on after what was safe"
