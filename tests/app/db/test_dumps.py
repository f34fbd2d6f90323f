"""Databases as earlier revisions left them: upgraded, they are whole, and the service goes on with them."""

import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import inspect, make_url, text
from starlette.testclient import TestClient

from app.db.session import Database
from app.main import create_app
from app.settings import Settings
from tests.app.db.dump import DUMPS
from tests.app.jobs.world import OWNER
from tests.postgres import PostgresServer

FILES = sorted(DUMPS.glob("*.sql"))
assert FILES
BORN_WITH_THE_SERVICE = {"workers", "dispatchers"}
"""Tables of what is true for a moment."""


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a database as it was."""
    path: Path = request.param
    if path.stem.endswith("sqlite"):
        with closing(sqlite3.connect(tmp_path / "earlier.sqlite3")) as connection:
            connection.executescript(path.read_text(encoding="utf-8"))
        yield f"sqlite:///{tmp_path / 'earlier.sqlite3'}"
        return
    server: PostgresServer = request.getfixturevalue("postgres_server")
    url = server.create_database(migrated=False)
    command = [str(server.binaries / "psql"), "--quiet", "--set", "ON_ERROR_STOP=1", "--host", str(server.directory)]
    target = ["--username", "postgres", "--dbname", str(make_url(url).database), "--file", str(path)]
    subprocess.run([*command, *target], check=True, capture_output=True)
    yield url
    server.drop_database(url)


def count_rows(database: Database) -> dict[str, int]:
    with database.read() as session:
        names = inspect(session.connection()).get_table_names()
        return {name: session.scalar(text(f"SELECT count(*) FROM {name}")) or 0 for name in names}


def test_an_earlier_database_is_upgraded_whole_and_works(url: str, settings: Settings) -> None:
    database = Database(url)
    before = count_rows(database)
    assert not [name for name, number in before.items() if not number and name not in BORN_WITH_THE_SERVICE]
    database.upgrade()
    database.check_schema()
    assert {name: number for name, number in count_rows(database).items() if name in before} == before
    with TestClient(create_app(settings.model_copy(update={"database_url": url}))) as client:
        jobs = {job["labels"].get("n"): job for job in client.get("/v1/jobs").json()["items"]}
        states = [jobs[number]["status"] for number in "01234"]
        assert states == ["succeeded", "failed", "cancelled", "running", "queued"]
        for job in jobs.values():
            for what in ("", "/events", "/artifacts"):
                assert client.get(f"/v1/jobs/{job['id']}{what}").status_code == 200
        assert client.get(f"/v1/jobs/{jobs['0']['id']}/metrics").json()["verdict"]["outcome"] == "better"
        assert client.get(f"/v1/distillations/{jobs[None]['id']}").status_code == 200
        for path in ("/v1/models", "/v1/datasets", "/v1/webhooks", "/v1/keys", "/v1/audit"):
            assert client.get(path).json()["items"], path
        assert client.get(f"/v1/owners/{OWNER}/quota").json()["own_limits"]["queued_jobs"] == 100
        assert client.post(f"/v1/jobs/{jobs['1']['id']}/retry").status_code == 202
        assert client.delete(f"/v1/jobs/{jobs['2']['id']}").status_code == 204
        again = {"model_id": jobs["4"]["model_id"], "recipe": jobs["4"]["recipe"]}
        assert client.post("/v1/jobs", json=again).status_code == 202
    database.downgrade("base")
    database.dispose()
