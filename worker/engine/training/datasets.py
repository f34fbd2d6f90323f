"""Checking uploaded datasets and opening their columns without loading them."""

from collections.abc import Sequence
from pathlib import Path

from app.recipes.facts import DatasetFacts
from app.recipes.plan import DatasetFormat
from worker.engine.errors import DatasetRejected
from worker.engine.training.columns import Column
from worker.engine.training.npz import read_npz
from worker.engine.training.tensor_file import read_safetensors


def check_dataset(path: Path, format: DatasetFormat) -> DatasetFacts:
    """Check a dataset file wholly, checksums included, and return what it holds."""
    columns = read_columns(path, format)
    for column in columns:
        column.check(path)
    classes = next((column.classes for column in columns if column.classes), ())
    return DatasetFacts(
        num_rows=columns[0].num_rows, columns=tuple(column.facts for column in columns), classes=classes
    )


def read_columns(path: Path, format: DatasetFormat) -> Sequence[Column]:
    """Return the columns of a dataset file: at least one, with unique names and equally many rows."""
    columns = _read(path, format)
    if not columns:
        raise DatasetRejected("the file holds no arrays", code="dataset_empty")
    names = [column.name for column in columns]
    for name in names:
        if names.count(name) > 1:
            raise DatasetRejected(f"column {name!r} appears twice", code="dataset_duplicate_column")
    rows = {column.name: column.num_rows for column in columns}
    if len(set(rows.values())) > 1:
        raise DatasetRejected(
            f"the columns have different numbers of rows: {rows}",
            code="dataset_unequal_rows",
            fix="Save arrays whose first axis has the same length, one row per example.",
        )
    return columns


def _read(path: Path, format: DatasetFormat) -> Sequence[Column]:
    # Each of the last two brings a library that the others do without.
    if format == "parquet":
        from worker.engine.training.parquet import read_parquet

        return read_parquet(path)
    if format == "images":
        from worker.engine.training.images import read_images

        return read_images(path)
    return read_npz(path) if format == "npz" else read_safetensors(path)
