"""Do rows and files agree, and are the files what their names say? For after a restore, and from time to time."""

from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import Select, select

from app.db.session import Database
from app.db.tables import ArtifactRow, CheckpointRow, DatasetRow, JobRow, LogRow, ModelRow, UploadPartRow, UploadRow
from app.errors import BlobMissing, StorageCorrupt
from app.files.collect import find_unnamed
from app.storage import Section, Storage
from app.storage.sections import CHECKPOINTS, UPLOADS, name_owner_section

APART = {"checkpoint of job": CHECKPOINTS, "part of upload": UPLOADS}
"""What does not lie with its owner's files -> the kind of section."""


@dataclass(frozen=True)
class Finding:
    """Something that does not agree."""

    kind: str
    """missing, wrong_size or damaged: a row's blob is not what it should be. unnamed: a blob that no row names."""
    section: str
    sha256: str
    size_bytes: int
    """missing: as the row says. Otherwise of the blob."""
    named_by: tuple[str, ...] = ()
    """What names the blob, for example model mdl_..."""

    @property
    def is_loss(self) -> bool:
        """Whether something that is needed is not there; an unnamed blob only takes space."""
        return self.kind != "unnamed" and bool(self.named_by)


def reconcile(database: Database, storage: Storage) -> Iterator[Finding]:
    """Yield every row whose blob is not there, or has another size, and every blob that no row names. Reads no bytes.

    While the service works some blobs are not named yet; it changes nothing, so ask again.
    """
    named = _list_named(database)
    for (section, sha256), (size_bytes, names) in sorted(named.items()):
        blob = storage.section(section).find(sha256)
        if blob is None:
            yield Finding("missing", section, sha256, size_bytes, names)
        elif blob.size_bytes != size_bytes:
            yield Finding("wrong_size", section, sha256, blob.size_bytes, names)
    for section in storage.sections():
        for blob in find_unnamed(database, storage.section(section), 0.0):
            yield Finding("unnamed", section, blob.sha256, blob.size_bytes)


def scrub(database: Database, storage: Storage) -> Iterator[Finding]:
    """Read every byte; put blobs that have rotted into quarantine and yield them with the rows that name them."""
    for name in storage.sections():
        section = storage.section(name)
        for blob in section.blobs():
            if not _is_right(section, blob.sha256, blob.size_bytes):
                _, names = _list_named(database).get((name, blob.sha256), (0, ()))
                yield Finding("damaged", name, blob.sha256, blob.size_bytes, names)


def _is_right(section: Section, sha256: str, size_bytes: int) -> bool:
    try:
        for _ in section.read(sha256, size_bytes):
            pass
    except BlobMissing:
        return True  # deleted meanwhile
    except StorageCorrupt:
        return section.find(sha256) is not None  # stored again meanwhile
    return True


def _list_named(database: Database) -> dict[tuple[str, str], tuple[int, tuple[str, ...]]]:
    """Return (section, digest) -> size and what names it."""
    named: dict[tuple[str, str], tuple[int, tuple[str, ...]]] = {}
    with database.read() as session:
        for noun, query in _queries().items():
            for owner, row_id, sha256, size_bytes in session.execute(query):
                kind = APART.get(noun)
                section = f"{kind}/{row_id}" if kind else name_owner_section(owner)
                _, others = named.get((section, sha256), (0, ()))
                named[section, sha256] = (size_bytes, (*others, f"{noun} {row_id}"))
    return named


def _queries() -> dict[str, Select[str, str, str, int]]:
    of_jobs = select(JobRow.owner, JobRow.id)
    return {
        "model": select(ModelRow.owner, ModelRow.id, ModelRow.sha256, ModelRow.size_bytes),
        "dataset": select(DatasetRow.owner, DatasetRow.id, DatasetRow.sha256, DatasetRow.size_bytes),
        "artifact": select(ArtifactRow.owner, ArtifactRow.id, ArtifactRow.sha256, ArtifactRow.size_bytes),
        "log of job": of_jobs.add_columns(LogRow.sha256, LogRow.size_bytes).join(LogRow, LogRow.job_id == JobRow.id),
        "checkpoint of job": of_jobs.add_columns(CheckpointRow.sha256, CheckpointRow.size_bytes).join(
            CheckpointRow, CheckpointRow.job_id == JobRow.id
        ),
        "part of upload": select(UploadRow.owner, UploadRow.id, UploadPartRow.sha256, UploadPartRow.size_bytes).join(
            UploadPartRow, UploadPartRow.upload_id == UploadRow.id
        ),
    }
