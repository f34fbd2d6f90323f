"""Checking uploaded datasets and opening their columns without loading them."""

from pathlib import Path
from typing import Literal

import numpy as np

from app.recipes.facts import ColumnFacts, DatasetFacts
from app.recipes.plan import DatasetFormat
from worker.engine.errors import DatasetRejected
from worker.engine.training.columns import Column
from worker.engine.training.npz import read_npz, unpack
from worker.engine.training.tensor_file import read_safetensors

READERS = {"npz": read_npz, "safetensors": read_safetensors}


def check_dataset(path: Path, format: DatasetFormat) -> DatasetFacts:
    """Check a dataset file wholly, checksums included, and return what it holds."""
    columns = read_columns(path, format)
    with path.open("rb") as file:
        for column in columns:
            if column.crc is not None:
                for _ in unpack(file, column):
                    pass
    return DatasetFacts(
        num_rows=columns[0].shape[0],
        columns=tuple(ColumnFacts(name=c.name, dtype=c.dtype.name, shape=c.shape[1:]) for c in columns),
    )


def read_columns(path: Path, format: DatasetFormat) -> list[Column]:
    """Return the columns of a dataset file: at least one, with unique names and equally many rows."""
    columns = READERS[format](path)
    if not columns:
        raise DatasetRejected("the file holds no arrays", code="dataset_empty")
    names = [column.name for column in columns]
    for name in names:
        if names.count(name) > 1:
            raise DatasetRejected(f"column {name!r} appears twice", code="dataset_duplicate_column")
    rows = {column.name: column.shape[0] for column in columns}
    if len(set(rows.values())) > 1:
        raise DatasetRejected(
            f"the columns have different numbers of rows: {rows}",
            code="dataset_unequal_rows",
            fix="Save arrays whose first axis has the same length, one row per example.",
        )
    return columns


def map_column(path: Path, column: Column, directory: Path) -> np.ndarray:
    """Return a read-only memory map of a column; compressed ones are first unpacked once into `directory`."""
    offset = column.member_offset + column.skip_bytes
    if column.deflated:
        # Named by position, not by the stranger's text.
        unpacked = directory / f"{path.name}.{column.member_offset}.bin"
        if not unpacked.exists():
            partial = unpacked.with_suffix(".partial")
            with path.open("rb") as source, partial.open("wb") as target:
                for chunk in unpack(source, column):
                    target.write(chunk)
            partial.rename(unpacked)
        path, offset = unpacked, column.skip_bytes
    order: Literal["F", "C"] = "F" if column.fortran_order else "C"
    return np.memmap(path, dtype=column.dtype, mode="r", offset=offset, shape=column.shape, order=order)
