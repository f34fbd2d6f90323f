"""Which rows name which blobs, and the agreement between those who write such rows and the collector.

A blob is stored before the row that names it, so for a while nothing does. Whoever then writes the row holds the blob
first: in the row's transaction, a lock on its name, and a look whether it is there. The collector deletes a blob only
in a transaction of its own, under the same lock, after a look whether a row names it. The second of the two sees what
the first did, however long either was paused: a row never names a blob that was collected.

On PostgreSQL the lock is an advisory one, shared by those who write rows. On SQLite the transaction is the lock: there
is one that writes at a time.
"""

import hashlib
from collections.abc import Iterable

from sqlalchemy import Select, func, select, union_all
from sqlalchemy.orm import Session

from app.db.tables import ArtifactRow, CheckpointRow, DatasetRow, JobRow, LogRow, ModelRow, UploadPartRow
from app.errors import BlobMissing
from app.storage import Blob, Section
from app.storage import sections as kinds
from app.storage.sections import name_owner


def hold(session: Session, section: Section, blobs: Iterable[Blob]) -> None:
    """Keep blobs from the collector until this writing transaction ends; raises BlobMissing where it came first."""
    session.connection()  # begins the transaction: a session waits with that for its first statement
    for blob in blobs:
        if _is_postgresql(session):
            session.execute(select(func.pg_advisory_xact_lock_shared(_key(section.name, blob.sha256))))
        if not section.exists(blob.sha256):
            raise BlobMissing(
                f"blob {blob.sha256} was collected before a row named it", fix="Send the request again.", retryable=True
            )


def hold_alone(session: Session, section: Section, sha256: str) -> bool:
    """Take a blob for the collector until this writing transaction ends; False where somebody holds it."""
    if not _is_postgresql(session):
        return True
    return bool(session.scalar(select(func.pg_try_advisory_xact_lock(_key(section.name, sha256)))))


def find_named(session: Session, section: str, digests: Iterable[str]) -> set[str]:
    """Return those of some digests that rows name in a section; all of them where nobody knows what it is for."""
    asked = list(digests)
    kind, _, name = section.partition("/")
    match kind:
        case kinds.OWNERS:
            query = _name_files(name_owner(section), asked)
        case kinds.CHECKPOINTS:
            query = select(CheckpointRow.sha256).where(CheckpointRow.job_id == name, CheckpointRow.sha256.in_(asked))
        case kinds.UPLOADS:
            query = select(UploadPartRow.sha256).where(UploadPartRow.upload_id == name, UploadPartRow.sha256.in_(asked))
        case _:
            return set(asked)
    return set(session.scalars(query))


def _name_files(owner: str, asked: list[str]) -> Select[str]:
    owned = [
        select(table.sha256).where(table.owner == owner, table.sha256.in_(asked))
        for table in (ModelRow, DatasetRow, ArtifactRow)
    ]
    logs = select(LogRow.sha256).join(JobRow, JobRow.id == LogRow.job_id)
    named = union_all(*owned, logs.where(JobRow.owner == owner, LogRow.sha256.in_(asked))).subquery()
    return select(named.c.sha256)


def _is_postgresql(session: Session) -> bool:
    return session.get_bind().dialect.name == "postgresql"


def _key(section: str, sha256: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{section}/{sha256}".encode()).digest()[:8], "big", signed=True)
