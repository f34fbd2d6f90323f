"""What no row names goes, what a row names stays: whatever the collector races with, and wherever a process died."""

import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from sqlalchemy import delete, select

from app.db.clock import db_now
from app.db.session import Database
from app.db.tables import ArtifactRow, CheckpointRow, DatasetRow, LogRow, ModelRow
from app.errors import BlobMissing
from app.files import hold
from app.files.__main__ import main
from app.files.collect import collect
from app.ids import new_id
from app.settings import Settings
from app.storage import Blob, Section, Storage, checkpoint_storage, owner_storage
from tests.app.jobs.world import OWNER, World


def put(section: Section, data: bytes) -> Blob:
    with section.writer() as writer:
        writer.write(data)
        return writer.commit()


def insert_dataset(database: Database, section: Section, blob: Blob) -> str:
    """Add a row the way an upload does."""
    row_id = new_id("dst")
    with database.session() as session:
        hold(session, section, [blob])
        session.add(
            DatasetRow(
                id=row_id, owner=OWNER, name="d", format="npz", state="ready", size_bytes=blob.size_bytes,
                sha256=blob.sha256, created_at=db_now(),
            )
        )  # fmt: skip
    return row_id


@pytest.fixture
def world(database: Database, settings: Settings) -> World:
    """A world whose model names a blob that is not there: these tests look at the others."""
    return World(database, settings)


@pytest.fixture
def section(storage: Storage) -> Section:
    return owner_storage(storage, OWNER)


def test_what_rows_name_stays_and_the_rest_goes(
    world: World, database: Database, storage: Storage, section: Section
) -> None:
    job_id = world.submit()
    world.start(job_id)
    blobs = [put(section, bytes([number]) * 100) for number in range(5)]
    model, dataset, artifact, log, unnamed = blobs
    resumable = put(checkpoint_storage(storage, job_id), b"checkpoint")
    stale = put(checkpoint_storage(storage, job_id), b"stale")
    gone = put(checkpoint_storage(storage, "job_" + "z" * 26), b"of a job that is gone")
    insert_dataset(database, section, dataset)
    with database.session() as session:
        described = {"owner": OWNER, "size_bytes": 100, "created_at": db_now()}
        session.add(ModelRow(id=new_id("mdl"), name="m", format="pt2", state="ready", sha256=model.sha256, **described))
        session.add(
            ArtifactRow(
                id=new_id("art"), job_id=job_id, name="a", media_type="a/b", epoch=1, sha256=artifact.sha256,
                **described,
            )
        )  # fmt: skip
        session.add(LogRow(job_id=job_id, attempt=1, size_bytes=100, sha256=log.sha256, created_at=db_now()))
        session.add(
            CheckpointRow(
                job_id=job_id, seq=1, epoch=1, stage="s", fraction=0.5, sha256=resumable.sha256, size_bytes=10,
                created_at=db_now(),
            )
        )  # fmt: skip

    assert not collect(database, storage, 3600)
    done = collect(database, storage, 0)

    assert (done.num_blobs, done.num_bytes) == (3, 100 + len(b"stale") + len(b"of a job that is gone"))
    assert not section.exists(unnamed.sha256)
    assert all(section.exists(blob.sha256) for blob in (model, dataset, artifact, log))
    assert checkpoint_storage(storage, job_id).exists(resumable.sha256)
    assert not checkpoint_storage(storage, job_id).exists(stale.sha256)
    assert not checkpoint_storage(storage, "job_" + "z" * 26).exists(gone.sha256)


def test_bytes_of_one_owner_do_not_keep_those_of_another(database: Database, storage: Storage) -> None:
    mine, theirs = owner_storage(storage, OWNER), owner_storage(storage, "theirs")
    blob = put(mine, b"same")
    put(theirs, b"same")
    insert_dataset(database, mine, blob)
    assert collect(database, storage, 0).num_blobs == 1
    assert mine.exists(blob.sha256)
    assert not theirs.exists(blob.sha256)


def test_sections_that_nobody_knows_are_left_alone(database: Database, storage: Storage) -> None:
    put(storage.section("future/thing"), b"x")
    assert not collect(database, storage, 0)


def test_row_that_comes_after_the_collector_is_refused(database: Database, storage: Storage, section: Section) -> None:
    blob = put(section, b"late")
    assert collect(database, storage, 0).num_blobs == 1
    with pytest.raises(BlobMissing, match="collected") as caught:
        insert_dataset(database, section, blob)
    assert caught.value.retryable
    with database.read() as session:
        assert session.scalar(select(DatasetRow)) is None


