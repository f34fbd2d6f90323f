"""Rows of an array in a file, read when they are asked for.

Not a memory map: the limit of an engine's memory is one of its address space, in which a map counts as a whole, and a
dataset may be larger than that.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

BLOCK_BYTES = 16 * 1024**2
"""Of an array that is read from one end to the other."""


@dataclass(frozen=True)
class Rows:
    """An array whose bytes stand in a file in C order. Indexing with a slice or with row numbers reads a copy."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    """The first axis counts the rows."""
    offset: int = 0
    """Bytes of the file before the first row."""

    @property
    def ndim(self) -> int:
        """How many axes there are."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, chosen: "slice | NDArray[np.integer]") -> np.ndarray:
        numbers = np.arange(len(self))[chosen] if isinstance(chosen, slice) else np.asarray(chosen)
        assert not len(numbers) or (numbers.min() >= 0 and numbers.max() < len(self)), "rows are of this array"
        values = np.empty((len(numbers), *self.shape[1:]), self.dtype)
        row_bytes = prod(self.shape[1:]) * self.dtype.itemsize
        content = values.reshape(-1).view(np.uint8).data
        ends = np.append(np.flatnonzero(np.diff(numbers) != 1) + 1, len(numbers))
        with self.path.open("rb", buffering=0) as file:
            start = 0
            for end in ends.tolist() if len(numbers) else ():
                file.seek(self.offset + int(numbers[start]) * row_bytes)
                _fill(file, content[start * row_bytes : end * row_bytes])
                start = end
        return values

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield all rows in order, a few MiB of them at a time."""
        step = max(1, BLOCK_BYTES // (prod(self.shape[1:]) * self.dtype.itemsize))
        for start in range(0, len(self), step):
            yield self[start : start + step]


def reorder(path: Path, offset: int, dtype: np.dtype, shape: tuple[int, ...]) -> Iterator[bytes]:
    """Yield the bytes, in C order, of an array that stands in a file in Fortran order."""
    num_rows, num_columns = shape[0], prod(shape[1:])
    step = max(1, BLOCK_BYTES // (num_columns * dtype.itemsize))
    with path.open("rb", buffering=0) as file:
        for start in range(0, num_rows, step):
            block = np.empty((num_columns, min(step, num_rows - start)), dtype)
            for column, values in enumerate(block):
                file.seek(offset + (column * num_rows + start) * dtype.itemsize)
                _fill(file, values.view(np.uint8).data)
            yield block.reshape(*reversed(shape[1:]), -1).T.tobytes()


def _fill(file: FileIO, content: memoryview) -> None:
    while len(content):
        count = file.readinto(content)
        if not count:
            raise EOFError(f"{file.name} ends before its last row")
        content = content[count:]
