"""The directory of a .zip file from a stranger, read strictly: sizes and offsets are checked, nothing is unpacked."""

import struct
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

from worker.engine.errors import DatasetRejected
from worker.engine.training.stored import Part

STORED, DEFLATED = 0, 8
ENCRYPTED = 1
_DESCRIPTOR, _LONGEST_DESCRIPTOR = 8, 24
_FILE_TYPES = (0, 0o100000, 0o040000)
"""The upper bits of the external attributes: not said, a file, a folder. Others are links, devices and pipes."""


class _Span(NamedTuple):
    """Where a member lies, its own header included, and what may stand behind it."""

    begin: int
    end: int
    allowed: set[bytes]


@dataclass(frozen=True)
class ZipKind:
    """What a zip is expected to be, for its limits and messages."""

    expected: str
    """Completes "not ..."."""
    code: str
    """Of the errors in the structure."""
    members: str
    """What its members are called, in the plural."""
    max_members: int
    max_directory_bytes: int
    too_many_code: str
    too_many_fix: str

    def bad(self, what: str) -> DatasetRejected:
        """Return the error for a zip that is not as it should be."""
        return DatasetRejected(f"not {self.expected}: {what}", code=self.code)


def _take(kind: ZipKind, file: BinaryIO, offset: int, size: int) -> bytes:
    if offset < 0:
        raise kind.bad(f"an offset of {offset}")
    file.seek(offset)
    data = file.read(size)
    if len(data) != size:
        raise kind.bad(f"{size} bytes expected at offset {offset}, {len(data)} found")
    return data


def _read_directory(kind: ZipKind, file: BinaryIO, file_bytes: int) -> tuple[int, bytes, int]:
    """Return the number of entries, the raw central directory and its offset."""
    if file_bytes < 22:
        raise kind.bad(f"only {file_bytes} bytes")
    end = _take(kind, file, file_bytes - 22, 22)
    signature, disk, start_disk, here, count, size, offset, comment = struct.unpack("<4s4H2LH", end)
    if signature != b"PK\x05\x06" or comment:
        raise kind.bad("no end-of-directory record in the last 22 bytes")
    tail = file_bytes - 22
    if count == 0xFFFF or size == 0xFFFFFFFF or offset == 0xFFFFFFFF:
        tail -= 20
        locator, _, record_offset, _ = struct.unpack("<4sLQL", _take(kind, file, tail, 20))
        tail -= 56
        if locator != b"PK\x06\x07" or record_offset != tail:
            raise kind.bad("a broken zip64 end-of-directory record")
        record = struct.unpack("<4sQ2H2L4Q", _take(kind, file, tail, 56))
        if record[0] != b"PK\x06\x06":
            raise kind.bad("a broken zip64 end-of-directory record")
        disk, start_disk, here, count, size, offset = record[4:]
    if disk or start_disk or here != count:
        raise kind.bad("an archive in several parts")
    if offset + size != tail:
        raise kind.bad(f"a directory of {size} bytes at offset {offset} that does not end at {tail}")
    if size > kind.max_directory_bytes or count > kind.max_members:
        raise DatasetRejected(
            f"the archive lists {count} {kind.members} in {size} bytes; at most {kind.max_members} are accepted",
            code=kind.too_many_code,
            fix=kind.too_many_fix,
        )
    return count, _take(kind, file, offset, size), offset


