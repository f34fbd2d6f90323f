"""Secrets stay where they are: the whole service with marked ones, a job, a search in all that came of it."""

import io
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import pytest
import torch

from tests.worker.conftest import wait_until
from tests.worker.test_serve import START, find_service, read_url

MARKS = {
    "AWS_SECRET_ACCESS_KEY": "canary-of-the-store-5d41402abc4b",
    "PARE_CANARY": "canary-of-a-setting-7d793037a076",
    "PGPASSWORD": "canary-of-the-database-900150983c",
}
"""Variable of the service's environment -> a secret."""


@dataclass
class Sighting:
    """What was seen of engines while they lived."""

    environments: set[bytes] = field(default_factory=set)
    files: dict[Path, bytes] = field(default_factory=dict)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PARE_")}
    return {**inherited, **MARKS, "PARE_AUTH": "keys", "PARE_DATA_DIR": str(tmp_path / "data")}


@pytest.fixture
def url(environment: dict[str, str], tmp_path: Path) -> Iterator[str]:
    with (tmp_path / "serve.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", START, str(tmp_path / "data")],
            stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
        )  # fmt: skip
    try:
        yield read_url(process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()
        wait_until(lambda: not find_service(tmp_path), 60, "the end of every process")


def make_key(environment: dict[str, str]) -> str:
    command = [sys.executable, "-m", "app.access", "create", "--owner", "ann", "--scopes", "read,write,admin"]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, timeout=60
    ).stdout.strip()


def export_model() -> bytes:
    program = torch.export.export(torch.nn.Sequential(torch.nn.Linear(4, 4)).eval(), (torch.zeros(2, 4),))
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def look_at_engines(data_dir: Path, seen: Sighting) -> None:
    """Add what engines have in their environment and in their directories now."""
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and b"worker.engine" in (entry / "cmdline").read_bytes():
                seen.environments.add((entry / "environ").read_bytes())
        except (FileNotFoundError, ProcessLookupError):
            continue
    for path in (data_dir / "work").rglob("*"):
        try:
            if path.is_file() and path.stat().st_size < 10**7:
                seen.files[path] = path.read_bytes()
        except FileNotFoundError:
            continue


@pytest.mark.slow
def test_no_secret_reaches_a_log_an_answer_a_row_or_an_engine(
    url: str, environment: dict[str, str], tmp_path: Path
) -> None:
    data_dir, seen, answers = tmp_path / "data", Sighting(), []
    token = make_key(environment)
    forged = token[:-8] + "00000000"
    with httpx2.Client(
        base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=60, trust_env=False
    ) as client:

        def ask(method: str, path: str, **options: object) -> httpx2.Response:
            answer = client.request(method, path, **options)  # type: ignore[arg-type]
            answers.append(f"{path} {dict(answer.headers)} ".encode() + answer.content)
            return answer

        def wait_for(path: str, name: str, ends: tuple[str, ...]) -> str:
            give_up = time.monotonic() + 120
            while (state := str(client.get(path).json()[name])) not in ends:
                assert time.monotonic() < give_up, client.get(path).text
                look_at_engines(data_dir, seen)
                time.sleep(0.02)
            return state

        assert client.get("/v1/jobs", headers={"Authorization": f"Bearer {forged}"}).status_code == 401
        model = ask("POST", "/v1/models", content=export_model()).json()
        assert wait_for(f"/v1/models/{model['id']}", "state", ("ready", "rejected")) == "ready"
        recipe = {"steps": [{"kind": "prune_magnitude"}]}
        job = ask("POST", "/v1/jobs", json={"model_id": model["id"], "recipe": recipe}).json()["id"]
        assert wait_for(f"/v1/jobs/{job}", "status", ("succeeded", "failed")) == "succeeded"
        for artifact in ask("GET", f"/v1/jobs/{job}/artifacts").json()["items"]:
            ask("GET", artifact["links"]["self"])
        for path in (f"/v1/jobs/{job}", f"/v1/jobs/{job}/events", f"/v1/jobs/{job}/metrics", f"/v1/jobs/{job}/logs",
                     "/v1/workers", "/v1/me", "/v1/keys", "/v1/audit", "/health/ready", "/v1/nothing"):  # fmt: skip
            ask("GET", path)
        look_at_engines(data_dir, seen)

    secrets = {*MARKS.values(), token, token.split("_")[3], forged}
    where: dict[str, bytes] = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    where |= {str(path): content for path, content in seen.files.items()}
    where |= {f"environment {number}": content for number, content in enumerate(seen.environments)}
    where |= {f"answer {number}": content for number, content in enumerate(answers)}
    with sqlite3.connect(data_dir / "pare.sqlite3") as database:
        where["database"] = "\n".join(database.iterdump()).encode()
    database.close()
    assert seen.environments, "no engine was seen"
    assert any(path.name == "plan.json" for path in seen.files), "no engine's directory was seen"
    assert any(name.endswith(".log") and content for name, content in where.items())
    found = {(name, secret) for name, content in where.items() for secret in secrets if secret.encode() in content}
    assert found == set()
    assert token.split("_")[2].encode() in where["database"], "the search finds what is there: the key's id"
