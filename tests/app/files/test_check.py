"""After a restore, or when a disk rots: what is missing is told with what needs it, and nothing wrong is served."""

import shutil
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from app.db.clock import db_now
from app.db.session import Database
from app.db.tables import ArtifactRow
from app.files.__main__ import main
from app.files.check import Finding, reconcile, scrub
from app.files.collect import collect
from app.ids import new_id
from app.main import create_app
from app.settings import Settings
from app.storage import Blob, Section, Storage, open_storage, owner_storage
from tests.app.jobs.world import OWNER, World


@pytest.fixture
def database(sqlite_url: str) -> Database:
    return Database(sqlite_url)


@pytest.fixture
def world(database: Database, settings: Settings) -> World:
    return World(database, settings)


@pytest.fixture
def section(storage: Storage, database: Database, world: World) -> Section:
    """The owner's files; the world's model names one of them from now on."""
    section = owner_storage(storage, OWNER)
    blob = put(section, b"model")
    with database.session() as session:
        row = world.upload(world.model_id)
        row.sha256, row.size_bytes = blob.sha256, blob.size_bytes
        session.merge(row)
    return section


def put(section: Section, data: bytes) -> Blob:
    with section.writer() as writer:
        writer.write(data)
        return writer.commit()


def add_artifact(world: World, section: Section, data: bytes) -> ArtifactRow:
    blob = put(section, data)
    row = ArtifactRow(
        id=new_id("art"), job_id=world.submit(), owner=OWNER, name="model.onnx", media_type="a/b", epoch=1,
        size_bytes=blob.size_bytes, sha256=blob.sha256, created_at=db_now(),
    )  # fmt: skip
    with world.database.session() as session:
        session.add(row)
    return row


def rot(settings: Settings, sha256: str, data: bytes) -> None:
    (path,) = (settings.data_dir / "store" / "blobs").rglob(sha256)
    path.write_bytes(data)


def test_all_is_well(world: World, database: Database, storage: Storage, section: Section) -> None:
    add_artifact(world, section, b"artifact")
    assert list(reconcile(database, storage)) == []
    assert list(scrub(database, storage)) == []


def test_scrub_finds_what_rotted_and_what_needs_it(
    world: World, database: Database, storage: Storage, section: Section, settings: Settings
) -> None:
    artifact = add_artifact(world, section, b"artifact")
    unnamed = put(section, b"unnamed")
    rot(settings, artifact.sha256, b"artifacT")
    rot(settings, unnamed.sha256, b"")

    found = {finding.sha256: finding for finding in scrub(database, storage)}

    names = (f"artifact {artifact.id}",)
    assert found[artifact.sha256] == Finding("damaged", f"owners/{OWNER}", artifact.sha256, 8, names)
    assert found[artifact.sha256].is_loss
    assert not found[unnamed.sha256].is_loss
    assert len(found) == 2
    assert list(scrub(database, storage)) == [], "they are in quarantine"
    (missing,) = reconcile(database, storage)
    assert (missing.kind, missing.named_by) == ("missing", names)


def test_damage_is_a_problem_before_the_first_byte_of_a_small_file_and_stays_one(
    world: World, section: Section, settings: Settings
) -> None:
    artifact = add_artifact(world, section, b"artifact")
    rot(settings, artifact.sha256, b"artifacT")
    with TestClient(create_app(settings)) as client:
        for _ in range(2):
            answer = client.get(f"/v1/artifacts/{artifact.id}")
            assert (answer.status_code, answer.json()["code"]) == (503, "integrity")
            assert answer.json()["retryable"] is False
        answer = client.get(f"/v1/artifacts/{artifact.id}", headers={"Range": "bytes=1-"})
        assert (answer.status_code, answer.json()["code"]) == (503, "integrity")
        put(section, b"artifact")
        assert client.get(f"/v1/artifacts/{artifact.id}").content == b"artifact"


def back_up(settings: Settings, place: Path) -> None:
    place.mkdir()
    shutil.copy(settings.data_dir / "pare.sqlite3", place)
    shutil.copytree(settings.data_dir / "store", place / "store")


def checkpoint(database: Database) -> None:
    """Bring what is in SQLite's log into its file, which is what these tests copy."""
    with database.engine.connect() as connection:
        connection.exec_driver_sql("ROLLBACK")
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.exec_driver_sql("BEGIN")
    database.dispose()


def test_store_older_than_the_database(
    world: World, database: Database, section: Section, settings: Settings, tmp_path: Path
) -> None:
    old = add_artifact(world, section, b"old")
    back_up(settings, tmp_path / "backup")
    new = add_artifact(world, section, b"new")
    shutil.rmtree(settings.data_dir / "store")
    shutil.copytree(tmp_path / "backup" / "store", settings.data_dir / "store")

    (found,) = reconcile(database, open_storage(settings.storage_url))

    assert (found.kind, found.is_loss, found.named_by) == ("missing", True, (f"artifact {new.id}",))
    with TestClient(create_app(settings)) as client:
        assert client.get(f"/v1/artifacts/{old.id}").content == b"old"
        answer = client.get(f"/v1/artifacts/{new.id}")
        assert (answer.status_code, answer.json()["code"]) == (503, "blob_missing")


def test_database_older_than_the_store(
    world: World, database: Database, section: Section, settings: Settings, tmp_path: Path
) -> None:
    old = add_artifact(world, section, b"old")
    checkpoint(database)
    back_up(settings, tmp_path / "backup")
    new = add_artifact(world, section, b"new")
    database.dispose()
    for path in settings.data_dir.glob("pare.sqlite3*"):
        path.unlink()
    shutil.copy(tmp_path / "backup" / "pare.sqlite3", settings.data_dir)

    restored = Database(settings.database_url)
    storage = open_storage(settings.storage_url)
    (found,) = reconcile(restored, storage)

    assert (found.kind, found.sha256, found.is_loss) == ("unnamed", new.sha256, False)
    with TestClient(create_app(settings)) as client:
        assert client.get(f"/v1/artifacts/{old.id}").content == b"old"
        assert client.get(f"/v1/artifacts/{new.id}").status_code == 404
    assert collect(restored, storage, 0).num_blobs == 1
    assert list(reconcile(restored, storage)) == []
    restored.dispose()


def test_commands_tell_by_their_status(
    world: World,
    section: Section,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PARE_DATABASE_URL", settings.database_url)
    monkeypatch.setenv("PARE_STORAGE_URL", settings.storage_url)
    assert [main([command]) for command in ("scrub", "reconcile")] == [0, 0]
    artifact = add_artifact(world, section, b"artifact")
    rot(settings, artifact.sha256, b"longer than it was")
    assert main(["reconcile"]) == 1
    assert f"wrong_size owners/{OWNER}/{artifact.sha256} 18 bytes: artifact {artifact.id}" in capsys.readouterr().out
    assert main(["scrub"]) == 1
    assert "1 files that are needed are not right" in capsys.readouterr().out
    monkeypatch.setenv("PARE_STORAGE_URL", "nonsense")
    assert main(["scrub"]) == 2