def read_parts(kind: ZipKind, file: BinaryIO) -> list[Part]:
    """Return the members in the order of the directory; none overlaps another or lies outside the file."""
    file_bytes = file.seek(0, 2)
    count, directory, directory_offset = _read_directory(kind, file, file_bytes)
    parts: list[Part] = []
    spans: list[_Span] = []
    position = 0
    for _ in range(count):
        if position + 46 > len(directory) or directory[position : position + 4] != b"PK\x01\x02":
            raise kind.bad(f"a broken directory entry at byte {position}")
        fields = struct.unpack("<6H3L5H2L", directory[position + 4 : position + 46])
        flags, method, crc, packed, size, name_size, extra_size, comment_size = (*fields[2:4], *fields[6:12])
        attributes, local = fields[14:16]
        start = position + 46
        name_bytes = directory[start : start + name_size]
        extra = directory[start + name_size : start + name_size + extra_size]
        position = start + name_size + extra_size + comment_size
        if position > len(directory):
            raise kind.bad("a directory entry longer than the directory")
        size, packed, local = _widen(kind, extra, size, packed, local)
        if flags & ENCRYPTED or method not in (STORED, DEFLATED):
            raise kind.bad(f"member {name_bytes!r} uses method {method}, flags {flags:#x}; only stored and deflated")
        if (attributes >> 16) & 0o170000 not in _FILE_TYPES:
            raise kind.bad(f"member {name_bytes!r} is a link, a device or a pipe")
        header = struct.unpack("<4s5H3L2H", _take(kind, file, local, 30))
        offset = local + 30 + header[9] + header[10]
        if header[0] != b"PK\x03\x04" or _take(kind, file, local + 30, header[9]) != name_bytes:
            raise kind.bad(f"member {name_bytes!r} has another name in its own header")
        if offset + packed > directory_offset or (method == STORED and packed != size):
            raise kind.bad(f"member {name_bytes!r} of {packed} bytes at {offset} does not fit the file")
        spans.append(_Span(local, offset + packed, _descriptors(crc, packed, size) if flags & _DESCRIPTOR else {b""}))
        parts.append(Part(_decode_name(kind, name_bytes), offset, packed, size, method == DEFLATED, crc))
    if position != len(directory):
        raise kind.bad(f"{len(directory) - position} unexplained bytes in the directory")
    _check_spans(kind, file, spans, directory_offset)
    return parts


def _check_spans(kind: ZipKind, file: BinaryIO, spans: list[_Span], directory_offset: int) -> None:
    """Refuse bytes that belong to no member: another reader may see another file in them."""
    spans.sort()
    begins = [span.begin for span in spans] + [directory_offset]
    if begins[0] != 0:
        raise kind.bad(f"{begins[0]} bytes before the first member")
    for span, following in zip(spans, begins[1:], strict=True):
        if following < span.end:
            raise kind.bad(f"members that overlap at byte {following}")
        gap = following - span.end
        if gap > _LONGEST_DESCRIPTOR or _take(kind, file, span.end, gap) not in span.allowed:
            raise kind.bad(f"{gap} unexpected bytes behind a member, at byte {span.end}")


def _descriptors(crc: int, packed: int, size: int) -> set[bytes]:
    """Return what a writer that streams may leave behind a member."""
    found = {b""}
    for widths in ("<3L", "<LQQ"):
        if max(packed, size) < 2**32 or widths == "<LQQ":
            plain = struct.pack(widths, crc, packed, size)
            found |= {plain, b"PK\x07\x08" + plain}
    return found


def _widen(kind: ZipKind, extra: bytes, size: int, packed: int, local: int) -> tuple[int, int, int]:
    """Take 64-bit values from the zip64 extra field, for each 32-bit one that is all ones."""
    fields: dict[int, bytes] = {}
    position = 0
    while position + 4 <= len(extra):
        tag, length = struct.unpack_from("<2H", extra, position)
        fields[tag] = extra[position + 4 : position + 4 + length]
        position += 4 + length
    wide = fields.get(1, b"")
    values = list(struct.unpack(f"<{len(wide) // 8}Q", wide[: len(wide) // 8 * 8]))
    result = []
    for value in (size, packed, local):
        if value == 0xFFFFFFFF:
            if not values:
                raise kind.bad("a missing zip64 size")
            value = values.pop(0)
        result.append(value)
    return result[0], result[1], result[2]


def _decode_name(kind: ZipKind, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise kind.bad(f"member name {raw!r} is not UTF-8") from error
