"""Which files may be sent unseen: those that were read whole and found right, as they are now, for a while."""

import os
import time
from pathlib import Path

import pytest

from app.errors import StorageCorrupt
from app.storage import Section
from app.storage.verified import KEEP_SECONDS, MAX_FILES, Stamp, VerifiedFiles
from tests.app.storage.conftest import OWNER, LocalStore, Store, put

DATA = bytes(range(256)) * 10_000  # three chunks
TICK_SECONDS = 0.02
"""More than the kernel's clock for the times of files needs for its next step."""


def test_a_file_is_found_by_who_reads_it_to_its_end(local_section: Section) -> None:
    blob = put(local_section, DATA)
    path = f"{OWNER}/{blob.sha256[:2]}/{blob.sha256}"
    assert local_section.locate(blob.sha256, blob.size_bytes, verified=False) == path
    chunks = local_section.read(blob.sha256, blob.size_bytes)
    for _ in range(2):
        next(chunks)
        assert local_section.locate(blob.sha256, blob.size_bytes, verified=True) is None
    next(chunks)  # the last one
    assert local_section.locate(blob.sha256, blob.size_bytes, verified=True) == path
    assert local_section.locate(blob.sha256, blob.size_bytes - 1, verified=False) is None
    local_section.delete(blob.sha256)
    assert local_section.locate(blob.sha256, blob.size_bytes, verified=False) is None


def test_the_same_bytes_stored_again_are_another_file(local_section: Section) -> None:
    blob = put(local_section, DATA)
    list(local_section.read(blob.sha256, blob.size_bytes))
    put(local_section, DATA)
    assert local_section.locate(blob.sha256, blob.size_bytes, verified=True) is None


def test_a_file_that_changes_while_it_is_read_is_not_remembered(local_section: Section, directory: Path) -> None:
    blob = put(local_section, DATA)
    place = directory / "blobs" / OWNER / blob.sha256[:2] / blob.sha256
    chunks = local_section.read(blob.sha256, blob.size_bytes)
    next(chunks)
    time.sleep(TICK_SECONDS)
    with place.open("r+b") as file:
        file.write(b"x")
    assert sum(1 for _ in chunks) == 2, "what was read of it was right"
    assert local_section.locate(blob.sha256, blob.size_bytes, verified=True) is None


def test_a_rotten_file_is_not_remembered_even_when_its_time_is_set_back(
    local_section: Section, directory: Path
) -> None:
    blob = put(local_section, DATA)
    place = directory / "blobs" / OWNER / blob.sha256[:2] / blob.sha256
    list(local_section.read(blob.sha256, blob.size_bytes))
    before = place.stat()
    time.sleep(TICK_SECONDS)
    place.write_bytes(DATA[::-1])
    os.utime(place, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert local_section.locate(blob.sha256, blob.size_bytes, verified=True) is None
    with pytest.raises(StorageCorrupt):
        list(local_section.read(blob.sha256, blob.size_bytes))
    assert local_section.locate(blob.sha256, blob.size_bytes, verified=False) is None, "it is in quarantine"


def test_a_bucket_has_no_files(store: Store, section: Section) -> None:
    blob = put(section, DATA)
    found = section.locate(blob.sha256, blob.size_bytes, verified=False)
    assert (found is not None) == isinstance(store, LocalStore)


def test_memory_is_bounded_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("app.storage.verified.time.monotonic", lambda: now)
    files, stamp = VerifiedFiles(), Stamp(1, 2, 3, 4, 5)
    for number in range(MAX_FILES + 1):
        files.note(Path(str(number)), stamp, now)
    assert [files.holds(Path(name), stamp) for name in ("0", "1", str(MAX_FILES))] == [False, True, True]
    assert not files.holds(Path("1"), Stamp(1, 2, 3, 4, 6))
    now += KEEP_SECONDS
    assert not files.holds(Path("1"), stamp)
