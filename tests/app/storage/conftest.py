"""Stores for the tests: the same tests run against every kind."""

import os
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import obstore
import pytest

from app.storage import Blob, Section, Storage, open_storage
from app.storage.local import LocalStorage
from app.storage.objects import ObjectStorage

OWNER = "owners/local"


def put(section: Section, data: bytes) -> Blob:
    with section.writer() as writer:
        writer.write(data)
        return writer.commit()


def files_in(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


class Store(ABC):
    """A store, and what only its keeper can do to it."""

    storage: Storage

    @abstractmethod
    def list_files(self) -> list[str]:
        """Return the names of everything that takes space."""

    @abstractmethod
    def overwrite(self, section: str, sha256: str, data: bytes) -> None:
        """Let a blob rot."""


class LocalStore(Store):
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.storage = LocalStorage(directory)

    def list_files(self) -> list[str]:
        return sorted(str(path.relative_to(self.directory)) for path in files_in(self.directory))

    def overwrite(self, section: str, sha256: str, data: bytes) -> None:
        (self.directory / "blobs" / section / sha256[:2] / sha256).write_bytes(data)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "store"


class ObjectStore(Store):
    def __init__(self, url: str) -> None:
        storage = open_storage(url)
        assert isinstance(storage, ObjectStorage)
        self.storage, self._store = storage, storage.store

    def list_files(self) -> list[str]:
        return sorted(each["path"] for batch in obstore.list(self._store) for each in batch)

    def overwrite(self, section: str, sha256: str, data: bytes) -> None:
        obstore.put(self._store, f"blobs/{section}/{sha256}", data)


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, directory: Path) -> Store:
    """A store of each kind in turn."""
    if request.param == "local":
        return LocalStore(directory)
    return ObjectStore(request.getfixturevalue("s3_url"))


@pytest.fixture
def section(store: Store) -> Section:
    """The files of one owner, in a store of each kind in turn."""
    return store.storage.section(OWNER)


@pytest.fixture
def local(directory: Path) -> LocalStorage:
    return LocalStorage(directory)


@pytest.fixture
def local_section(local: LocalStorage) -> Section:
    return local.section(OWNER)


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
