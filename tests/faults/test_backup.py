"""The commands of docs/operations.md save a service that works; what they bring back is whole, and goes on."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import make_url

from app.db.tables import ModelRow
from app.storage import owner_storage
from pare.webhooks import verify_webhook
from tests.app.api.keyed import bearer, make_token
from tests.app.webhooks.receiver import Receiver, say
from tests.faults.cases_jobs import WORKING, kinds_of
from tests.faults.stack import Stack, open_stack
from tests.postgres import PostgresServer

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
FILE = b'[["finish"]]'
ARRIVED = 5
"""Bytes of the file above that the backup has."""

pytestmark = pytest.mark.faults


def read_commands(database: str) -> tuple[list[str], list[str]]:
    """Return the lines that save and those that restore: `pare serve` has SQLite, Docker Compose PostgreSQL."""
    _, _, section = PAGE.read_text(encoding="utf-8").partition("\n## Backup\n")
    blocks = re.findall(r"```sh\n(.*?)```", section.partition("\n## ")[0], re.DOTALL)
    first = {"sqlite": 0, "postgresql": 2}[database]
    save, restore = (block.strip().splitlines() for block in blocks[first : first + 2])
    return save, restore


@dataclass
class Shell:
    """Runs the page's lines one after the other, on this machine instead of in containers."""

    directory: Path
    store: Path
    environment: dict[str, str]

    def __enter__(self) -> "Shell":
        self._process = subprocess.Popen(
            ["bash", "-e"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            cwd=self.directory, env=self.environment, text=True,
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=60)

    def run(self, line: str) -> str:
        """Run a line to its end and return what it said; fails as the line does."""
        line = re.sub(r"docker compose (exec -T|run --rm -T --no-deps) \w+ ", "", line)
        line = line.replace("/var/lib/pare/store", str(self.store))
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if not line.startswith("docker compose "):  # to start and stop containers
            self._process.stdin.write(f"{line}\necho; echo it is done\n")
            self._process.stdin.flush()
            said = [self._process.stdout.readline()]
            while said[-1] not in ("", "it is done\n"):
                said.append(self._process.stdout.readline())
            assert said[-1], f"{line} failed: {''.join(said)}"
            return "".join(said)
        return ""


@dataclass
class Place:
    """Where a service works."""

    directory: Path
    url: str
    postgres: PostgresServer | None

    def shell(self, stack: Stack) -> Shell:
        environment = stack.bench.environment()
        programs = [str(Path(sys.executable).parent)]
        if self.postgres is not None:
            programs.append(str(self.postgres.binaries))
            environment["PGHOST"] = str(self.postgres.directory)
        else:  # the page leaves it to the data directory
            environment = {name: value for name, value in environment.items() if not name.startswith("PARE_")}
        environment["PATH"] = os.pathsep.join([*programs, environment["PATH"]])
        return Shell(self.directory.parent, self.directory / "store", environment)


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    directory = tmp_path / "pare-data"
    directory.mkdir()
    (tmp_path / "backup").mkdir()
    if request.param == "sqlite":
        request.getfixturevalue("sqlite_url")
        (tmp_path / "pare.sqlite3").rename(directory / "pare.sqlite3")
        yield Place(directory, f"sqlite:///{directory}/pare.sqlite3", None)
        return
    server: PostgresServer = request.getfixturevalue("durable_postgres")
    made = make_url(server.create_database(migrated=True)).database
    server.execute(f"ALTER DATABASE {made} RENAME TO pare")
    server.execute("CREATE ROLE pare SUPERUSER LOGIN")
    yield Place(directory, f"postgresql+psycopg://pare@/pare?host={server.directory}", server)
    server.execute("DROP DATABASE pare WITH (FORCE)")
    server.execute("DROP ROLE pare")


@dataclass
class Ann:
    """What a user has when the backup is made."""

    token: str
    webhook_secret: str
    done: str
    running: list[str]
    waiting: str
    upload: str


def start_all(stack: Stack, token: str) -> None:
    stack.start_api()
    stack.client.headers.update(bearer(token))
    stack.start("worker.dispatch")
    stack.start(PARE_WORKER_CONCURRENCY="2")


def submit(stack: Stack, *acts: list[object]) -> str:
    answer = stack.post_job(stack.add_model(*acts, owner="ann"))
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def send_part(stack: Stack, upload: str, start: int, content: bytes) -> None:
    headers = {
        "Tus-Resumable": "1.0.0", "Upload-Offset": str(start), "Content-Type": "application/offset+octet-stream",
    }  # fmt: skip
    answer = stack.client.patch(f"/v1/uploads/{upload}", content=content, headers=headers)
    assert answer.status_code == 204, answer.text


def populate(stack: Stack, token: str, webhook_url: str) -> Ann:
    """Bring jobs into every state, and a file half of which has arrived."""
    hook = stack.client.post("/v1/webhooks", json={"url": webhook_url, "events": ["job.succeeded"]}).json()
    done = submit(stack, ["artifact", "what was made before the backup"])
    assert stack.wait(done).state == "succeeded"
    messages = f"/v1/webhooks/{hook['id']}/deliveries"
    stack.wait_until(lambda: stack.client.get(messages).json()["items"][0]["state"] == "delivered", "the message")
    resumed = submit(stack, ["unless_resumed", [["checkpoint", "x"], *WORKING]], ["finish"])
    begun = submit(stack, ["say", "working"], ["sleep", 5], ["artifact", "made by the second attempt"])
    for job_id in (resumed, begun):
        stack.wait_for_stage(job_id, "working")
    stack.wait_until(lambda: "checkpoint" in kinds_of(stack, resumed), "the checkpoint")
    headers = {"Tus-Resumable": "1.0.0", "Upload-Length": str(len(FILE))}
    upload = stack.client.post("/v1/uploads", headers=headers).json()["id"]
    send_part(stack, upload, 0, FILE[:ARRIVED])
    return Ann(token, hook["secret"], done, [resumed, begun], submit(stack, ["finish"]), upload)


def save(place: Place, stack: Stack, lines: list[str]) -> None:
    """Run the commands while files come and go at the worst moments."""
    old, fresh = stack.add_model(["finish"], ["say", "old"], owner="ann"), ""
    section = owner_storage(stack.bench.storage, "ann")
    with stack.bench.database.read() as session:
        digest = session.get_one(ModelRow, old).sha256
    path = place.directory / "store" / "blobs" / section.name / digest[:2] / digest
    os.utime(path, (1, 1))
    with place.shell(stack) as shell:
        for line in lines:
            if "pg_dump" in line or "VACUUM" in line:
                fresh = stack.add_model(["finish"], ["say", "fresh"], owner="ann")
            shell.run(line)
            if "pg_dump" in line or "VACUUM" in line:
                for model_id in (old, fresh):
                    assert stack.client.delete(f"/v1/models/{model_id}").status_code == 204
                stack.wait_until(lambda: not path.exists(), "the collector, which takes the file of a deleted model")
    assert fresh


def test_a_backup_of_a_working_service_brings_everything_back(place: Place) -> None:
    lines, restoring = read_commands("sqlite" if place.postgres is None else "postgresql")
    with ExitStack() as resources:
        receiver = resources.enter_context(Receiver(say(204)))
        stack = resources.enter_context(
            open_stack(
                place.directory, place.url, postgres=place.postgres, auth="keys", collect_grace_seconds=120,
                webhook_schemes=("http",), webhook_ports=(receiver.port,), webhook_networks=("127.0.0.0/8",),
            )
        )  # fmt: skip
        token = make_token(stack.bench.database, "ann")
        start_all(stack, token)
        ann = populate(stack, token, receiver.url)
        save(place, stack, lines)

        # What comes after the backup is lost with the disks.
        late_token = make_token(stack.bench.database, "ann")
        late = submit(stack, ["finish"])
        send_part(stack, ann.upload, ARRIVED, FILE[ARRIVED:])
        stack.stop_all()
        stack.bench.database.dispose()
        shutil.rmtree(place.directory / "store")
        stack.broker.client().flushall()
        (place.directory / "store").mkdir()
        with place.shell(stack) as shell:
            said = [shell.run(line) for line in restoring]
        assert re.search(r"\b0 files that are needed are not right", "".join(said))
        stack.history.accepted.discard(late)
        receiver.received.clear()
        start_all(stack, token)

        check_jobs(stack, ann)
        assert stack.client.get(f"/v1/jobs/{late}").status_code == 404
        assert stack.client.get("/v1/jobs", headers=bearer(late_token)).status_code == 401
        check_upload(stack, ann)
        unfinished = {*ann.running, ann.waiting}
        stack.wait_until(lambda: len(receiver.received) >= len(unfinished), "the messages of the webhook")
        told = [verify_webhook(ann.webhook_secret, got.headers, got.body) for got in receiver.received]
        assert {message["data"]["job_id"] for message in told} == unfinished
        stack.check()


def check_jobs(stack: Stack, ann: Ann) -> None:
    """What was done is there, what was not gets done; a job that ran is on its second attempt."""
    for job_id in (ann.done, *ann.running, ann.waiting):
        job = stack.wait(job_id)
        assert job.state == "succeeded", job.error
        assert job.attempt == (2 if job_id in ann.running else 1)
        (item,) = stack.client.get(f"/v1/jobs/{job_id}/artifacts").json()["items"]
        content = stack.client.get(item["links"]["self"]).content
        assert hashlib.sha256(content).hexdigest() == item["sha256"]
    assert stack.read(ann.running[0]).resumed_from is not None


def check_upload(stack: Stack, ann: Ann) -> None:
    """A client that asks goes on where the backup is."""
    head = stack.client.head(f"/v1/uploads/{ann.upload}", headers={"Tus-Resumable": "1.0.0"})
    assert head.headers["Upload-Offset"] == str(ARRIVED)
    send_part(stack, ann.upload, ARRIVED, FILE[ARRIVED:])
    whole = {"upload_id": ann.upload, "sha256": hashlib.sha256(FILE).hexdigest()}
    answer = stack.client.post("/v1/models", json=whole)
    assert answer.status_code == 201, answer.text
    model = f"/v1/models/{answer.json()['id']}"
    stack.wait_until(lambda: stack.client.get(model).json()["state"] == "ready", "the check of the file")
