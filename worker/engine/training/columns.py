"""A column of a dataset file: what it holds and where its bytes lie, whatever the file format."""

from dataclasses import dataclass
from math import prod

import numpy as np

from worker.engine.errors import DatasetRejected

CHUNK_BYTES = 1024 * 1024
MAX_COLUMNS = 1000
MAX_COLUMN_NAME = 200
MAX_AXES = 8
MAX_COLUMN_BYTES = 256 * 1024**3


@dataclass(frozen=True)
class Column:
    """One array in a dataset file. Its first axis counts the rows."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    fortran_order: bool
    deflated: bool
    """The bytes are compressed and must be unpacked before they can be mapped."""
    member_offset: int
    """Where the array's part of the file begins."""
    skip_bytes: int
    """Header bytes before the numbers, after unpacking."""
    packed_bytes: int
    member_bytes: int
    crc: int | None
    """CRC-32 of the unpacked part, where the format has one."""


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
