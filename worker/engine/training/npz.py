"""Reading .npz files from strangers: a strict zip and .npy header parser that never unpickles and never trusts a size.

Only what numpy.savez and numpy.savez_compressed write is accepted. Nothing is unpacked here: the result says where in
the file each array's bytes lie.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from worker.engine.errors import DatasetRejected
from worker.engine.training.columns import CHUNK_BYTES, MAX_COLUMNS, Column, check_column_name, checked_size

MAX_DIRECTORY_BYTES = 4 * 1024 * 1024
MAX_NPY_HEADER_BYTES = 16 * 1024
MAX_UNPACKED_BYTES = 256 * 1024**3
# Deflate reaches 1032:1 on zeros; real data stays far below. Small files may be as regular as they like.
MAX_UNPACK_RATIO = 200
ALWAYS_UNPACKED_BYTES = 256 * 1024**2

STORED, DEFLATED = 0, 8
ENCRYPTED = 1
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


class Member(NamedTuple):
    """One entry of the zip's central directory, with where its bytes begin."""

    name: str
    method: int
    crc: int
    packed_bytes: int
    size: int
    offset: int


def read_npz(path: Path) -> list[Column]:
    """Return the columns of an .npz file, after checking its structure and every header."""
    with path.open("rb") as file:
        file_bytes = file.seek(0, 2)
        members = _read_members(file, file_bytes)
        unpacked = sum(member.size for member in members)
        if unpacked > min(MAX_UNPACKED_BYTES, max(ALWAYS_UNPACKED_BYTES, MAX_UNPACK_RATIO * file_bytes)):
            raise DatasetRejected(
                f"the archive of {file_bytes} bytes declares {unpacked} bytes of arrays, more than {MAX_UNPACK_RATIO} "
                f"times its size and {ALWAYS_UNPACKED_BYTES} bytes",
                code="dataset_too_large_unpacked",
                fix="Save the arrays with numpy.savez instead of numpy.savez_compressed.",
            )
        return [_read_column(file, member) for member in members]


def unpack(file: BinaryIO, column: Column) -> Iterator[bytes]:
    """Yield the whole member a column came from, in bounded chunks, checking its size and checksum at the end."""
    file.seek(column.member_offset)
    decoder = zlib.decompressobj(-15) if column.deflated else None
    left, produced, crc = column.packed_bytes, 0, 0
    while left:
        packed = file.read(min(CHUNK_BYTES, left))
        if not packed:
            break
        left -= len(packed)
        while packed:
            try:
                chunk = decoder.decompress(packed, CHUNK_BYTES) if decoder else packed
            except zlib.error as error:
                raise _corrupt(column, f"{error}") from error
            packed = decoder.unconsumed_tail if decoder else b""
            produced += len(chunk)
            if produced > column.member_bytes:
                raise _corrupt(column, f"more than the declared {column.member_bytes} bytes")
            crc = zlib.crc32(chunk, crc)
            yield chunk
    if decoder:
        tail = decoder.flush()
        produced += len(tail)
        crc = zlib.crc32(tail, crc)
        yield tail
        if not decoder.eof or decoder.unused_data:
            raise _corrupt(column, "the deflate stream does not end where the member ends")
    if produced != column.member_bytes:
        raise _corrupt(column, f"{produced} bytes where {column.member_bytes} are declared")
    if crc != column.crc:
        raise _corrupt(column, f"checksum {crc:08x}, declared {column.crc:08x}")


def _corrupt(column: Column, what: str) -> DatasetRejected:
    return DatasetRejected(f"column {column.name!r} is corrupt: {what}", code="dataset_corrupt", fix="Upload it again.")


def _bad_zip(what: str) -> DatasetRejected:
    return DatasetRejected(f"not an .npz file as numpy.savez writes it: {what}", code="dataset_not_npz")


def _take(file: BinaryIO, offset: int, size: int) -> bytes:
    if offset < 0:
        raise _bad_zip(f"an offset of {offset}")
    file.seek(offset)
    data = file.read(size)
    if len(data) != size:
        raise _bad_zip(f"{size} bytes expected at offset {offset}, {len(data)} found")
    return data


def _read_directory(file: BinaryIO, file_bytes: int) -> tuple[int, bytes, int]:
    """Return the number of entries, the raw central directory and its offset."""
    if file_bytes < 22:
        raise _bad_zip(f"only {file_bytes} bytes")
    end = _take(file, file_bytes - 22, 22)
    signature, disk, start_disk, here, count, size, offset, comment = struct.unpack("<4s4H2LH", end)
    if signature != b"PK\x05\x06" or comment:
        raise _bad_zip("no end-of-directory record in the last 22 bytes")
    tail = file_bytes - 22
    if count == 0xFFFF or size == 0xFFFFFFFF or offset == 0xFFFFFFFF:
        tail -= 20
        locator, _, record_offset, _ = struct.unpack("<4sLQL", _take(file, tail, 20))
        tail -= 56
        if locator != b"PK\x06\x07" or record_offset != tail:
            raise _bad_zip("a broken zip64 end-of-directory record")
        record = struct.unpack("<4sQ2H2L4Q", _take(file, tail, 56))
        if record[0] != b"PK\x06\x06":
            raise _bad_zip("a broken zip64 end-of-directory record")
        disk, start_disk, here, count, size, offset = record[4:]
    if disk or start_disk or here != count:
        raise _bad_zip("an archive in several parts")
    if offset + size != tail:
        raise _bad_zip(f"a directory of {size} bytes at offset {offset} that does not end at {tail}")
    if size > MAX_DIRECTORY_BYTES or count > MAX_COLUMNS:
        raise DatasetRejected(
            f"the archive lists {count} arrays in {size} bytes; at most {MAX_COLUMNS} columns are accepted",
            code="dataset_too_many_columns",
            fix="Put equal things into one array, one row per example.",
        )
    return count, _take(file, offset, size), offset


