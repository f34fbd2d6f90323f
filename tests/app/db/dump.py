"""`python -m tests.app.db.dump`: fill a database of each kind as users do, and keep it as it is at this revision.

Later revisions must be able to take the databases that are out there. Run this for each release, and never again for
that one; tests/app/db/test_dumps.py upgrades all that are kept.
"""

import sqlite3
import subprocess
import tempfile
from contextlib import closing
from pathlib import Path

from sqlalchemy import make_url, text
from starlette.testclient import TestClient

from app.db.session import Database
from app.jobs.checkpoints import Place, StoredCheckpoint, record_checkpoint
from app.main import create_app
from app.recipes.plan import EngineError
from app.settings import Settings
from app.storage import checkpoint_storage, open_storage
from tests.app.jobs.pipeline_world import PipelineWorld
from tests.app.jobs.world import World
from tests.pare.conftest import Hands
from tests.postgres import PostgresServer

DUMPS = Path(__file__).parent / "dumps"
CONTENT = b"twelve bytes"
TUS = {"Tus-Resumable": "1.0.0"}


def populate(settings: Settings) -> None:
    """Put something into every table."""
    database, storage = Database(settings.database_url), open_storage(settings.storage_url)
    world, hands = World(database, settings), Hands(database, storage)
    with TestClient(create_app(settings)) as client:
        model_id = client.post("/v1/models", params={"name": "uploaded"}, content=CONTENT).json()["id"]
        hands.check_model(model_id)
        hands.reject(client.post("/v1/models", content=b"no model").json()["id"])
        client.post("/v1/datasets", params={"format": "npz"}, content=CONTENT)
        client.post("/v1/webhooks", json={"url": "https://8.8.8.8/hook", "events": ["job.succeeded", "job.failed"]})
        client.put("/v1/owners/local/quota", json={"queued_jobs": 100})
        client.post("/v1/keys", json={"owner": "ann", "scopes": ["read"]})
        upload = client.post("/v1/uploads", headers={**TUS, "Upload-Length": "20"}).headers["location"]
        part = {**TUS, "Upload-Offset": "0", "Content-Type": "application/offset+octet-stream"}
        assert client.patch(upload, headers=part, content=CONTENT).status_code == 204
        jobs = [_submit(client, model_id, number) for number in range(5)]
        pipelines = PipelineWorld(database, settings)
        body = {"model_id": pipelines.model_id, "distillation": pipelines.describe().model_dump(mode="json")}
        answer = client.post("/v1/distillations", json=body)
        assert answer.status_code == 202, answer.text
        hands.run(jobs[0], {"model.onnx": CONTENT})
        hands.run(jobs[1], error=EngineError(code="loss_not_finite", detail="loss is nan", fix="Lower it."))
        client.post(f"/v1/jobs/{jobs[2]}/cancel")
        claim = world.start(jobs[3], lease_seconds=1)
        with checkpoint_storage(storage, jobs[3]).writer() as writer:
            writer.write(CONTENT)
            checkpoint = StoredCheckpoint(Place("finetune", 0, 0.5), writer.commit())
        with database.session() as session:
            assert record_checkpoint(session, jobs[3], claim.epoch, checkpoint) is not None
    database.dispose()


def _submit(client: TestClient, model_id: str, number: int) -> str:
    body = {"model_id": model_id, "recipe": {"steps": [{"kind": "prune_magnitude"}]}, "labels": {"n": str(number)}}
    answer = client.post("/v1/jobs", json=body, headers={"Idempotency-Key": f"number-{number}"})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def main() -> None:
    """Make both dumps."""
    with tempfile.TemporaryDirectory(prefix="pare-dump-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        (directory / "postgres").mkdir()
        server = PostgresServer(directory / "postgres")
        try:
            for url in (f"sqlite:///{directory / 'pare.sqlite3'}", server.create_database(migrated=False)):
                _make_dump(url, directory, server)
        finally:
            server.stop()


def _make_dump(url: str, directory: Path, server: PostgresServer) -> None:
    database = Database(url)
    database.upgrade()
    with database.read() as session:
        revision = session.scalar(text("SELECT version_num FROM alembic_version"))
    dialect = database.dialect
    database.dispose()
    populate(Settings(data_dir=directory / dialect, database_url=url))
    if dialect == "sqlite":
        with closing(sqlite3.connect(str(make_url(url).database))) as connection:
            dumped = "\n".join(connection.iterdump())
    else:
        command = [str(server.binaries / "pg_dump"), "--no-owner", "--no-privileges", "--host", str(server.directory)]
        source = ["--username", "postgres", str(make_url(url).database)]
        dumped = subprocess.run([*command, *source], capture_output=True, text=True, check=True).stdout
    DUMPS.mkdir(exist_ok=True)
    path = DUMPS / f"{revision}.{dialect}.sql"
    path.write_text(dumped, encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
