"""Reading the header of .safetensors files from strangers, more strictly than the library does."""

import struct
from pathlib import Path
from typing import Any

import numpy as np

from worker.engine.errors import DatasetRejected, ModelRejected
from worker.engine.programs.json_reader import mapping, parse_json
from worker.engine.programs.rejections import shown
from worker.engine.training.columns import MAX_COLUMNS, check_column_name, checked_size
from worker.engine.training.stored import Part, StoredColumn

MAX_HEADER_BYTES = 16 * 1024 * 1024
TYPES = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "U32": np.uint32,
    "I32": np.int32, "U64": np.uint64, "I64": np.int64, "F16": np.float16, "F32": np.float32, "F64": np.float64,
}  # fmt: skip


def read_safetensors(path: Path) -> list[StoredColumn]:
    """Return the columns of a .safetensors file; its arrays must fill the file without holes or overlaps."""
    with path.open("rb") as file:
        file_bytes = file.seek(0, 2)
        file.seek(0)
        prefix = file.read(8)
        if len(prefix) < 8:
            raise _bad_header(f"only {file_bytes} bytes")
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER_BYTES or 8 + length > file_bytes:
            raise _bad_header(f"a header of {length} bytes in a file of {file_bytes}; at most {MAX_HEADER_BYTES}")
        header = _parse(file.read(length))
    header.pop("__metadata__", None)
    if len(header) > MAX_COLUMNS:
        raise DatasetRejected(
            f"the file lists {len(header)} arrays; at most {MAX_COLUMNS} columns are accepted",
            code="dataset_too_many_columns",
            fix="Put equal things into one array, one row per example.",
        )
    columns = sorted((_column(name, entry, 8 + length) for name, entry in header.items()), key=_offset)
    position = 8 + length
    for column in columns:
        if column.part.offset != position:
            raise _bad_header(f"array {column.name!r} begins at byte {column.part.offset}, expected {position}")
        position += column.part.size
    if position != file_bytes:
        raise _bad_header(f"the arrays end at byte {position}, the file at {file_bytes}")
    return columns


def _offset(column: StoredColumn) -> int:
    return column.part.offset


def _bad_header(what: str) -> DatasetRejected:
    return DatasetRejected(f"not a well-formed .safetensors file: {what}", code="dataset_bad_header")


def _parse(raw: bytes) -> dict[str, Any]:
    try:
        return mapping(parse_json(raw, "the header"), "the header")
    except ModelRejected as error:
        # The same reader as for the headers of weights.
        raise _bad_header(error.detail) from None


def _column(name: str, entry: object, data_offset: int) -> StoredColumn:
    check_column_name(name)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _bad_header(f"array {name!r} needs exactly dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in TYPES:
        raise DatasetRejected(
            f"column {name!r} has dtype {shown(kind)}; accepted are {', '.join(TYPES)}",
            code="dataset_bad_dtype",
            fix="Convert the column, for example with array.astype('float32').",
        )
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise _bad_header(f"array {name!r} has a malformed shape or data_offsets")
    dtype = np.dtype(TYPES[kind])
    size = checked_size(name, dtype, tuple(shape))
    if offsets[1] - offsets[0] != size:
        raise DatasetRejected(
            f"column {name!r}: shape {shape} of {kind} needs {size} bytes, data_offsets give {offsets[1] - offsets[0]}",
            code="dataset_bad_size",
        )
    return StoredColumn(name, dtype, tuple(shape), Part(name, data_offset + offsets[0], size, size, False, None))


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)
