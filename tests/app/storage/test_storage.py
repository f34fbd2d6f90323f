"""Blobs arrive whole or not at all, are kept once, and never come back as other bytes: in a store of every kind."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as limits
from hypothesis import strategies as st

from app.errors import BlobMissing, StorageCorrupt, StorageFull
from app.storage import Blob, Section, owner_storage
from app.storage.base import CHUNK_BYTES
from app.storage.sections import name_owner, name_owner_section
from tests.app.storage.conftest import OWNER, Store, files_in, put

DATA = bytes(range(256)) * 5000  # 1.28 MB: more than one chunk


def test_blob_is_kept_under_its_digest(section: Section) -> None:
    blob = put(section, DATA)
    assert blob == Blob(hashlib.sha256(DATA).hexdigest(), len(DATA))
    assert section.exists(blob.sha256)
    chunks = list(section.open(blob.sha256))
    assert b"".join(chunks) == DATA
    assert max(map(len, chunks)) <= CHUNK_BYTES


def test_empty_blob(section: Section) -> None:
    blob = put(section, b"")
    assert blob.size_bytes == 0
    assert list(section.open(blob.sha256)) == []
    assert list(section.read(blob.sha256, 0)) == []


def test_same_bytes_are_kept_once(store: Store, section: Section) -> None:
    assert put(section, DATA) == put(section, DATA)
    assert len(store.list_files()) == 1


def test_same_bytes_of_two_owners_are_two_blobs(store: Store) -> None:
    one, other = (owner_storage(store.storage, name) for name in ("one", "Other Owner"))
    blob = put(one, DATA)
    assert not other.exists(blob.sha256)
    put(other, DATA)
    one.delete(blob.sha256)
    assert b"".join(other.read(blob.sha256, blob.size_bytes)) == DATA


@given(owner=st.text(min_size=1, max_size=40))
def test_every_owner_has_a_section_that_names_it(owner: str) -> None:
    try:
        owner.encode()
    except UnicodeEncodeError:
        return
    assert name_owner(name_owner_section(owner)) == owner


@limits(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.integers(0, len(DATA) + 10), length=st.none() | st.integers(0, len(DATA) + 10))
def test_any_range_is_that_range(section: Section, start: int, length: int | None) -> None:
    blob = put(section, DATA)
    end = None if length is None else start + length
    assert b"".join(section.open(blob.sha256, start, end)) == DATA[start:end]


def test_nothing_is_visible_before_commit_or_after_abort(store: Store, section: Section) -> None:
    digest = hashlib.sha256(DATA).hexdigest()
    writer = section.writer()
    writer.write(DATA)
    assert not section.exists(digest)
    writer.abort()

    def disconnect() -> None:
        with section.writer() as other:
            other.write(DATA)
            raise RuntimeError("the client went away")

    with pytest.raises(RuntimeError):
        disconnect()
    assert store.list_files() == []


def test_abort_after_commit_keeps_the_blob(section: Section) -> None:
    with section.writer() as writer:
        writer.write(DATA)
        blob = writer.commit()
        writer.abort()
    assert section.exists(blob.sha256)


def test_missing_blob_is_known_before_the_first_chunk(section: Section, tmp_path: Path) -> None:
    for read in (section.open, lambda sha256: section.read(sha256, 1)):
        with pytest.raises(BlobMissing):
            read("0" * 64)
    with pytest.raises(BlobMissing):
        section.download("0" * 64, 1, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_download_is_verified_and_never_overwrites(section: Section, tmp_path: Path) -> None:
    blob = put(section, DATA)
    target = tmp_path / "copy"
    section.download(blob.sha256, blob.size_bytes, target)
    assert target.read_bytes() == DATA
    with pytest.raises(FileExistsError):
        section.download(blob.sha256, blob.size_bytes, target)
    assert target.read_bytes() == DATA


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-1], lambda data: data + b"x", lambda data: data[:700] + b"!" + data[701:], lambda _: b""],
    ids=["truncated", "extended", "flipped", "emptied"],
)
def test_rotten_blob_is_put_aside_and_heals_when_it_comes_again(
    store: Store, section: Section, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    blob = put(section, DATA)
    store.overwrite(OWNER, blob.sha256, damage(DATA))
    with pytest.raises(StorageCorrupt, match=blob.sha256):
        section.download(blob.sha256, blob.size_bytes, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()

    assert not section.exists(blob.sha256)
    with pytest.raises(StorageCorrupt, match="quarantine") as caught:
        section.open(blob.sha256)
    assert caught.value.code == "integrity"

    put(section, DATA)
    section.download(blob.sha256, blob.size_bytes, tmp_path / "copy")
    assert store.storage.remove_quarantined(3600) == 0
    assert store.storage.remove_quarantined(-1) == 1
    assert len(store.list_files()) == 1


def test_whole_blob_is_never_put_into_quarantine(section: Section) -> None:
    blob = put(section, DATA)
    assert not section.quarantine(blob.sha256)
    assert not section.quarantine("0" * 64)
    assert b"".join(section.read(blob.sha256, len(DATA))) == DATA


def test_last_bytes_come_only_when_all_were_right(store: Store, section: Section) -> None:
    blob = put(section, DATA)
    store.overwrite(OWNER, blob.sha256, b"!" + DATA[1:])
    chunks = section.read(blob.sha256, len(DATA))
    assert len(next(chunks)) < len(DATA)
    with pytest.raises(StorageCorrupt):
        list(chunks)


def test_file_is_stored_and_deleted(section: Section, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(DATA)
    blob = section.put_file(source)
    assert blob.size_bytes == len(DATA)
    section.delete(blob.sha256)
    assert not section.exists(blob.sha256)
    section.delete(blob.sha256)


def test_sections_and_their_blobs_are_listed(store: Store, section: Section) -> None:
    blobs = {put(section, bytes([number])) for number in range(5)}
    put(store.storage.section("checkpoints/job_a"), b"x")
    assert sorted(store.storage.sections()) == ["checkpoints/job_a", OWNER]
    listed = list(section.blobs())
    assert {Blob(blob.sha256, blob.size_bytes) for blob in listed} == blobs
    assert all(-5 < blob.age_seconds < 300 for blob in listed)
    assert section.find(listed[0].sha256) is not None
    assert section.find("0" * 64) is None


def test_cleared_section_takes_nothing_else_along(store: Store, section: Section) -> None:
    job = store.storage.section("checkpoints/job_a")
    put(section, b"kept")
    put(job, b"gone")
    job.clear()
    assert list(store.storage.sections()) == [OWNER]
    put(job, b"again")
    assert list(job.blobs())


def test_tidying_takes_no_blob(store: Store, section: Section) -> None:
    put(section, b"kept")
    section.tidy()
    assert len(store.list_files()) == 1


def test_name_that_is_no_digest_reaches_no_file(section: Section) -> None:
    for name in ("../../etc/passwd", "", "A" * 64):
        with pytest.raises(AssertionError, match="no SHA-256"):
            section.exists(name)


@pytest.mark.parametrize("name", ["", "owners", "owners/..", "owners/a/b", "/owners/a", "owners/A"])
def test_name_that_is_no_section_reaches_no_file(store: Store, name: str) -> None:
    with pytest.raises(AssertionError, match="no name of a section"):
        store.storage.section(name)


def test_download_to_a_full_disk_is_storage_full(small_disk: Path, section: Section) -> None:
    blob = put(section, DATA)
    with pytest.raises(StorageFull):
        section.download(blob.sha256, blob.size_bytes, small_disk / "copy")
    assert files_in(small_disk) == []
