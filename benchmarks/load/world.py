"""A whole service on this machine, as in production, and beside it what it is compared with.

PostgreSQL with its own defaults, a Valkey server, the API and the dispatcher as processes; keys in force, with quotas
that administrators raised over HTTP; one worker that is seen lately and takes nothing. nginx serves the same files, and
another one stands in front of the API as docker/nginx.conf says.
"""

import json
import os
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
from sqlalchemy import delete, func, insert, select, text
from sqlalchemy.orm import Session

from app.access.keys import SCOPES, create_key
from app.db.clock import db_now
from app.db.session import Database
from app.db.tables import EventRow, JobRow, ModelRow, OutboxRow
from app.ids import new_id
from app.jobs import claim, record_progress, register_worker, submit_job, succeed, touch_worker
from app.recipes.facts import Capability, LayerFacts, ModelFacts, TensorFacts
from app.recipes.metrics import LayerMetrics
from app.recipes.plan import ArtifactFile, EngineResult, Progress
from app.recipes.recipe import Recipe
from app.settings import Settings
from app.storage import Blob, open_storage, owner_storage
from benchmarks.upload_memory import find_free_port
from tests.app.jobs.test_finish import METRICS
from tests.nginx import run_nginx
from tests.postgres import PostgresServer
from worker.broker import EmbeddedBroker
from worker.children import Child

NUM_OWNERS = 4
NUM_LAYERS = 43
READY_SECONDS = 60.0
ARTIFACT_BYTES = 64 * 1024
RECIPE: dict[str, Any] = {"steps": [{"kind": "prune_magnitude", "sparsity": 0.5}]}
LAYER = LayerMetrics(
    name="layer", type="Conv2d", parameters_before=9_216, parameters_after=9_216, nonzero_after=4_608,
    shape_before=(32, 32, 3, 3), shape_after=(32, 32, 3, 3), macs_before=2_359_296, macs_after=2_359_296,
)  # fmt: skip
WORKER_ID = "busy"
NGINX = shutil.which("nginx") or "/usr/sbin/nginx"
FIXED = b'{"id": "job_00000000000000000000000000", "status": "queued"}'
"""What nginx answers where only the client is measured."""


@dataclass
class Owner:
    """Somebody with a key, a model, and a job that has ended."""

    name: str
    token: str
    model_id: str
    done_id: str
    artifact_id: str
    waiting_ids: list[str] = field(default_factory=list)
    """Jobs that wait."""


@dataclass
class World:
    """What is running."""

    directory: Path
    settings: Settings
    database: Database
    children: dict[str, Child]
    """pare, bare, dispatch, broker, nginx."""
    ports: dict[str, int]
    """Of pare, bare, nginx, and the one in front of pare."""
    owners: list[Owner]
    item_ids: list[str]
    """Rows of the bare service."""

    def read_processor_seconds(self, name: str) -> float:
        """Return the processor time that a process took so far."""
        process = self.children[name].process
        assert process is not None
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def wait_until_relayed(self) -> None:
        """Wait until every hint is in the broker."""
        while True:
            with self.database.read() as session:
                if not session.scalar(select(func.count()).select_from(OutboxRow)):
                    return
            time.sleep(0.2)

    def forget_submitted(self) -> None:
        """Remove the waiting jobs that a benchmark submitted."""
        self.wait_until_relayed()
        kept = [job_id for owner in self.owners for job_id in owner.waiting_ids]
        with self.database.session() as session:
            session.execute(text("CREATE TEMPORARY TABLE kept (id varchar PRIMARY KEY) ON COMMIT DROP"))
            session.execute(text("INSERT INTO kept SELECT unnest(CAST(:ids AS varchar[]))"), {"ids": kept})
            submitted = select(JobRow.id).where(JobRow.state == "queued", text("id NOT IN (SELECT id FROM kept)"))
            session.execute(delete(JobRow).where(JobRow.id.in_(submitted)).execution_options(synchronize_session=False))
        with self.database.session() as session:
            session.execute(text("ANALYZE"))

    def queue_until(self, number: int) -> None:
        """Have so many jobs wait, as many of each owner's."""
        columns = JobRow.__table__.columns
        with self.database.session() as session:
            for owner in self.owners:
                job = submit(session, self.settings, owner.name, owner.model_id)
                row = {column.name: getattr(job, column.key) for column in columns}
                missing = number // len(self.owners) - len(owner.waiting_ids) - 1
                more = [{**row, "id": new_id("job")} for _ in range(missing)]
                if more:
                    session.execute(insert(JobRow).values(created_at=db_now()), more)
                    event = {"seq": 1, "kind": "state", "data": {"state": "queued", "attempt": 0}}
                    session.execute(
                        insert(EventRow).values(created_at=db_now()), [{"job_id": each["id"], **event} for each in more]
                    )
                    session.execute(
                        insert(OutboxRow).values(created_at=db_now()), [{"job_id": each["id"]} for each in more]
                    )
                owner.waiting_ids += [job.id, *(str(each["id"]) for each in more)]
        self.wait_until_relayed()
        with self.database.session() as session:
            session.execute(text("ANALYZE"))


