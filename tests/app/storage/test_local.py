"""A store on a disk: what the file system does, it does in the right order, also when it is killed, full or failing."""

import hashlib
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from app.errors import ConfigurationError, StorageFull, Unavailable
from app.storage import Section, open_storage
from app.storage.local import LocalStorage
from tests.app.storage.conftest import OWNER, files_in, put

DATA = bytes(range(256)) * 5000  # 1.28 MB: more than one chunk


def test_reader_that_stops_early_leaves_no_open_file(local_section: Section) -> None:
    blob = put(local_section, DATA)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(3):
        next(iter(local_section.open(blob.sha256)))
        local_section.open(blob.sha256)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_only_what_dead_writers_left_is_removed(local: LocalStorage, local_section: Section, directory: Path) -> None:
    blob = put(local_section, DATA)
    dead, live = local_section.writer(), local_section.writer()
    dead.write(DATA)
    (abandoned,) = (path for path in (directory / "incoming").iterdir() if path.stat().st_size)
    os.utime(abandoned, (time.time() - 7200,) * 2)
    assert local.remove_abandoned(3600) == 1
    live.write(b"still here")
    assert local_section.exists(live.commit().sha256)
    assert local_section.exists(blob.sha256)
    dead.abort()
    live.abort()


def test_directories_that_stay_empty_are_removed(local: LocalStorage, local_section: Section, directory: Path) -> None:
    blob = put(local_section, b"x")
    local_section.delete(blob.sha256)
    local_section.tidy()
    assert list(local.sections()) == [OWNER], "somebody may be about to use them"
    for _ in ("the shard", "then the section"):
        for path in (directory / "blobs").rglob("*"):
            os.utime(path, (time.time() - 7200,) * 2)
        local_section.tidy()
    assert list(local.sections()) == []
    put(local_section, b"x")


def test_full_disk_is_storage_full_and_leaves_nothing(small_disk: Path) -> None:
    storage = LocalStorage(small_disk / "store")
    section = storage.section(OWNER)
    kept = put(section, b"x" * 100_000)
    with pytest.raises(StorageFull):
        put(section, b"y" * 500_000)
    assert len(files_in(small_disk)) == 1
    assert b"".join(section.open(kept.sha256)) == b"x" * 100_000
    put(section, b"z" * 100_000)
    (small_disk / "ballast").touch()
    with (small_disk / "ballast").open("wb", buffering=0) as ballast, suppress(OSError):
        while True:
            ballast.write(b"b" * 4096)
    with pytest.raises(StorageFull):
        storage.ping()
    section.delete(kept.sha256)
    storage.ping()


def test_reserve_is_kept_free(small_disk: Path) -> None:
    storage = LocalStorage(small_disk / "store", reserve_bytes=150_000)
    section = storage.section(OWNER)
    kept = put(section, b"x" * 100_000)
    with pytest.raises(StorageFull, match="150000 are kept in reserve"):
        put(section, b"y" * 100_000)
    assert len(files_in(small_disk)) == 1
    assert shutil.disk_usage(small_disk).free > 150_000
    section.delete(kept.sha256)
    put(section, b"y" * 100_000)


def test_read_only_disk_is_unavailable_and_goes_on_reading(small_disk: Path) -> None:
    section = LocalStorage(small_disk / "store").section(OWNER)
    blob = put(section, b"x" * 1000)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    storage = LocalStorage(small_disk / "store")
    section = storage.section(OWNER)
    with pytest.raises(Unavailable, match="Read-only"):
        put(section, b"y")
    with pytest.raises(Unavailable):
        section.delete(blob.sha256)
    with pytest.raises(Unavailable):
        storage.ping()
    assert b"".join(section.read(blob.sha256, 1000)) == b"x" * 1000
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    put(section, b"y")


PUT_ONCE = """
import sys
from pathlib import Path
from app.errors import PareError
from app.storage.local import LocalStorage
section = LocalStorage(Path(sys.argv[1])).section("owners/local")
try:
    with section.writer() as writer:
        writer.write(b"bytes")
        writer.commit()
except PareError as error:
    print(error.code, error.detail)
"""


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_disk_that_does_not_take_the_bytes_is_not_asked_twice(directory: Path, tmp_path: Path, number: int) -> None:
    """A flush that failed may have dropped what it was to write; the next one would succeed and lie."""
    trace = tmp_path / "trace"
    strace = ["strace", "-f", "-o", str(trace), "-e", "trace=fsync", "-e", f"inject=fsync:error=EIO:when={number}"]
    command = [*strace, sys.executable, "-c", PUT_ONCE, str(directory)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3])
    except FileNotFoundError:
        pytest.skip("strace is not installed")
    if "ptrace" in done.stderr:
        pytest.skip("processes may not be traced here")
    assert done.stdout.strip() == "unavailable storage does not work (Input/output error)"
    flushed = [line for line in trace.read_text().splitlines() if "fsync(" in line]
    assert len(flushed) == number
    assert files_in(directory / "incoming") == []
    # Only the last flush is of the name itself: then the blob is there whole, and no row names it.
    assert len(files_in(directory / "blobs")) == (1 if number == 5 else 0)


def test_file_size_limit_is_storage_full(local_section: Section, directory: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(StorageFull), local_section.writer() as writer:
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
section = LocalStorage(Path(sys.argv[1])).section("owners/local")
number = 0
while True:
    with section.writer() as writer:
        for _ in range(8):
            writer.write(number.to_bytes(8, "big") * 20_000)
        writer.commit()
    number += 1
    print(number, flush=True)
"""


def test_killed_writer_leaves_only_whole_blobs(directory: Path, local: LocalStorage) -> None:
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
    local.remove_abandoned(-1)
    assert files_in(directory / "incoming") == []


def _put_all(directory: Path, barrier: Barrier) -> None:
    section = LocalStorage(directory).section(OWNER)
    barrier.wait(60)
    for number in range(30):
        put(section, bytes([number]) * 1000)


def test_many_processes_store_the_same_bytes_at_once(directory: Path, local_section: Section) -> None:
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
        assert b"".join(local_section.open(hashlib.sha256(data).hexdigest())) == data


def test_bytes_are_flushed_to_disk_before_they_are_visible_and_names_after(directory: Path) -> None:
    """Every flush and rename of one commit, in order, as the operating system sees them."""
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from app.storage.local import LocalStorage\n"
        "storage = LocalStorage(Path(sys.argv[1])).section('owners/local')\n"
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
    assert (
        done.stdout.strip()
        == "['fsync incoming', 'fsync blobs', 'fsync blobs', 'fsync blobs', 'rename', 'fsync blobs']"
    )


def test_store_is_opened_by_its_url(tmp_path: Path) -> None:
    storage = open_storage((tmp_path / "with space %").as_uri())
    put(storage.section(OWNER), b"x")
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
