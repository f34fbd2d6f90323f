"""Resumable uploads: parts that are safe, in order, and the whole that is made of them.

Each append is a blob of its own, which becomes part of the upload in one transaction, if the upload still goes on where
the append began. So of two appends at once one counts and nothing is mixed, whichever processes they reach; what was
acknowledged is on disk; and an append that dies leaves a blob that no row names.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from app.db.clock import db_now
from app.db.tables import UploadPartRow, UploadRow
from app.errors import Conflict, Gone, NotFound, OffsetMismatch
from app.files.references import hold
from app.ids import new_id
from app.storage import Blob, Section, Storage, owner_storage, upload_storage


@dataclass(frozen=True)
class Completion:
    """What the client says about a file of which all bytes were sent."""

    upload_id: str
    sha256: str


def begin_upload(
    session: Session, *, owner: str, size_bytes: int, description: str | None, expiry_seconds: float
) -> UploadRow:
    """Write down a file that is to come."""
    upload = UploadRow(
        id=new_id("upl"),
        owner=owner,
        size_bytes=size_bytes,
        offset_bytes=0,
        description=description,
        created_at=db_now(),
        expires_at=db_now(expiry_seconds),
    )
    session.add(upload)
    session.flush()
    session.refresh(upload)
    return upload


def find_upload(session: Session, owner: str, upload_id: str, *, for_update: bool = False) -> UploadRow:
    """Return an upload of this owner; raises NotFound, and Gone where its time is over."""
    query = select(UploadRow, UploadRow.expires_at < db_now()).where(
        UploadRow.id == upload_id, UploadRow.owner == owner
    )
    found = session.execute(query.with_for_update() if for_update else query).one_or_none()
    if found is None:
        raise NotFound(f"there is no upload {upload_id}")
    upload, is_over = found
    if is_over:
        raise Gone(f"nothing was added to upload {upload_id} for too long", code="upload_expired")
    return upload


def append_part(
    session: Session, section: Section, upload: UploadRow, start: int, part: Blob, expiry_seconds: float
) -> int:
    """Make a stored blob the next part; return where the upload goes on. Raises OffsetMismatch where another did."""
    hold(session, section, [part])
    here = (UploadRow.id == upload.id, UploadRow.offset_bytes == start, UploadRow.made.is_(None))
    offset = session.scalar(
        update(UploadRow)
        .where(*here)
        .values(offset_bytes=start + part.size_bytes, expires_at=db_now(expiry_seconds))
        .returning(UploadRow.offset_bytes)
        .execution_options(synchronize_session=False)
    )
    if offset is None:
        raise OffsetMismatch(find_upload(session, upload.owner, upload.id).offset_bytes)
    session.add(UploadPartRow(upload_id=upload.id, start_bytes=start, size_bytes=part.size_bytes, sha256=part.sha256))
    session.flush()
    return offset


def list_parts(session: Session, upload: UploadRow) -> Sequence[Blob]:
    """Return the parts of a file that is complete; raises Conflict where bytes are missing."""
    if upload.offset_bytes != upload.size_bytes:
        raise Conflict(
            f"upload {upload.id} has {upload.offset_bytes} of {upload.size_bytes} bytes",
            code="upload_incomplete",
            fix="Send the rest with PATCH, from the offset that HEAD says.",
        )
    query = select(UploadPartRow).where(UploadPartRow.upload_id == upload.id).order_by(UploadPartRow.start_bytes)
    return [Blob(row.sha256, row.size_bytes) for row in session.scalars(query)]


def assemble(storage: Storage, owner: str, completion: Completion, parts: Sequence[Blob]) -> Blob:
    """Put the parts together as a file of the owner; raises ChecksumMismatch where it is not the one that was meant."""
    section = upload_storage(storage, completion.upload_id)
    with owner_storage(storage, owner).writer() as writer:
        for part in parts:
            for chunk in section.open(part.sha256):
                writer.write(chunk)
        return writer.commit(completion.sha256)


def finish_upload(session: Session, upload: UploadRow, made: str, expiry_seconds: float) -> None:
    """Note what was made of an upload, for those who ask again; its parts may be deleted once this is committed."""
    upload.made = made
    upload.expires_at = db_now(expiry_seconds)
    session.execute(
        delete(UploadPartRow).where(UploadPartRow.upload_id == upload.id).execution_options(synchronize_session=False)
    )


def end_upload(session: Session, owner: str, upload_id: str) -> None:
    """Forget an upload; its parts may be deleted once this is committed."""
    find_upload(session, owner, upload_id, for_update=True)
    session.execute(delete(UploadRow).where(UploadRow.id == upload_id).execution_options(synchronize_session=False))


def forget_uploads(session: Session) -> int:
    """Forget uploads to which nothing was added for too long; return how many."""
    over = delete(UploadRow).where(UploadRow.expires_at < db_now()).returning(UploadRow.id)
    return len(session.scalars(over.execution_options(synchronize_session=False)).all())