def submit(session: Session, settings: Settings, owner: str, model_id: str) -> JobRow:
    """Submit a job without the API."""
    return submit_job(
        session,
        settings,
        owner=owner,
        model_id=model_id,
        recipe=Recipe.model_validate(RECIPE),
        labels={},
        priority=0,
        deadline_seconds=None,
    )


@contextmanager
def open_world(parent: Path | None) -> Iterator[World]:
    """Start everything; all of it ends with the `with`."""
    assert Path(NGINX).exists(), "nginx is not there: apt-get install nginx-light (it need not run)"
    with ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="pare-load-", dir=parent))
        stack.callback(shutil.rmtree, directory)
        directory.chmod(0o755)
        place = directory / "postgres"  # of the user that PostgreSQL runs as
        place.mkdir()
        server = PostgresServer(place, as_installed=True)
        stack.callback(server.stop)
        url = server.create_database(migrated=True)
        database = Database(url)
        stack.callback(database.dispose)
        ports = {name: find_free_port() for name in ("pare", "bare", "nginx")}
        broker = EmbeddedBroker(directory / "broker")
        stack.callback(broker.close)
        settings = Settings(
            data_dir=directory, database_url=url, broker_url=broker.url, auth="keys", port=ports["pare"],
        )  # fmt: skip
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PARE_")},
            "PARE_DATA_DIR": str(directory), "PARE_DATABASE_URL": url, "PARE_BROKER_URL": broker.url,
            "PARE_AUTH": "keys", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        open_storage(settings.storage_url)

        children: dict[str, Child] = {}

        def start(name: str, command: list[str], **changes: str) -> None:
            children[name] = child = Child(name, command, environment | changes, directory / f"{name}.log", 30)
            child.start()
            stack.callback(child.stop, lambda: False)

        start("broker", broker.command())
        while not broker.is_ready():
            time.sleep(0.05)
        start("pare", [sys.executable, "-m", "app"], PARE_PORT=str(ports["pare"]), PARE_X_ACCEL_REDIRECT="/blobs/")
        start("dispatch", [sys.executable, "-m", "worker.dispatch"])
        start("bare", [sys.executable, "-m", "benchmarks.load.bare"], PARE_PORT=str(ports["bare"]))
        start("nginx", [NGINX, "-c", str(_write_nginx(directory, ports["nginx"])), "-p", str(directory)])
        for path in (f"{ports['pare']}/health/live", f"{ports['bare']}/openapi.json", f"{ports['nginx']}/fixed"):
            _wait_until_answered(f"http://127.0.0.1:{path}")
        pare = f"http://127.0.0.1:{ports['pare']}"
        front = stack.enter_context(run_nginx(directory / "front", pare, directory / "store" / "blobs"))
        ports["front"] = int(front.rpartition(":")[2])
        stack.enter_context(_be_a_worker(database))
        owners = _make_owners(database, settings)
        _raise_quotas(database, ports["pare"], owners)
        with httpx2.Client(trust_env=False) as client:
            body = {"model_id": owners[0].model_id, "recipe": RECIPE}
            answers = [client.post(f"http://127.0.0.1:{ports['bare']}/items", json=body) for _ in range(100)]
        yield World(directory, settings, database, children, ports, owners, [each.json()["id"] for each in answers])


@contextmanager
def _be_a_worker(database: Database) -> Iterator[None]:
    """Be seen as a worker that is busy with something else for as long as this lasts."""
    facts = {"accepts": ["cpu"], "accepts_jobs": True, "memory_bytes": 2**33, "num_threads": 2, "isolation": ["none"]}
    with database.session() as session:
        register_worker(session, WORKER_ID, host="localhost", queue="pare.cpu", facts=facts)
    over = threading.Event()

    def beat() -> None:
        while not over.wait(5):
            with database.session() as session:
                touch_worker(session, WORKER_ID)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _make_owners(database: Database, settings: Settings) -> list[Owner]:
    owners = []
    for name in (f"owner{number}" for number in range(NUM_OWNERS)):
        section = owner_storage(open_storage(settings.storage_url), name)
        with section.writer() as writer:
            writer.write(secrets.token_bytes(ARTIFACT_BYTES))
            blob = writer.commit()
        with database.session() as session:
            _, token = create_key(session, environment="live", owner=name, name="load", scopes=SCOPES)
            model = ModelRow(
                id=new_id("mdl"), owner=name, name="resnet20", format="pt2", state="ready", sha256=blob.sha256,
                size_bytes=blob.size_bytes, facts=describe_model().model_dump(mode="json"), created_at=db_now(),
            )  # fmt: skip
            session.add(model)
            session.flush()
            done_id, artifact_id = finish_one(session, settings, name, model.id, blob)
        owners.append(Owner(name, token, model.id, done_id, artifact_id))
    return owners


