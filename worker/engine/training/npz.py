"""Reading .npz files from strangers: a strict zip and .npy header parser that never unpickles and never trusts a size.

Only what numpy.savez and numpy.savez_compressed write is accepted. Nothing is unpacked here: the result says where in
the file each array's bytes lie.
"""

import re
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from worker.engine.errors import DatasetRejected
from worker.engine.training.columns import MAX_COLUMNS, check_column_name, check_unpacked_size, checked_size
from worker.engine.training.stored import Part, StoredColumn
from worker.engine.training.zip_directory import ZipKind, read_parts

MAX_NPY_HEADER_BYTES = 16 * 1024

TYPES = {
    "|b1": np.bool_, "|u1": np.uint8, "|i1": np.int8, "<u2": np.uint16, "<i2": np.int16, "<u4": np.uint32,
    "<i4": np.int32, "<u8": np.uint64, "<i8": np.int64, "<f2": np.float16, "<f4": np.float32, "<f8": np.float64,
}  # fmt: skip

_PAIR = r"'(?:descr|fortran_order|shape)' ?: ?(?:'[^'\\]{1,64}'|True|False|\((?:\d{1,18}, ?)*(?:\d{1,18})?\))"
_HEADER = re.compile(rf"\{{(?:{_PAIR}, ?){{2}}{_PAIR},? ?\}} *\n")
_DESCR = re.compile(r"'descr' ?: ?'([^'\\]{1,64})'")
_ORDER = re.compile(r"'fortran_order' ?: ?(True|False)")
_SHAPE = re.compile(r"'shape' ?: ?\(([^)]*)\)")
# A structured or otherwise exotic dtype is valid numpy, so it gets its own message.
_OTHER_DESCR = re.compile(r"'descr' ?: ?(\[.{0,200})")

NPZ = ZipKind(
    expected="an .npz file as numpy.savez writes it",
    code="dataset_not_npz",
    members="arrays",
    max_members=MAX_COLUMNS,
    max_directory_bytes=4 * 1024 * 1024,
    too_many_code="dataset_too_many_columns",
    too_many_fix="Put equal things into one array, one row per example.",
)


def read_npz(path: Path) -> list[StoredColumn]:
    """Return the columns of an .npz file, after checking its structure and every header."""
    with path.open("rb") as file:
        parts = read_parts(NPZ, file)
        check_unpacked_size(
            sum(part.size for part in parts),
            file.seek(0, 2),
            "Save the arrays with numpy.savez instead of numpy.savez_compressed.",
        )
        return [_read_column(file, part) for part in parts]


def _read_column(file: BinaryIO, part: Part) -> StoredColumn:
    if not part.name.endswith(".npy"):
        raise NPZ.bad(f"member {part.name!r} is not a .npy array")
    name = part.name.removesuffix(".npy")
    check_column_name(name)
    head = _head(file, part, name, 12 + MAX_NPY_HEADER_BYTES)
    if head[:6] != b"\x93NUMPY" or head[6:8] not in (b"\x01\x00", b"\x02\x00", b"\x03\x00"):
        raise DatasetRejected(f"column {name!r} does not begin with a .npy header", code="dataset_bad_header")
    wide = head[6] > 1
    (length,) = struct.unpack_from("<L" if wide else "<H", head.ljust(12, b"\0"), 8)
    start = 12 if wide else 10
    if length > MAX_NPY_HEADER_BYTES or start + length > len(head):
        raise DatasetRejected(
            f"column {name!r} has a .npy header of {length} bytes; at most {MAX_NPY_HEADER_BYTES} are accepted",
            code="dataset_bad_header",
        )
    dtype, fortran_order, shape = _parse_header(name, head[start : start + length])
    data_bytes = checked_size(name, dtype, shape)
    if start + length + data_bytes != part.size:
        raise DatasetRejected(
            f"column {name!r}: shape {shape} of {dtype} needs {data_bytes} bytes, "
            f"but the member holds {part.size - start - length}",
            code="dataset_bad_size",
        )
    return StoredColumn(name, dtype, shape, part, skip_bytes=start + length, fortran_order=fortran_order)


def _head(file: BinaryIO, part: Part, name: str, size: int) -> bytes:
    file.seek(part.offset)
    packed = file.read(min(part.packed_bytes, size))
    if not part.deflated:
        return packed
    try:
        return zlib.decompressobj(-15).decompress(packed, size)
    except zlib.error as error:
        raise DatasetRejected(f"column {name!r} is corrupt: {error}", code="dataset_corrupt") from error


def _parse_header(name: str, raw: bytes) -> tuple[np.dtype, bool, tuple[int, ...]]:
    text = raw.decode("latin-1")
    descr, order, shape = _DESCR.search(text), _ORDER.search(text), _SHAPE.search(text)
    other = _OTHER_DESCR.search(text)
    kind = descr.group(1) if descr else other.group(1) if other else None
    if kind is not None and kind not in TYPES:
        raise DatasetRejected(
            f"column {name!r} has dtype {kind!r}; accepted are {', '.join(TYPES)}",
            code="dataset_bad_dtype",
            fix="Convert the column to numbers (little-endian), for example with array.astype('float32').",
        )
    if not _HEADER.fullmatch(text) or not descr or not order or not shape:
        raise DatasetRejected(f"column {name!r} has a malformed .npy header: {text[:120]!r}", code="dataset_bad_header")
    sizes = tuple(int(size) for size in shape.group(1).replace(" ", "").split(",") if size)
    return np.dtype(TYPES[descr.group(1)]), order.group(1) == "True", sizes