def _read_members(file: BinaryIO, file_bytes: int) -> list[Member]:
    count, directory, directory_offset = _read_directory(file, file_bytes)
    members: list[Member] = []
    spans: list[tuple[int, int]] = []
    position = 0
    for _ in range(count):
        if position + 46 > len(directory) or directory[position : position + 4] != b"PK\x01\x02":
            raise _bad_zip(f"a broken directory entry at byte {position}")
        fields = struct.unpack("<6H3L5H2L", directory[position + 4 : position + 46])
        flags, method, crc, packed, size, name_size, extra_size, comment_size = (*fields[2:4], *fields[6:12])
        local = fields[15]
        start = position + 46
        name_bytes = directory[start : start + name_size]
        extra = directory[start + name_size : start + name_size + extra_size]
        position = start + name_size + extra_size + comment_size
        if position > len(directory):
            raise _bad_zip("a directory entry longer than the directory")
        size, packed, local = _widen(extra, size, packed, local)
        if flags & ENCRYPTED or method not in (STORED, DEFLATED):
            raise _bad_zip(f"member {name_bytes!r} uses method {method}, flags {flags:#x}; only stored and deflated")
        header = struct.unpack("<4s5H3L2H", _take(file, local, 30))
        offset = local + 30 + header[9] + header[10]
        if header[0] != b"PK\x03\x04" or _take(file, local + 30, header[9]) != name_bytes:
            raise _bad_zip(f"member {name_bytes!r} has another name in its own header")
        if offset + packed > directory_offset or (method == STORED and packed != size):
            raise _bad_zip(f"member {name_bytes!r} of {packed} bytes at {offset} does not fit the file")
        spans.append((local, offset + packed))
        members.append(Member(_decode_name(name_bytes), method, crc, packed, size, offset))
    if position != len(directory):
        raise _bad_zip(f"{len(directory) - position} unexplained bytes in the directory")
    spans.sort()
    for (_, end), (begin, _) in pairwise(spans):
        if begin < end:
            raise _bad_zip(f"members that overlap at byte {begin}")
    return members


def _widen(extra: bytes, size: int, packed: int, local: int) -> tuple[int, int, int]:
    """Take 64-bit values from the zip64 extra field, for each 32-bit one that is all ones."""
    fields: dict[int, bytes] = {}
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        fields[kind] = extra[position + 4 : position + 4 + length]
        position += 4 + length
    wide = fields.get(1, b"")
    values = list(struct.unpack(f"<{len(wide) // 8}Q", wide[: len(wide) // 8 * 8]))
    result = []
    for value in (size, packed, local):
        if value == 0xFFFFFFFF:
            if not values:
                raise _bad_zip("a missing zip64 size")
            value = values.pop(0)
        result.append(value)
    return result[0], result[1], result[2]


def _decode_name(raw: bytes) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _bad_zip(f"member name {raw!r} is not UTF-8") from error
    if not name.endswith(".npy"):
        raise _bad_zip(f"member {name!r} is not a .npy array")
    return name.removesuffix(".npy")


def _read_column(file: BinaryIO, member: Member) -> Column:
    check_column_name(member.name)
    head = _member_head(file, member, 12 + MAX_NPY_HEADER_BYTES)
    if head[:6] != b"\x93NUMPY" or head[6:8] not in (b"\x01\x00", b"\x02\x00", b"\x03\x00"):
        raise DatasetRejected(f"column {member.name!r} does not begin with a .npy header", code="dataset_bad_header")
    wide = head[6] > 1
    (length,) = struct.unpack_from("<L" if wide else "<H", head.ljust(12, b"\0"), 8)
    start = 12 if wide else 10
    if length > MAX_NPY_HEADER_BYTES or start + length > len(head):
        raise DatasetRejected(
            f"column {member.name!r} has a .npy header of {length} bytes; at most {MAX_NPY_HEADER_BYTES} are accepted",
            code="dataset_bad_header",
        )
    dtype, fortran_order, shape = _parse_header(member.name, head[start : start + length])
    data_bytes = checked_size(member.name, dtype, shape)
    if start + length + data_bytes != member.size:
        raise DatasetRejected(
            f"column {member.name!r}: shape {shape} of {dtype} needs {data_bytes} bytes, "
            f"but the member holds {member.size - start - length}",
            code="dataset_bad_size",
        )
    return Column(
        name=member.name, dtype=dtype, shape=shape, fortran_order=fortran_order, deflated=member.method == DEFLATED,
        member_offset=member.offset, skip_bytes=start + length, packed_bytes=member.packed_bytes,
        member_bytes=member.size, crc=member.crc,
    )  # fmt: skip


def _member_head(file: BinaryIO, member: Member, size: int) -> bytes:
    file.seek(member.offset)
    packed = file.read(min(member.packed_bytes, size))
    if member.method == STORED:
        return packed
    try:
        return zlib.decompressobj(-15).decompress(packed, size)
    except zlib.error as error:
        raise DatasetRejected(f"column {member.name!r} is corrupt: {error}", code="dataset_corrupt") from error


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