def test_collector_passes_over_what_is_held(database: Database, storage: Storage, section: Section) -> None:
    """A writer that is paused between its look and its commit keeps its blob, for as long as it takes."""
    blob = put(section, b"held")
    if database.dialect == "sqlite":
        pytest.skip("one transaction writes at a time: the collector waits")
    with database.session() as session:
        hold(session, section, [blob])
        assert not collect(database, storage, 0)
    assert collect(database, storage, 0).num_blobs == 1


class Uploader(threading.Thread):
    """Stores, names and deletes a few files over and over, as uploads and deletes of equal bytes do."""

    def __init__(self, database: Database, section: Section, seed: int, num_rounds: int) -> None:
        super().__init__()
        self.database, self.section, self.num_rounds = database, section, num_rounds
        self.random = random.Random(seed)
        self.num_refused = 0
        self.lost: list[str] = []
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            for _ in range(self.num_rounds):
                self._round()
        except BaseException as failure:
            self.failure = failure

    def _round(self) -> None:
        blob = put(self.section, b"file %d" % self.random.randrange(3))
        time.sleep(self.random.random() * 0.002)
        try:
            row_id = insert_dataset(self.database, self.section, blob)
        except BlobMissing:
            self.num_refused += 1
            return
        if not self.section.exists(blob.sha256):
            self.lost.append(row_id)
        with self.database.session() as session:
            session.execute(delete(DatasetRow).where(DatasetRow.id == row_id))


@pytest.mark.timeout(240)
def test_no_row_loses_its_blob_to_the_collector(database: Database, storage: Storage, section: Section) -> None:
    """Hundreds of rounds of uploads and deletes of the same few bytes, with a collector that gives no grace."""
    uploaders = [Uploader(database, section, seed, num_rounds=150) for seed in range(3)]
    num_collected = 0
    for uploader in uploaders:
        uploader.start()
    while any(uploader.is_alive() for uploader in uploaders):
        num_collected += collect(database, storage, 0).num_blobs
    for uploader in uploaders:
        uploader.join()
    assert [uploader.failure for uploader in uploaders] == [None] * 3
    assert [uploader.lost for uploader in uploaders] == [[]] * 3
    assert num_collected > 20, "the collector met nobody: nothing was tried"
    collect(database, storage, 0)
    assert list(section.blobs()) == []


STORE_AND_DIE = """
import os, signal, sys
from app.storage import open_storage, owner_storage
section = owner_storage(open_storage(sys.argv[1]), "local")
unfinished = section.writer()
unfinished.write(b"half")
with section.writer() as writer:
    writer.write(b"whole")
    print(writer.commit().sha256, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def orphan(settings: Settings) -> str:
    """The digest of what a process stored before it died, with another file half written."""
    command = [sys.executable, "-c", STORE_AND_DIE, settings.storage_url]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, cwd=Path(__file__).parents[3])
    assert done.returncode == -9
    return done.stdout.strip()


def test_crash_between_blob_and_row_leaves_nothing_for_good(
    database: Database, storage: Storage, section: Section, settings: Settings, orphan: str
) -> None:
    assert section.exists(orphan)
    (half,) = (settings.data_dir / "store" / "incoming").iterdir()
    assert half.read_bytes() == b"half"
    assert not collect(database, storage, 3600), "who stored them may still be at work"

    os.utime(half, (time.time() - 25 * 3600,) * 2)
    done = collect(database, storage, 0)

    assert (done.num_blobs, done.num_abandoned) == (1, 1)
    assert not section.exists(orphan)
    assert not half.exists()


def test_retry_after_the_crash_stores_the_same_blob_and_names_it(
    database: Database, storage: Storage, section: Section, orphan: str
) -> None:
    assert put(section, b"whole").sha256 == orphan
    insert_dataset(database, section, Blob(orphan, 5))
    assert not collect(database, storage, 0)
    assert section.exists(orphan)


def test_command_collects_now(
    settings: Settings, section: Section, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PARE_DATABASE_URL", settings.database_url)
    monkeypatch.setenv("PARE_STORAGE_URL", settings.storage_url)
    put(section, b"123")
    assert main(["collect"]) == 0
    assert "removed 0 files" in capsys.readouterr().out
    assert main(["collect", "--grace-seconds", "0"]) == 0
    assert "removed 1 files with 3 bytes" in capsys.readouterr().out
