"""The collector: what nothing needs any more leaves the store. Safe to run anywhere, at any time, several at once."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from app.db.session import Database
from app.files.references import find_named, hold_alone
from app.storage import Section, Storage, StoredBlob

BATCH = 200
QUARANTINE_SECONDS = 30 * 24 * 3600.0
"""What is damaged is kept this long, for whoever wants to look at it."""
ABANDONED_SECONDS = 24 * 3600.0
"""A file that nothing was added to for this long has lost its writer."""


@dataclass(frozen=True)
class Collected:
    """What a run removed."""

    num_blobs: int
    num_bytes: int
    num_abandoned: int
    """Files whose writers died."""
    num_quarantined: int

    def __bool__(self) -> bool:
        return bool(self.num_blobs or self.num_abandoned or self.num_quarantined)


def collect(database: Database, storage: Storage, grace_seconds: float) -> Collected:
    """Remove blobs that no row names and that are older than the grace period, and what dead writers left.

    The grace period is for uploads: their rows are written after their bytes. It saves them from being sent again; that
    no row loses its blob does not hang on it (app/files/references.py).
    """
    removed = [blob for name in storage.sections() for blob in _collect(database, storage.section(name), grace_seconds)]
    return Collected(
        num_blobs=len(removed),
        num_bytes=sum(blob.size_bytes for blob in removed),
        num_abandoned=storage.remove_abandoned(max(ABANDONED_SECONDS, grace_seconds)),
        num_quarantined=storage.remove_quarantined(QUARANTINE_SECONDS),
    )


def find_unnamed(database: Database, section: Section, grace_seconds: float) -> Iterator[StoredBlob]:
    """Yield the blobs of a section that no row names, as far as can be told without a lock."""
    old = (blob for blob in section.blobs() if blob.age_seconds >= grace_seconds)
    while batch := list(islice(old, BATCH)):
        with database.read() as session:
            named = find_named(session, section.name, [blob.sha256 for blob in batch])
        yield from (blob for blob in batch if blob.sha256 not in named)


def _collect(database: Database, section: Section, grace_seconds: float) -> Iterator[StoredBlob]:
    for blob in find_unnamed(database, section, grace_seconds):
        if _collect_one(database, section, blob.sha256, grace_seconds):
            yield blob
    section.tidy()


def _collect_one(database: Database, section: Section, sha256: str, grace_seconds: float) -> bool:
    with database.session() as session:
        if not hold_alone(session, section, sha256) or find_named(session, section.name, [sha256]):
            return False
        blob = section.find(sha256)
        if blob is None or blob.age_seconds < grace_seconds:  # it was stored again meanwhile
            return False
        section.delete(sha256)
    return True
