"""Reading .parquet files from strangers: a table of numbers, lists of numbers and text, a few thousand rows at a time.

pyarrow does the parsing, inside the sandbox. What it would have to expand is bounded beforehand by what the footer
declares, text is read as numbers of a dictionary so that one long word repeated is no bomb, and every value is checked
again when it is there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from worker.engine.errors import DatasetRejected
from worker.engine.training.columns import (
    MAX_COLUMNS,
    Column,
    check_column_name,
    check_unpacked_size,
    checked_size,
    scratch_file,
    write_once,
)
from worker.engine.training.rows import Rows

MAX_FOOTER_BYTES = 16 * 1024**2
MAX_TEXT_BYTES = 1024**2
BATCH_BYTES = 4 * 1024**2
MAX_BATCH_ROWS = 16384
MAX_TEXTS = 512
"""Rows of text that are in memory together."""

_UNPACKED_FIX = "Write the file without compression and without a dictionary, or use .npz."
_TYPE_FIX = "Keep numbers, booleans, text, and lists of numbers of one length; drop or convert the column."


@dataclass(frozen=True)
class ParquetColumn(Column):
    """A column of a table."""

    position: int
    """Among the columns of the file."""

    def check(self, path: Path) -> None:
        """Decode every value."""
        for _ in self.read_texts(path) if self.dtype is None else self._read_numbers(path):
            pass

    def open_rows(self, path: Path, directory: Path) -> Rows:
        """Read the numbers from a file that is written once."""
        assert self.dtype is not None, f"column {self.name!r} is text"
        file = scratch_file(path, directory, "parquet", self.position)
        write_once(file, (values.tobytes() for values in self._read_numbers(path)))
        return Rows(file, self.dtype, tuple(int(size) for size in self.shape))

    def read_texts(self, path: Path) -> Iterator[list[str]]:
        """Yield the rows of a column of text, at most a few hundred and about a MiB at a time."""
        row, total = 0, 0
        for array in _read_batches(path, self.name, MAX_TEXTS, text=True):
            self._check_nulls(array, row)
            self._check_nulls(array.dictionary, row)
            places = array.indices.to_numpy(zero_copy_only=False)
            lengths = np.asarray(pc.binary_length(array.dictionary).to_numpy(zero_copy_only=False))[places]
            if len(lengths) and lengths.max() > MAX_TEXT_BYTES:
                at = int(np.argmax(lengths > MAX_TEXT_BYTES))
                raise DatasetRejected(
                    f"column {self.name!r}: the text in row {row + at} has {lengths[at]} bytes; at most "
                    f"{MAX_TEXT_BYTES} are accepted",
                    code="dataset_text_too_long",
                    fix="Split long texts into several rows.",
                )
            total += int(lengths.sum())
            check_unpacked_size(total, path.stat().st_size, _UNPACKED_FIX)
            for start, end in _pieces(lengths):
                try:
                    texts = array.dictionary.take(array.indices[start:end]).to_pylist()
                except UnicodeDecodeError:
                    # pyarrow checks texts only when they become Python's.
                    raise _corrupt(f"column {self.name!r} has a text that is not UTF-8") from None
                yield texts
            row += len(array)
        self._check_rows(row)

    def _read_numbers(self, path: Path) -> Iterator[np.ndarray]:
        assert self.dtype is not None
        row_bytes = prod(int(size) for size in self.shape[1:]) * self.dtype.itemsize
        row = 0
        for array in _read_batches(path, self.name, max(1, min(MAX_BATCH_ROWS, BATCH_BYTES // row_bytes))):
            yield np.ascontiguousarray(self._flatten(array, row).astype(self.dtype, copy=False))
            row += len(array)
        self._check_rows(row)

    def _flatten(self, array: Any, row: int) -> np.ndarray:
        num_rows, per_row = len(array), 1
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        self._check_nulls(array, row)
        for size in self.shape[1:]:
            lengths = pc.list_value_length(array).to_numpy(zero_copy_only=False)
            wrong = np.flatnonzero(lengths != size)
            if len(wrong):
                raise DatasetRejected(
                    f"column {self.name!r}: the list in row {row + int(wrong[0]) // per_row} has "
                    f"{lengths[wrong[0]]} values, the first row has {size}",
                    code="dataset_ragged",
                    fix="Pad or cut the lists to one length before uploading; text is best uploaded as text.",
                )
            array = array.flatten()
            per_row *= int(size)
            self._check_nulls(array, row, per_row)
        values: np.ndarray = array.to_numpy(zero_copy_only=False)
        return values.reshape(num_rows, *(int(size) for size in self.shape[1:]))

    def _check_nulls(self, array: Any, row: int, per_row: int = 1) -> None:
        if array.null_count:
            at = int(np.argmax(array.is_null().to_numpy(zero_copy_only=False))) // per_row
            raise DatasetRejected(
                f"column {self.name!r} has no value (null) in row {row + at}",
                code="dataset_null",
                fix="Fill or drop the rows without a value.",
            )

    def _check_rows(self, num_rows: int) -> None:
        if num_rows != self.num_rows:
            raise _corrupt(f"column {self.name!r} has {num_rows} rows where {self.num_rows} are declared")


def read_parquet(path: Path) -> list[ParquetColumn]:
    """Return the columns of a .parquet file, after checking its footer."""
    _check_ends(path)
    pa.set_memory_pool(pa.system_memory_pool())  # the others reserve more than a sandbox allows
    try:
        file = _open(path)
        schema, footer = file.schema_arrow, file.metadata
    except MemoryError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise _translate(error) from error
    if footer.num_columns > MAX_COLUMNS or len(schema) > MAX_COLUMNS:
        raise DatasetRejected(
            f"the file has {max(footer.num_columns, len(schema))} columns; at most {MAX_COLUMNS} are accepted",
            code="dataset_too_many_columns",
            fix="Put equal things into one column of lists.",
        )
    for name in schema.names:
        check_column_name(name)
    types = [_element(field.name, field.type) for field in schema]
    file_bytes = path.stat().st_size
    _check_footer(footer, file_bytes)
    columns = [
        _describe(path, position, field, dtype, footer.num_rows)
        for position, (field, dtype) in enumerate(zip(schema, types, strict=True))
    ]
    unpacked = [c.dtype.itemsize * prod(int(size) for size in c.shape) for c in columns if c.dtype is not None]
    check_unpacked_size(sum(unpacked), file_bytes, _UNPACKED_FIX)
    return columns


def _describe(path: Path, position: int, field: Any, dtype: np.dtype | None, num_rows: int) -> ParquetColumn:
    row: tuple[int, ...] = ()
    if _is_list(field.type) and num_rows:
        first = next(_read_batches(path, field.name, 1), None)
        if first is None or not len(first):
            raise _corrupt(f"column {field.name!r} has no rows where {num_rows} are declared")
        value = first[0].as_py()
        while isinstance(value, list):
            row += (len(value),)
            value = value[0] if value else None
    if dtype is None and num_rows == 0:
        raise DatasetRejected(f"column {field.name!r} is empty", code="dataset_empty")
    if dtype is not None:
        checked_size(field.name, dtype, (num_rows, *row))
    return ParquetColumn(field.name, dtype, (num_rows, *row), position)


def _element(name: str, kind: Any) -> np.dtype | None:
    """Return the numbers that a type is made of, None for text; refuse what is neither."""
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_string(inner) or pa.types.is_large_string(inner):
        return None
    while _is_list(inner):
        inner = inner.value_type
    if pa.types.is_boolean(inner) or pa.types.is_integer(inner) or pa.types.is_floating(inner):
        dtype: np.dtype = np.dtype(inner.to_pandas_dtype())
        return dtype
    what = "lists of text" if pa.types.is_string(inner) else f"{str(kind)[:200]}"
    raise DatasetRejected(
        f"column {name!r} holds {what}; accepted are integers, floating-point numbers, booleans, text, and lists of "
        "numbers that are equally long in every row",
        code="dataset_bad_dtype",
        fix=_TYPE_FIX
        if not (pa.types.is_struct(inner) or pa.types.is_binary(inner))
        else f"{_TYPE_FIX} Images are uploaded as a zip with one folder per class (format=images).",
    )


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _check_ends(path: Path) -> None:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        head = file.read(4)
        file.seek(max(0, size - 8))
        tail = file.read(8)
    if tail[4:] == b"PARE":
        raise _encrypted("the footer is encrypted")
    if size < 12 or head != b"PAR1" or tail[4:] != b"PAR1":
        raise DatasetRejected(
            "not a .parquet file: it does not begin and end with PAR1",
            code="dataset_not_parquet",
            fix="Write the table with pyarrow.parquet.write_table or pandas' to_parquet, and upload all of it.",
        )
    length = int.from_bytes(tail[:4], "little")
    if length > MAX_FOOTER_BYTES or length + 12 > size:
        raise DatasetRejected(
            f"not a .parquet file: a footer of {length} bytes in a file of {size}; at most {MAX_FOOTER_BYTES}",
            code="dataset_not_parquet",
        )


def _check_footer(footer: Any, file_bytes: int) -> None:
    # Not through the row groups' column(): pyarrow aborts the process where that entry is malformed. Reading does not.
    groups = [footer.row_group(index) for index in range(footer.num_row_groups)]
    num_rows = sum(group.num_rows for group in groups)
    if num_rows != footer.num_rows or any(group.num_rows < 0 or group.total_byte_size < 0 for group in groups):
        raise _corrupt(f"row groups of {num_rows} rows together where {footer.num_rows} are declared")
    check_unpacked_size(sum(group.total_byte_size for group in groups), file_bytes, _UNPACKED_FIX)


def _open(path: Path, text: list[str] | None = None) -> Any:
    # Buffered and not read ahead: a page is in memory, not a row group.
    return pq.ParquetFile(
        path,
        read_dictionary=text,
        pre_buffer=False,
        buffer_size=256 * 1024,
        thrift_string_size_limit=MAX_FOOTER_BYTES,
        thrift_container_size_limit=1_000_000,
        page_checksum_verification=True,
        arrow_extensions_enabled=False,
    )


def _read_batches(path: Path, name: str, batch_size: int, *, text: bool = False) -> Iterator[Any]:
    try:
        with _open(path, [name] if text else None) as file:
            for batch in file.iter_batches(batch_size, columns=[name], use_threads=False):
                # A column "a.b" may come along with "a".
                yield batch.column(batch.schema.get_field_index(name))
    except (MemoryError, DatasetRejected):
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise _translate(error) from error


def _pieces(lengths: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield runs of rows of bounded number and length."""
    start, size = 0, 0
    for index, length in enumerate(lengths.tolist()):
        if index > start and (size + length > MAX_TEXT_BYTES or index - start == MAX_TEXTS):
            yield start, index
            start, size = index, 0
        size += length
    if start < len(lengths):
        yield start, len(lengths)


def _translate(error: Exception) -> DatasetRejected:
    first = (str(error).splitlines() or [type(error).__name__])[0][:300]
    return _encrypted(first) if "decrypt" in first.lower() or "crypto" in first.lower() else _corrupt(first)


def _corrupt(what: str) -> DatasetRejected:
    return DatasetRejected(
        f"the .parquet file is damaged or of a kind that cannot be read: {what}",
        code="dataset_corrupt",
        fix="Write it again, for example with pyarrow.parquet.write_table, and upload it.",
    )


def _encrypted(what: str) -> DatasetRejected:
    return DatasetRejected(
        f"the .parquet file is encrypted: {what}", code="dataset_encrypted", fix="Write it without encryption."
    )