def finish_one(session: Session, settings: Settings, owner: str, model_id: str, blob: Blob) -> tuple[str, str]:
    """Let a job be submitted, run with some progress, and succeed with one file; return its id and the file's."""
    job = submit(session, settings, owner, model_id)
    held = claim(session, job.id, WORKER_ID, 60)
    assert held is not None
    for step in range(20):
        progress = Progress(stage="step", step=0, fraction=step / 20, eta_seconds=None, message="training")
        record_progress(session, held.job_id, held.epoch, progress)
    file = ArtifactFile(
        name="model.pt2", media_type="application/octet-stream", size_bytes=blob.size_bytes, sha256=blob.sha256
    )
    metrics = METRICS.model_copy(update={"layers": (LAYER,) * NUM_LAYERS})
    assert succeed(session, held, EngineResult(artifacts=(file,), metrics=metrics), {file.name: blob}, ["bubblewrap"])
    session.flush()
    artifact_id = session.execute(text("SELECT id FROM artifacts WHERE job_id = :job"), {"job": job.id}).scalar_one()
    return str(job.id), str(artifact_id)


def describe_model() -> ModelFacts:
    """Return facts as large as those of a ResNet-20: 43 layers, ten techniques."""
    names = [f"stage{number // 14}.block{number % 14 // 5}.layer{number % 5}" for number in range(NUM_LAYERS)]
    kinds = (
        "prune_magnitude", "prune_n_m", "prune_wanda", "prune_structured", "factorize_low_rank", "share_weights",
        "quantize_int8", "quantize_int4", "quantize_float", "quantize_mixed",
    )  # fmt: skip
    return ModelFacts(
        inputs=(TensorFacts(name="x", dtype="float32", shape=("batch", 3, 32, 32)),),
        outputs=(TensorFacts(name="logits", dtype="float32", shape=("batch", 10)),),
        dynamic_batch=True, batch_size=None, exported_in="eval", parameters=272_474, buffers=1_436,
        parameter_bytes=1_089_896, macs=40_813_184, uncounted_operators=(), tied=(),
        layers=tuple(
            LayerFacts(name=name, type="Conv2d", shape=(32, 32, 3, 3), parameters=9_216, macs=2_359_296)
            for name in names
        ),
        capabilities=tuple(Capability(kind=kind, applicable=True, layers=tuple(names), missing=None) for kind in kinds),
    )  # fmt: skip


def _raise_quotas(database: Database, port: int, owners: list[Owner]) -> None:
    """Give each owner a limit of requests that these clients do not meet: counted all the same."""
    with database.session() as session:
        _, token = create_key(session, environment="live", owner="admin", name="load", scopes=SCOPES)
    quota = {"stored_bytes": None, "running_jobs": None, "queued_jobs": None, "requests_per_minute": 1_000_000}
    with httpx2.Client(headers={"Authorization": f"Bearer {token}"}, trust_env=False) as client:
        for owner in owners:
            answer = client.put(f"http://127.0.0.1:{port}/v1/owners/{owner.name}/quota", json=quota)
            assert answer.status_code == 200, answer.text


def _wait_until_answered(url: str) -> None:
    end = time.monotonic() + READY_SECONDS
    with httpx2.Client(trust_env=False) as client:
        while True:
            try:
                assert client.get(url).status_code == 200, url
                return
            except httpx2.TransportError:
                assert time.monotonic() < end, f"{url} does not answer"
            time.sleep(0.1)


def _write_nginx(directory: Path, port: int) -> Path:
    user = "user root;" if os.geteuid() == 0 else ""  # the files are this user's alone
    path = directory / "nginx.conf"
    path.write_text(f"""
        daemon off; pid {directory}/nginx.pid; error_log stderr; worker_processes 1; {user}
        events {{ worker_connections 256; }}
        http {{
            access_log off; sendfile on; tcp_nopush on; keepalive_requests 1000000000;
            client_body_temp_path {directory}/nginx-body; proxy_temp_path {directory}/nginx-proxy;
            fastcgi_temp_path {directory}/nginx-fastcgi; uwsgi_temp_path {directory}/nginx-uwsgi;
            scgi_temp_path {directory}/nginx-scgi;
            server {{
                listen 127.0.0.1:{port};
                location = /fixed {{ default_type application/json; return 200 '{FIXED.decode()}'; }}
                location / {{ root {directory}; }}
            }}
        }}
    """)
    return path


def make_body(owner: Owner) -> bytes:
    """Return a submission."""
    return json.dumps({"model_id": owner.model_id, "recipe": RECIPE}).encode()
