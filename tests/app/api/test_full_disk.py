"""A disk that is full to its reserve, or that nothing can be written to: what needs no space goes on."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import update
from starlette.testclient import TestClient

from app.db.session import Database
from app.db.tables import JobRow
from app.files.collect import collect
from app.main import create_app
from app.settings import Settings
from app.storage import open_storage
from tests.app.jobs.world import World

RESERVE_BYTES = 3_000_000


@contextmanager
def mounted(directory: Path, size: str) -> Iterator[None]:
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


def test_full_disk_refuses_uploads_alone_and_recovers(tmp_path: Path, sqlite_url: str) -> None:
    """Database and store on one disk of eight megabytes."""
    disk = tmp_path / "disk"
    with mounted(disk, "8m"):
        shutil.copy(sqlite_url.removeprefix("sqlite:///"), disk / "pare.sqlite3")
        settings = Settings(data_dir=disk, storage_reserve_bytes=RESERVE_BYTES)
        database = Database(settings.database_url)
        world = World(database, settings)
        job_id = world.submit()
        with TestClient(create_app(settings)) as client:
            stored = []
            for number in range(20):
                answer = client.post("/v1/models", content=bytes([number]) * 600_000)
                if answer.status_code != 201:
                    break
                stored.append(answer.json()["id"])
            assert (answer.status_code, answer.json()["code"]) == (507, "storage_full")
            assert answer.json()["retryable"] is True
            assert int(answer.headers["retry-after"]) > 0
            assert len(stored) >= 2
            assert list((disk / "store" / "incoming").iterdir()) == []
            assert shutil.disk_usage(disk).free > RESERVE_BYTES - 500_000

            assert client.post(f"/v1/jobs/{job_id}/cancel").status_code == 202
            with database.session() as session:  # their checks are over
                session.execute(update(JobRow).where(JobRow.id != job_id).values(state="succeeded"))
            for model_id in stored:
                assert client.delete(f"/v1/models/{model_id}").status_code == 204

            assert collect(database, open_storage(settings.storage_url), 0).num_blobs == len(stored)
            assert client.post("/v1/models", content=bytes(600_000)).status_code == 201
        database.dispose()


def test_read_only_store_refuses_uploads_and_goes_on_reading(tmp_path: Path, settings: Settings) -> None:
    settings = settings.model_copy(update={"storage_reserve_bytes": 0})
    with mounted(tmp_path / "store", "8m"), TestClient(create_app(settings)) as client:
        model = client.post("/v1/models", content=b"abc").json()
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "store"], check=True)
        answer = client.post("/v1/models", content=b"abd")
        assert (answer.status_code, answer.json()["code"]) == (503, "unavailable")
        assert str(tmp_path) not in answer.text
        assert client.get(model["links"]["self"]).json()["sha256"] == model["sha256"]
        subprocess.run(["mount", "-o", "remount,rw", tmp_path / "store"], check=True)
        assert client.post("/v1/models", content=b"abd").status_code == 201
