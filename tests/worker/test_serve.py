"""`pare serve` as users start it: one command, everything up, and nothing left however it ends."""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.errors import ConfigurationError
from app.settings import Settings, check_exposure, is_loopback
from tests.worker.conftest import wait_until
from tests.worker.serving import Serving, clean_environment, find_service, read_url, start_serve
from worker.sandbox.isolation import Isolation
from worker.serve import ServeRefused, check_isolation, lock_directory, take_port
from worker.serve import serve as start_service

Serve = Callable[..., "subprocess.Popen[str]"]
BARE = Isolation("none", own_user=False, user_namespace=False, landlock=False, seccomp=False, linux=True)
SAFE = Isolation("bubblewrap", own_user=False, user_namespace=True, landlock=True, seccomp=True, linux=True)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start `pare serve` on a data directory; whatever is left at the end is a failure."""
    started: list[subprocess.Popen[str]] = []

    def start(data_dir: Path = tmp_path / "data") -> "subprocess.Popen[str]":
        started.append(start_serve(data_dir, clean_environment(), subprocess.PIPE))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()
    wait_until(lambda: not find_service(tmp_path), 60, "the end of every process")


def ask(url: str) -> dict[str, object]:
    with urllib.request.urlopen(url, timeout=60) as response:
        answer: dict[str, object] = json.load(response)
    return answer


# A unix socket's path has at most 107 bytes; the data directory may be as deep as it likes.
@pytest.mark.parametrize(
    ("number", "below"),
    [
        pytest.param(signal.SIGINT, "d" * 120, id="interrupt-deep", marks=pytest.mark.long),
        pytest.param(signal.SIGTERM, "", id="terminate"),
        pytest.param(signal.SIGKILL, "", id="kill"),
    ],
)
def test_everything_starts_answers_and_is_gone_however_it_ends(
    serve: Serve, tmp_path: Path, number: int, below: str
) -> None:
    data_dir = tmp_path / "data" / below
    process = serve(data_dir)
    url = read_url(process)
    assert ask(f"{url}/health/live")["status"]
    assert len(find_service(tmp_path)) >= 5

    process.send_signal(number)

    status = process.wait(60)
    assert status == (0 if number != signal.SIGKILL else -signal.SIGKILL)
    wait_until(lambda: not find_service(tmp_path), 60, "the end of every process")
    assert (data_dir / "broker" / "appendonlydir").is_dir()


def test_a_second_one_on_the_same_data_is_refused_and_a_crashed_child_comes_back(serve: Serve, tmp_path: Path) -> None:
    first = serve()
    url = read_url(first)

    second = serve()
    errors = second.communicate(timeout=60)[1]

    assert second.returncode == 1
    assert "another pare serve uses" in errors
    assert ask(f"{url}/health/live")["status"]
    api = [line for line in find_service(tmp_path) if line.rstrip().endswith("-m app")]
    assert len(api) == 1
    os.kill(Serving(url, first.pid).find_api(), signal.SIGKILL)
    time.sleep(0.2)
    wait_until(lambda: _answers(f"{url}/health/live"), 90, "the restarted API")
    first.send_signal(signal.SIGINT)
    assert first.wait(60) == 0


def _answers(url: str) -> bool:
    try:
        return bool(ask(url))
    except OSError:
        return False


def test_others_are_let_in_only_with_keys_and_isolation() -> None:
    keys = Settings(auth="keys", host="0.0.0.0")
    check_exposure(keys)
    check_exposure(Settings(host="127.0.0.1"))
    check_isolation(keys, SAFE)
    check_isolation(Settings(), BARE)
    with pytest.raises(ConfigurationError, match="asks nobody who they are") as refused:
        check_exposure(Settings(host="::"))
    assert "PARE_AUTH=keys" in refused.value.fix
    # Loopback as well: with keys there may be a proxy before it.
    for host in ("0.0.0.0", "127.0.0.1"):
        with pytest.raises(ServeRefused, match="cannot be isolated"):
            check_isolation(Settings(auth="keys", host=host), BARE)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("192.168.1.4", False), ("example.org", False)],
)  # fmt: skip
def test_loopback_is_recognized(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_a_data_directory_belongs_to_one(tmp_path: Path) -> None:
    lock = lock_directory(tmp_path)

    with pytest.raises(ServeRefused):
        lock_directory(tmp_path)

    lock.close()
    lock_directory(tmp_path).close()


WRONG = [
    ({"PARE_ISOLATION": "foo"}, "PARE_ISOLATION"),
    ({"PARE_LEASE_SECONDS": "1"}, "heartbeat_seconds"),
    ({"PARE_WORKER_CONCURRENCY": "0"}, "PARE_WORKER_CONCURRENCY"),
    ({"PARE_WORKER_ENGINE_COMMAND": "[not json"}, "engine_command"),
    ({"PARE_STORAGE_URL": "ftp://bucket"}, "storage_url"),
    ({"PARE_DATABASE_URL": "nonsense"}, "database_url"),
    (
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
        "OTEL_EXPORTER_OTLP_PROTOCOL=grpc",
    ),
]


@pytest.mark.parametrize(("variables", "named"), WRONG)
def test_a_wrong_setting_is_named_in_one_line(
    variables: dict[str, str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(SystemExit):
        start_service(port=0, data_dir=tmp_path / "data")

    shown = capsys.readouterr().err
    assert named in shown
    assert shown.startswith("error: ")
    assert "Traceback" not in shown


def test_a_port_that_something_else_listens_on_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]

        with pytest.raises(SystemExit):
            start_service(port=port, data_dir=tmp_path / "data")

    assert f"something else listens on port {port}" in capsys.readouterr().err
    assert take_port("127.0.0.1", port) == port


def test_a_data_directory_that_cannot_be_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(SystemExit):
        start_service(port=0, data_dir=tmp_path / "file")

    assert str(tmp_path / "file") in capsys.readouterr().err
