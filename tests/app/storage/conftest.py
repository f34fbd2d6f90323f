"""Stores for the tests: the same tests run against every kind."""

import os
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.storage import Blob, Section, Storage
from app.storage.local import LocalStorage

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


@pytest.fixture(params=["local"])
def store(request: pytest.FixtureRequest, directory: Path) -> Store:
    assert request.param == "local"
    return LocalStore(directory)


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
