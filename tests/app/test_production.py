"""What production refuses: each finding with its setting, all at once, at the start of every process."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.errors import ConfigurationError
from app.production import Finding, InsecureSettings, check_production, find_weaknesses
from app.settings import Settings, load_settings
from pare.cli import run
from worker.production import check_worker, find_all
from worker.serve import serve
from worker.settings import WorkerSettings

ROOT = Path(__file__).resolve().parents[2]
SECRET = "9f86d081884c7d659a2feaa0c55ad015"
DATABASE = f"postgresql+psycopg://pare:{SECRET}@postgres/pare"
GOOD: dict[str, Any] = {
    "environment": "production",
    "auth": "keys",
    "host": "0.0.0.0",
    "database_url": DATABASE,
    "broker_url": f"redis://:{SECRET}@broker:6379/0",
    "quota_stored_bytes": 10**12,
}
S3 = "s3://bucket/pare?endpoint="

ERRORS: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "nobody is asked": ("no_authentication", {"auth": "local", "host": "127.0.0.1"}, {}),
    "no sandbox": ("no_isolation", {"isolation": "none"}, {}),
    "every proxy is believed": ("forwarded_for_trusted", {}, {"FORWARDED_ALLOW_IPS": "10.0.0.1, *"}),
    "sqlite": ("sqlite_database", {"database_url": ""}, {}),
    "database, no password": ("database_without_password", {"database_url": "postgresql://pare@db/pare"}, {}),
    "database, default password": ("weak_database_secret", {"database_url": "postgresql://pare:pare@db/pare"}, {}),
    "database, short one of libpq": (
        "weak_database_secret",
        {"database_url": "postgresql://pare@db/pare"},
        {"PGPASSWORD": "hunter2"},
    ),
    "broker, no password": ("broker_without_password", {"broker_url": "redis://broker:6379/0"}, {}),
    "broker, well-known password": ("weak_broker_secret", {"broker_url": "redis://:password12345@broker/0"}, {}),
    "broker, one letter": ("weak_broker_secret", {"broker_url": "redis://:aaaaaaaaaaaaaaaaaaaa@broker/0"}, {}),
    "store, default secret": (
        "weak_storage_secret",
        {"storage_url": f"{S3}https://store"},
        {"AWS_SECRET_ACCESS_KEY": "minioadmin"},
    ),
    "links in clear": ("download_links_in_clear", {"storage_url": f"{S3}http://store:9000"}, {}),
    "links in clear, elsewhere": (
        "download_links_in_clear",
        {"storage_url": f"{S3}http://store:9000&public_endpoint=http://files.example.org"},
        {},
    ),
    "webhooks in clear": ("webhooks_in_clear", {"webhook_schemes": ["https", "http"]}, {}),
    "webhooks to loopback": ("webhooks_reach_this_machine", {"webhook_networks": ["127.0.0.0/16"]}, {}),
    "webhooks to the metadata": ("webhooks_reach_this_machine", {"webhook_networks": ["169.254.169.254/32"]}, {}),
    "webhooks everywhere": ("webhooks_reach_this_machine", {"webhook_networks": ["::/0"]}, {}),
}
WARNINGS: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "no quota": ("no_quota", {"quota_stored_bytes": None}, {}),
    "database in clear": ("database_in_clear", {"database_url": DATABASE.replace("@postgres", "@db.example.org")}, {}),
    "broker in clear": ("broker_in_clear", {"broker_url": f"redis://:{SECRET}@10.1.2.3:6379/0"}, {}),
    "webhooks inside": ("webhooks_reach_a_private_network", {"webhook_networks": ["10.1.2.0/24"]}, {}),
}
FINE: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "as it should be": ({}, {}),
    "unix sockets": (
        {"database_url": "postgresql://pare@/pare?host=/run/postgresql", "broker_url": "redis+socket:///run/valkey"},
        {},
    ),
    "on loopback": ({"database_url": "postgresql://pare@localhost/pare", "broker_url": "redis://127.0.0.1:6379/0"}, {}),
    "password of libpq": ({"database_url": "postgresql://pare@postgres/pare"}, {"PGPASSWORD": SECRET}),
    "certificate": ({"database_url": "postgresql://pare@postgres/pare?sslcert=/run/secrets/pare.crt"}, {}),
    "encrypted": (
        {
            "database_url": DATABASE.replace("@postgres/pare", "@db.example.org/pare?sslmode=verify-full"),
            "broker_url": f"rediss://:{SECRET}@broker.example.org:6379/0",
        },
        {},
    ),
    "the store behind a name with TLS": (
        {"storage_url": f"{S3}http://store:9000&public_endpoint=https://files.example.org"},
        {"AWS_SECRET_ACCESS_KEY": SECRET},
    ),
    "no links": ({"storage_url": f"{S3}http://store:9000", "download_link_seconds": 0}, {}),
    "one proxy": ({}, {"FORWARDED_ALLOW_IPS": "10.0.0.1"}),
}


def find(changes: dict[str, Any], environment: dict[str, str], tmp_path: Path) -> list[tuple[str, str]]:
    tmp_path.chmod(0o700)
    settings = Settings(**{**GOOD, "data_dir": tmp_path, **changes})
    return [
        (each.code, each.severity)
        for each in find_weaknesses(settings, environment)
        if each.code != "runs_as_root"  # a fact about whoever runs the tests
    ]


@pytest.mark.parametrize(("code", "changes", "environment"), ERRORS.values(), ids=ERRORS)
def test_dangerous_settings_are_errors(
    code: str, changes: dict[str, Any], environment: dict[str, str], tmp_path: Path
) -> None:
    assert find(changes, environment, tmp_path) == [(code, "error")]


@pytest.mark.parametrize(("code", "changes", "environment"), WARNINGS.values(), ids=WARNINGS)
def test_doubtful_settings_are_warnings(
    code: str, changes: dict[str, Any], environment: dict[str, str], tmp_path: Path
) -> None:
    assert find(changes, environment, tmp_path) == [(code, "warning")]


@pytest.mark.parametrize(("changes", "environment"), FINE.values(), ids=FINE)
def test_sound_settings_pass(changes: dict[str, Any], environment: dict[str, str], tmp_path: Path) -> None:
    assert find(changes, environment, tmp_path) == []


@pytest.mark.parametrize(
    ("data", "place", "store", "open_ones"),
    [
        (0o755, "data/store", 0o700, ["data"]),
        (0o755, "data/store", 0o755, ["data", "data/store"]),
        (0o700, "data/store", 0o755, []),  # nobody gets as far
        (0o700, "elsewhere", 0o755, ["elsewhere"]),
        (0o700, "elsewhere", 0o700, []),
    ],
)
def test_directories_that_everybody_may_enter_are_errors(
    data: int, place: str, store: int, open_ones: list[str], tmp_path: Path
) -> None:
    for name, mode in (("data", 0o700), (place, store), ("data", data)):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name).chmod(mode)
    settings = Settings(**{**GOOD, "data_dir": tmp_path / "data", "storage_url": (tmp_path / place).as_uri()})
    found = [each for each in find_weaknesses(settings, {}) if each.code == "open_directory"]
    assert [each.cause.split()[0] for each in found] == [str(tmp_path / name) for name in open_ones]


def test_root_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    for user, expected in ((0, ["runs_as_root"]), (10001, [])):
        monkeypatch.setattr(os, "geteuid", lambda user=user: user)
        assert [each.code for each in find_weaknesses(Settings(**GOOD), {})] == expected


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"single_user": True}, "single_user"),
        ({"engine_command": ("python", "{job}")}, "other_engine"),
        ({"engine_code": (Path("/srv/engine"),)}, "other_engine"),
    ],
)
def test_settings_of_workers_are_looked_at(changes: dict[str, Any], code: str) -> None:
    check_worker(Settings(**GOOD), WorkerSettings())
    with pytest.raises(InsecureSettings, match=code):
        check_worker(Settings(**GOOD), WorkerSettings(**changes))


def test_everything_is_named_at_once_and_no_secret_is() -> None:
    wrong = {**GOOD, "auth": "local", "isolation": "none", "broker_url": "redis://:hunter2@broker/0"}
    with pytest.raises(InsecureSettings) as caught:
        check_production(Settings(**wrong), [Finding("other", "warning", "not an error", "")])
    for text in ("no_authentication", "no_isolation", "weak_broker_secret", "PARE_AUTH=keys", "PARE_ISOLATION=auto"):
        assert text in caught.value.detail
    assert "hunter2" not in caught.value.detail
    assert "not an error" not in caught.value.detail
    check_production(Settings(**{**wrong, "environment": "development"}))


@pytest.mark.parametrize("value", ["/", "blobs", "/blobs", "//blobs/", "/../", "http://x/", "/b lobs/"])
def test_the_location_of_a_proxy_is_a_plain_path(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARE_X_ACCEL_REDIRECT", value)
    with pytest.raises(ConfigurationError, match="PARE_X_ACCEL_REDIRECT"):
        load_settings()


def test_the_api_does_not_start_where_a_proxy_has_no_files_to_send(tmp_path: Path) -> None:
    environment = {**os.environ, "PARE_DATA_DIR": str(tmp_path), "PARE_STORAGE_URL": "s3://bucket/pare"}
    done = subprocess.run(
        [sys.executable, "-m", "app"], env={**environment, "PARE_X_ACCEL_REDIRECT": "/blobs/"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "fix: Leave PARE_X_ACCEL_REDIRECT out" in done.stderr


@pytest.mark.parametrize("module", ["app", "worker", "worker.dispatch"])
def test_no_process_starts_with_an_error(module: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PARE_ENVIRONMENT": "production", "PARE_DATA_DIR": str(tmp_path / "data")}
    done = subprocess.run(
        [sys.executable, "-m", module], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "no_authentication" in done.stderr
    assert "sqlite_database" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "data").exists()


def test_serve_does_not_start_with_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARE_ENVIRONMENT", "production")
    with pytest.raises(SystemExit):
        serve("127.0.0.1", 0, tmp_path / "data")
    assert "sqlite_database" in capsys.readouterr().err


@pytest.fixture
def good_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("PARE_")]:
        monkeypatch.delenv(name)
    for name, value in GOOD.items():
        monkeypatch.setenv(f"PARE_{name}".upper(), str(value))
    monkeypatch.setenv("PARE_DATA_DIR", str(tmp_path / "data"))


@pytest.mark.usefixtures("good_environment")
def test_the_command_tells_and_exits(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(["config", "check"]) == 0
    assert "PARE_ENVIRONMENT=production: 0 errors" in capsys.readouterr().out

    monkeypatch.setenv("PARE_ENVIRONMENT", "development")  # it tells what production would say
    monkeypatch.setenv("PARE_AUTH", "local")
    monkeypatch.setenv("PARE_ATUH", "keys")
    assert run(["config", "check", "-o", "json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["environment"] == "development"
    found = {each["code"]: each for each in told["findings"] if each["code"] != "runs_as_root"}
    assert list(found) == ["cannot_start", "no_authentication", "unknown_variable"]
    assert "host 0.0.0.0" in found["cannot_start"]["cause"]
    assert found["no_authentication"]["fix"].startswith("Set PARE_AUTH=keys")
    assert "PARE_ATUH" in found["unknown_variable"]["cause"]

    monkeypatch.setenv("PARE_WORKER_DEVICES", "0,0")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4317")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    causes = [each.cause for each in find_all()[1] if each.code == "cannot_start"]
    assert len(causes) == 3
    assert any("PARE_WORKER_DEVICES" in each for each in causes)
    assert any("OTEL_EXPORTER_OTLP_PROTOCOL=grpc" in each for each in causes)

    monkeypatch.setenv("PARE_STORAGE_URL", "s3://bucket/pare")
    monkeypatch.setenv("PARE_X_ACCEL_REDIRECT", "/blobs/")
    assert any("PARE_X_ACCEL_REDIRECT=/blobs/" in each.cause for each in find_all()[1] if each.code == "cannot_start")

    monkeypatch.setenv("PARE_PORT", "many")
    assert run(["config", "check"]) == 1
    assert "PARE_PORT" in capsys.readouterr().out


def test_every_code_is_explained() -> None:
    page = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    codes = {code for code, *_ in (*ERRORS.values(), *WARNINGS.values())}
    codes |= {"open_directory", "runs_as_root", "single_user", "other_engine", "unknown_variable", "cannot_start"}
    for code in codes:
        assert f"`{code}`" in page, code


@pytest.mark.parametrize("service", ["migrate", "api", "dispatcher", "worker", "worker-gpu"])
def test_the_compose_file_passes(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    composed = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    image = re.findall(r"(PARE_[A-Z_]+)=(\S+)", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    assert ("PARE_HOST", "0.0.0.0") in image
    passwords = {"PARE_POSTGRES_PASSWORD": SECRET, "PARE_BROKER_PASSWORD": SECRET[::-1]}

    def fill(match: re.Match[str]) -> str:
        name, _, rest = match[1].partition(":")
        return passwords.get(name) or rest.removeprefix("-")

    given = {name: re.sub(r"\$\{([^}]+)\}", fill, str(value)) for name, value in
             composed["services"][service]["environment"].items()}  # fmt: skip
    for name in [name for name in os.environ if name.startswith("PARE_")]:
        monkeypatch.delenv(name)
    for name, value in {**dict(image), **given}.items():
        monkeypatch.setenv(name, value)

    environment, findings = find_all()

    assert environment == "production"
    assert [each for each in findings if each.severity == "error"] == []
    monkeypatch.delenv("PARE_AUTH")
    assert "no_authentication" in {each.code for each in find_all()[1]}
