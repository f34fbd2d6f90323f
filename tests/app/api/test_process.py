"""`python -m app`: a small process, that says in JSON what it does, and stops when told to."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from app.settings import Settings
from benchmarks.upload_memory import find_free_port, read_memory
from tests.app.api.conftest import wait_until
from tests.app.jobs.world import World

FOREIGN = ("torch", "numpy", "celery", "kombu", "onnx", "onnxruntime", "worker", "pare")
MAX_RESIDENT_MIB = 120


@pytest.fixture
def process(settings: Settings, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], httpx2.Client]]:
    port = find_free_port()
    environment = {
        **os.environ,
        "PARE_DATA_DIR": str(tmp_path),
        "PARE_DATABASE_URL": settings.database_url,
        "PARE_PORT": str(port),
    }
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "app"], env=environment, stderr=log)

    def answers() -> bool:
        assert process.poll() is None, (tmp_path / "log").read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_until(answers, 60)
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            yield process, client
    finally:
        process.kill()
        process.wait(60)


def test_small_logs_json_and_stops_with_a_stream_open(
    process: tuple[subprocess.Popen[bytes], httpx2.Client], world: World, tmp_path: Path
) -> None:
    server, client = process
    job_id = world.submit()
    request_id = client.get(f"/v1/jobs/{job_id}").headers["x-request-id"]
    assert client.get("/health/ready").status_code == 200
    assert client.get("/openapi.json").status_code == 200
    assert read_memory(server.pid, "VmRSS") < MAX_RESIDENT_MIB
    with client.stream("GET", f"/v1/jobs/{job_id}/events", headers={"Accept": "text/event-stream"}) as answer:
        lines = answer.iter_lines()
        while next(lines) != "id: 1":
            pass
        server.send_signal(signal.SIGTERM)
        list(lines)  # ends in order
    assert server.wait(20) in (0, -signal.SIGTERM)
    entries = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    (entry,) = [entry for entry in entries if entry.get("request_id") == request_id]
    assert (entry["event"], entry["method"], entry["path"]) == ("request", "GET", f"/v1/jobs/{job_id}")
    assert entry["status"] == 200
    assert not [entry for entry in entries if entry["level"] in ("warning", "error", "critical")]


def test_nothing_of_torch_or_the_queue_is_imported(settings: Settings) -> None:
    code = f"""
import sys
from app.main import create_app
from app.settings import Settings
import app.__main__
create_app(Settings(data_dir={str(settings.data_dir)!r})).openapi()
print(*sorted({{name.partition(".")[0] for name in sys.modules}} & {set(FOREIGN)!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
