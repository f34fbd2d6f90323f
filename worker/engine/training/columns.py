"""A column of a dataset file: what it holds and how it is reached without loading it, whatever the file format."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from app.recipes.facts import ColumnFacts
from worker.engine.errors import DatasetRejected
from worker.engine.training.rows import Rows

CHUNK_BYTES = 1024 * 1024
MAX_COLUMNS = 1000
MAX_COLUMN_NAME = 200
MAX_AXES = 8
MAX_COLUMN_BYTES = 256 * 1024**3
# Deflate reaches 1032:1 on zeros; real data stays far below. Small files may be as regular as they like.
MAX_UNPACK_RATIO = 200
ALWAYS_UNPACKED_BYTES = 256 * 1024**2


@dataclass(frozen=True)
class Column(ABC):
    """One column of a dataset file, whatever the format. Nothing of it is in memory."""

    name: str
    dtype: np.dtype | None
    """None: text, which only a tokenizer can make into numbers."""
    shape: tuple[int | str, ...]
    """The first axis counts the rows. A word stands for a size that differs between the rows."""

    @property
    def num_rows(self) -> int:
        """How many rows there are."""
        assert isinstance(self.shape[0], int)
        return self.shape[0]

    @property
    def facts(self) -> ColumnFacts:
        """What the user sees of the column."""
        return ColumnFacts(
            name=self.name, dtype="string" if self.dtype is None else self.dtype.name, shape=self.shape[1:]
        )

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes that the numbers stand for, where the file has them."""
        return ()

    @abstractmethod
    def check(self, path: Path) -> None:
        """Read the column wholly, in bounded chunks; raises DatasetRejected."""

    @abstractmethod
    def open_rows(self, path: Path, directory: Path) -> Rows:
        """Return the rows of a column of numbers; what must be decoded is so once, into a file in `directory`."""

    def resized(self, size: tuple[int, int]) -> "Column | None":  # noqa: ARG002
        """Return the same images at [height, width]; None where the column holds no images."""
        return None

    def read_texts(self, path: Path) -> Iterator[list[str]]:  # noqa: ARG002
        """Yield the rows of a column of text, in bounded chunks."""
        raise AssertionError(f"column {self.name!r} holds no text")


def write_once(file: Path, chunks: Iterable[bytes]) -> None:
    """Write a file, unless it is there; a half-written one is never taken for whole."""
    if not file.exists():
        partial = file.with_suffix(".partial")
        with partial.open("wb") as target:
            for chunk in chunks:
                target.write(chunk)
        partial.rename(file)


def scratch_file(path: Path, directory: Path, *words: object) -> Path:
    """Return where a decoded column lies: named by the dataset's file and our own words, never by a stranger's."""
    return directory / ".".join((path.name, *map(str, words), "bin"))


def check_column_name(name: str) -> None:
    """Refuse names that could not be shown or used in a recipe."""
    if not 1 <= len(name) <= MAX_COLUMN_NAME or not name.isprintable() or "/" in name or "\\" in name:
        raise DatasetRejected(
            f"column name {name[:80]!r} is not 1 to {MAX_COLUMN_NAME} printable characters without slashes",
            code="dataset_bad_name",
        )


def checked_size(name: str, dtype: np.dtype, shape: tuple[int, ...]) -> int:
    """Return the bytes an array needs, refusing shapes that cannot be a column."""
    if not 1 <= len(shape) <= MAX_AXES:
        raise DatasetRejected(
            f"column {name!r} has shape {shape}; a column has 1 to {MAX_AXES} axes, the first counting the rows",
            code="dataset_bad_shape",
        )
    size = prod(shape) * dtype.itemsize
    if size == 0:
        raise DatasetRejected(f"column {name!r} with shape {shape} is empty", code="dataset_empty")
    if size > MAX_COLUMN_BYTES:
        raise DatasetRejected(
            f"column {name!r} with shape {shape} of {dtype} declares {size} bytes; at most {MAX_COLUMN_BYTES}",
            code="dataset_bad_size",
        )
    return size


def check_unpacked_size(unpacked: int, file_bytes: int, fix: str) -> None:
    """Refuse files that would grow out of proportion."""
    if unpacked > min(MAX_COLUMN_BYTES, max(ALWAYS_UNPACKED_BYTES, MAX_UNPACK_RATIO * file_bytes)):
        raise DatasetRejected(
            f"the file of {file_bytes} bytes holds {unpacked} bytes of data, more than {MAX_UNPACK_RATIO} "
            f"times its size and {ALWAYS_UNPACKED_BYTES} bytes",
            code="dataset_too_large_unpacked",
            fix=fix,
        )
