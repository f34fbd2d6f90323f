"""The dispatcher looks after the store: what is over is forgotten, and what nothing names is removed."""

from datetime import timedelta

from sqlalchemy import select, update

from app.db.clock import db_now
from app.db.tables import ArtifactRow, JobRow, UploadRow
from app.files.resumable import begin_upload
from app.ids import new_id
from app.storage import Blob, Section, owner_storage, upload_storage
from tests.worker.conftest import Bench
from worker.dispatch import Dispatcher


def put(section: Section, data: bytes) -> Blob:
    with section.writer() as writer:
        writer.write(data)
        return writer.commit()


def test_expired_uploads_old_files_and_orphans_go(bench: Bench) -> None:
    owned = owner_storage(bench.storage, "local")
    orphan, artifact = put(owned, b"orphan"), put(owned, b"artifact")
    job_id = bench.queue(["finish"])
    with bench.database.session() as session:
        upload = begin_upload(session, owner="local", size_bytes=9, description=None, expiry_seconds=-1)
        part = put(upload_storage(bench.storage, upload.id), b"part")
        long_ago = session.scalars(select(db_now())).one() - timedelta(days=8)
        session.execute(update(JobRow).values(state="succeeded", finished_at=long_ago))
        session.add(
            ArtifactRow(
                id=new_id("art"), job_id=job_id, owner="local", name="a", media_type="a/b", epoch=1,
                size_bytes=artifact.size_bytes, sha256=artifact.sha256, created_at=db_now(),
            )
        )  # fmt: skip

    kept = bench.settings.model_copy(update={"collect_grace_seconds": 0})
    Dispatcher(bench.database, kept)._collect()
    assert not owned.exists(orphan.sha256)
    assert not upload_storage(bench.storage, upload.id).exists(part.sha256)
    assert owned.exists(artifact.sha256)

    Dispatcher(bench.database, kept.model_copy(update={"keep_job_files_days": 7}))._collect()
    assert not owned.exists(artifact.sha256)
    with bench.database.read() as session:
        assert session.scalar(select(UploadRow)) is None
        assert session.scalars(select(JobRow.state)).one() == "succeeded"
