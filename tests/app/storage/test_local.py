"""Blobs arrive whole or not at all, are kept once, and never come back as other bytes."""

import hashlib
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as limits
from hypothesis import strategies as st

from app.errors import BlobMissing, ConfigurationError, StorageCorrupt, StorageFull, Unavailable
from app.storage import Blob, Storage, open_storage
from app.storage.base import CHUNK_BYTES
from app.storage.local import LocalStorage

DATA = bytes(range(256)) * 5000  # 1.28 MB: more than one chunk


def put(storage: Storage, data: bytes) -> Blob:
    with storage.writer() as writer:
        writer.write(data)
        return writer.commit()


def files_in(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def storage(directory: Path) -> Storage:
    return LocalStorage(directory)


def test_blob_is_kept_under_its_digest(storage: Storage) -> None:
    blob = put(storage, DATA)
    assert blob == Blob(hashlib.sha256(DATA).hexdigest(), len(DATA))
    assert storage.exists(blob.sha256)
    chunks = list(storage.open(blob.sha256))
    assert b"".join(chunks) == DATA
    assert max(map(len, chunks)) <= CHUNK_BYTES


def test_empty_blob(storage: Storage) -> None:
    blob = put(storage, b"")
    assert blob.size_bytes == 0
    assert list(storage.open(blob.sha256)) == []


def test_same_bytes_are_kept_once(storage: Storage, directory: Path) -> None:
    assert put(storage, DATA) == put(storage, DATA)
    assert len(files_in(directory)) == 1


@limits(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.integers(0, len(DATA) + 10), length=st.none() | st.integers(0, len(DATA) + 10))
def test_any_range_is_that_range(storage: Storage, start: int, length: int | None) -> None:
    blob = put(storage, DATA)
    end = None if length is None else start + length
    assert b"".join(storage.open(blob.sha256, start, end)) == DATA[start:end]


def test_nothing_is_visible_before_commit_or_after_abort(storage: Storage, directory: Path) -> None:
    digest = hashlib.sha256(DATA).hexdigest()
    writer = storage.writer()
    writer.write(DATA)
    assert not storage.exists(digest)
    writer.abort()

    def disconnect() -> None:
        with storage.writer() as other:
            other.write(DATA)
            raise RuntimeError("the client went away")

    with pytest.raises(RuntimeError):
        disconnect()
    assert files_in(directory) == []


def test_abort_after_commit_keeps_the_blob(storage: Storage) -> None:
    with storage.writer() as writer:
        writer.write(DATA)
        blob = writer.commit()
        writer.abort()
    assert storage.exists(blob.sha256)


def test_missing_blob_is_known_before_the_first_chunk(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(BlobMissing):
        storage.open("0" * 64)
    with pytest.raises(BlobMissing):
        storage.download("0" * 64, 1, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_reader_that_stops_early_leaves_no_open_file(storage: Storage) -> None:
    blob = put(storage, DATA)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(3):
        next(iter(storage.open(blob.sha256)))
        storage.open(blob.sha256)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_download_is_verified_and_never_overwrites(storage: Storage, tmp_path: Path) -> None:
    blob = put(storage, DATA)
    target = tmp_path / "copy"
    storage.download(blob.sha256, blob.size_bytes, target)
    assert target.read_bytes() == DATA
    with pytest.raises(FileExistsError):
        storage.download(blob.sha256, blob.size_bytes, target)
    assert target.read_bytes() == DATA


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-1], lambda data: data + b"x", lambda data: data[:700] + b"!" + data[701:], lambda _: b""],
    ids=["truncated", "extended", "flipped", "emptied"],
)
def test_rotten_blob_is_not_handed_out_and_heals_when_it_comes_again(
    storage: Storage, directory: Path, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    blob = put(storage, DATA)
    (path,) = files_in(directory)
    path.write_bytes(damage(DATA))
    with pytest.raises(StorageCorrupt, match=blob.sha256):
        storage.download(blob.sha256, blob.size_bytes, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    put(storage, DATA)
    storage.download(blob.sha256, blob.size_bytes, tmp_path / "copy")


def test_file_is_stored_and_deleted(storage: Storage, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(DATA)
    blob = storage.put_file(source)
    assert blob.size_bytes == len(DATA)
    storage.delete(blob.sha256)
    assert not storage.exists(blob.sha256)
    storage.delete(blob.sha256)


def test_name_that_is_no_digest_reaches_no_file(storage: Storage) -> None:
    for name in ("../../etc/passwd", "", "A" * 64):
        with pytest.raises(AssertionError, match="no SHA-256"):
            storage.exists(name)


def test_only_what_dead_writers_left_is_removed(storage: Storage, directory: Path) -> None:
    blob = put(storage, DATA)
    dead, live = storage.writer(), storage.writer()
    dead.write(DATA)
    (abandoned,) = (path for path in (directory / "incoming").iterdir() if path.stat().st_size)
    os.utime(abandoned, (time.time() - 7200,) * 2)
    assert storage.remove_abandoned(3600) == 1
    live.write(b"still here")
    assert storage.exists(live.commit().sha256)
    assert storage.exists(blob.sha256)
    dead.abort()
    live.abort()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB."""
    mount = tmp_path / "small"
    mount.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", mount], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("mounting a small file system needs root")
    yield mount
    subprocess.run(["umount", mount], check=True)


def test_full_disk_is_storage_full_and_leaves_nothing(small_disk: Path) -> None:
    storage = LocalStorage(small_disk / "store")
    kept = put(storage, b"x" * 100_000)
    with pytest.raises(StorageFull):
        put(storage, b"y" * 500_000)
    assert len(files_in(small_disk)) == 1
    assert b"".join(storage.open(kept.sha256)) == b"x" * 100_000
    put(storage, b"z" * 100_000)
    (small_disk / "ballast").touch()
    with (small_disk / "ballast").open("wb", buffering=0) as ballast, suppress(OSError):
        while True:
            ballast.write(b"b" * 4096)
    with pytest.raises(StorageFull):
        storage.ping()


def test_download_to_a_full_disk_is_storage_full(small_disk: Path, storage: Storage) -> None:
    blob = put(storage, DATA)
    with pytest.raises(StorageFull):
        storage.download(blob.sha256, blob.size_bytes, small_disk / "copy")
    assert files_in(small_disk) == []


def test_file_size_limit_is_storage_full(storage: Storage, directory: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(StorageFull), storage.writer() as writer:
            writer.write(DATA)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert files_in(directory) == []


def test_place_that_cannot_hold_a_store_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Unavailable, match="storage does not work"):
        LocalStorage(tmp_path / "file" / "store")


WRITE_FOREVER = """
import sys
from pathlib import Path
from app.storage.local import LocalStorage
storage = LocalStorage(Path(sys.argv[1]))
number = 0
while True:
    with storage.writer() as writer:
        for _ in range(8):
            writer.write(number.to_bytes(8, "big") * 20_000)
        writer.commit()
    number += 1
    print(number, flush=True)
"""


def test_killed_writer_leaves_only_whole_blobs(directory: Path, storage: Storage) -> None:
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", WRITE_FOREVER, directory], stdout=subprocess.PIPE, cwd=Path(__file__).parents[3]
        ) as process:
            assert process.stdout is not None
            for _ in range(3):
                process.stdout.readline()
            process.send_signal(signal.SIGKILL)
    blobs = files_in(directory / "blobs")
    assert blobs
    for path in blobs:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    storage.remove_abandoned(-1)
    assert files_in(directory / "incoming") == []


def _put_all(directory: Path, barrier: Barrier) -> None:
    storage = LocalStorage(directory)
    barrier.wait(60)
    for number in range(30):
        put(storage, bytes([number]) * 1000)


def test_many_processes_store_the_same_bytes_at_once(directory: Path, storage: Storage) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    processes = [context.Process(target=_put_all, args=(directory, barrier)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(files_in(directory)) == 30
    for number in range(30):
        data = bytes([number]) * 1000
        assert b"".join(storage.open(hashlib.sha256(data).hexdigest())) == data


def test_bytes_are_flushed_to_disk_before_they_are_visible_and_names_after(directory: Path) -> None:
    """Every flush and rename of one commit, in order, as the operating system sees them."""
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from app.storage.local import LocalStorage\n"
        "storage = LocalStorage(Path(sys.argv[1]))\n"
        "calls = []\n"
        "def watch(event, arguments):\n"
        "    if event == 'os.rename': calls.append('rename')\n"
        "sys.addaudithook(watch)\n"
        "real = os.fsync\n"
        "def fsync(handle):\n"
        "    name = os.readlink(f'/proc/self/fd/{handle}')\n"
        "    calls.append('fsync ' + str(Path(name).relative_to(Path(sys.argv[1]).resolve()).parts[0]))\n"
        "    real(handle)\n"
        "os.fsync = fsync\n"
        "writer = storage.writer(); writer.write(b'x'); writer.commit()\n"
        "print(calls)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, directory],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[3],
    )
    assert done.stdout.strip() == "['fsync incoming', 'fsync blobs', 'rename', 'fsync blobs']"


def test_store_is_opened_by_its_url(tmp_path: Path) -> None:
    storage = open_storage((tmp_path / "with space %").as_uri())
    put(storage, b"x")
    assert len(files_in(tmp_path / "with space %")) == 1


@pytest.mark.parametrize("url", ["s4://bucket", "nonsense", "http://user:secret@host/x"])
def test_unknown_scheme_is_refused_with_the_known_ones(url: str) -> None:
    with pytest.raises(ConfigurationError, match="known: file") as caught:
        open_storage(url)
    assert "secret" not in caught.value.detail


@pytest.mark.parametrize("url", ["file://host/path", "file:relative"])
def test_path_that_is_not_absolute_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="absolute path"):
        open_storage(url)
