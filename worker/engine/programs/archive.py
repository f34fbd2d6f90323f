"""Strict reading of a ZIP archive: members that tile the file without gaps, so that every reader sees the same.

A byte that is neither a header nor a member's data, a second directory, a comment or a link is refused, and so is a
compressed member unless the caller asked for `deflated`.
"""

import mmap
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from worker.engine.programs.rejections import reject, shown

MAX_MEMBERS = 100_000
_NAME = re.compile(r"[A-Za-z0-9_.\-/]{1,240}")
_LOCAL, _CENTRAL, _END = struct.Struct("<4s5H3I2H"), struct.Struct("<4s6H3I5H2I"), struct.Struct("<4s4H2IH")
_END64, _LOCATOR = struct.Struct("<4sQ2H2I4Q"), struct.Struct("<4sIQI")
_DESCRIPTOR, _UTF8 = 1 << 3, 1 << 11
_MAX32 = 0xFFFFFFFF
_STORED, _DEFLATED = 0, 8
_DEFLATE_OPTIONS = 0b110
"""Flags in which a writer notes how hard it tried."""
_MAX_RATIO, _SMALL_BYTES = 50, 2**20
_CHUNK = 2**20


@dataclass(frozen=True)
class Member:
    """One file: `packed_bytes` bytes at `offset` of the archive, deflated from `size_bytes` or the same."""

    name: str
    offset: int
    size_bytes: int
    packed_bytes: int
    crc: int

    deflated: bool


@dataclass(frozen=True)
class _Entry:
    name: str
    flags: int
    method: int
    crc: int
    size: int
    packed: int
    header_offset: int


class Archive:
    """The members of one file, mapped into memory. Compressed ones are taken only with `deflated`."""

    def __init__(self, path: Path, *, deflated: bool = False) -> None:
        self._file = path.open("rb")
        try:
            self.size_bytes = path.stat().st_size
            if self.size_bytes < _END.size:
                reject("not_a_model", f"The file has {self.size_bytes} bytes; it is not an archive.")
            # A private mapping: tensors made from it are writable, the file never changes.
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
            entries, directory_offset = _read_directory(self._map, (_STORED, _DEFLATED) if deflated else (_STORED,))
            self.members = _locate(self._map, entries, directory_offset)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Archive":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The mapping itself is freed with the last view of it.
        self._file.close()

    def view(self, name: str) -> memoryview:
        """Return the bytes of a stored member, without a copy."""
        member = self.members[name]
        assert not member.deflated, f"{name} must be inflated"
        return memoryview(self._map)[member.offset : member.offset + member.size_bytes]

    def read(self, name: str, max_bytes: int) -> bytes:
        """Return a copy of a member that must be small."""
        size = self.members[name].size_bytes
        if size > max_bytes:
            reject("member_too_large", f"Archive member {name} has {size} bytes; at most {max_bytes} are allowed.")
        return b"".join(self.chunks(name))

    def chunks(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of a member, inflated; exactly as many as the directory says, with its checksum."""
        member = self.members[name]
        packed = memoryview(self._map)[member.offset : member.offset + member.packed_bytes]
        if not member.deflated:
            yield from (bytes(packed[start : start + _CHUNK]) for start in range(0, len(packed), _CHUNK))
            return
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        size, crc, position, rest = 0, 0, 0, b""
        while not inflater.eof:
            given = rest or bytes(packed[position : position + _CHUNK])
            position += 0 if rest else len(given)
            try:
                chunk = inflater.decompress(given, _CHUNK)
            except zlib.error as error:
                _damaged(f"Archive member {name} cannot be inflated: {error}.")
            rest = inflater.unconsumed_tail
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
            if size > member.size_bytes or (not given and not chunk):
                break
            yield chunk
        if not inflater.eof or inflater.unused_data or position != len(packed):
            _damaged(f"Archive member {name} does not inflate to the {member.size_bytes} bytes it says.")
        if size != member.size_bytes or crc != member.crc:
            _damaged(f"The size or the checksum of {name} is wrong.")


def _damaged(detail: str) -> None:
    reject("archive_damaged", detail + " The file is truncated or altered, or no plain ZIP writer wrote it.")


def _read_directory(data: mmap.mmap, methods: tuple[int, ...]) -> tuple[list[_Entry], int]:
    end = len(data) - _END.size
    signature, disk, start_disk, here, count, size, offset, comment = _END.unpack_from(data, end)
    if signature != b"PK\x05\x06" or comment:
        _damaged("The file does not end with a plain ZIP end record.")
    locator = end - _LOCATOR.size
    if locator >= 0 and data[locator : locator + 4] == b"PK\x06\x07":
        _, disk64, offset64, disks = _LOCATOR.unpack_from(data, locator)
        end = locator - _END64.size
        if offset64 != end or end < 0 or disk64 or disks != 1:
            _damaged(f"The ZIP64 end record is not where its locator says ({offset64}).")
        signature, length, _, _, disk, start_disk, here64, count64, size64, start64 = _END64.unpack_from(data, end)
        if signature != b"PK\x06\x06" or length != _END64.size - 12:
            _damaged("The ZIP64 end record is malformed.")
        pairs = ((here, here64, 0xFFFF), (count, count64, 0xFFFF), (size, size64, _MAX32), (offset, start64, _MAX32))
        if any(small not in (large, limit) for small, large, limit in pairs):
            _damaged("The ZIP end records contradict each other.")
        here, count, size, offset = here64, count64, size64, start64
    if disk or start_disk or here != count:
        _damaged("The archive is split over several files.")
    if count > MAX_MEMBERS:
        reject("archive_too_many_members", f"The archive has {count} members; at most {MAX_MEMBERS} are allowed.")
    if offset + size != end:
        _damaged(f"The directory covers bytes {offset} to {offset + size}, the end record starts at {end}.")
    entries, position = [], offset
    for _ in range(count):
        entry, position = _read_entry(data, position, end, methods)
        entries.append(entry)
    if position != end:
        _damaged(f"The directory holds {end - position} bytes after its {count} entries.")
    return entries, offset


def _read_entry(data: mmap.mmap, position: int, end: int, methods: tuple[int, ...]) -> tuple[_Entry, int]:
    if position + _CENTRAL.size > end:
        _damaged("The directory is cut short.")
    fields = _CENTRAL.unpack_from(data, position)
    signature, _, _, flags, method, _, _, crc, packed, size, name_size, extra_size, comment_size, disk = fields[:14]
    attributes, offset = fields[15], fields[16]
    if signature != b"PK\x01\x02":
        _damaged(f"There is no directory entry at byte {position}.")
    position += _CENTRAL.size
    raw = data[position : position + name_size]
    extra = data[position + name_size : position + name_size + extra_size]
    position += name_size + extra_size
    name = raw.decode("ascii", "replace")
    # A folder's own entry ends with a slash; only archives that people pack have them.
    plain = name.removesuffix("/") if len(methods) > 1 and not size else name
    if not _NAME.fullmatch(name) or any(part in ("", ".", "..") for part in plain.split("/")):
        reject("archive_member_name", f"Archive member {shown(raw)} has a name that is not a plain relative path.")
    if method not in methods:
        reject("archive_compressed", f"Archive member {name} is compressed (method {method}); members must be stored.")
    if (attributes >> 16) & 0o170000 not in (0, 0o100000, 0o040000):
        reject("archive_link", f"Archive member {name} is a link, a device or a pipe, not a file.")
    if flags & ~(_DESCRIPTOR | _UTF8 | (_DEFLATE_OPTIONS if method == _DEFLATED else 0)):
        reject("archive_encrypted", f"Archive member {name} has flags {flags:#x} (encrypted, patched or masked).")
    if comment_size or disk or position > end:
        _damaged(f"The directory entry of {name} has a comment, another disk or runs past the directory.")
    size, packed, offset = _widen(name, extra, size, packed, offset)
    if method == _STORED and size != packed:
        _damaged(f"Archive member {name} is stored with {packed} bytes but says {size}.")
    if size > _SMALL_BYTES and size > _MAX_RATIO * packed:
        reject("archive_bomb", f"Archive member {name} says {size} bytes in {packed}; at most 1:{_MAX_RATIO} is taken.")
    return _Entry(name, flags, method, crc, size, packed, offset), position


def _widen(name: str, extra: bytes, size: int, packed: int, offset: int) -> tuple[int, int, int]:
    # ZIP64: fields of 0xFFFFFFFF are given as 64 bits in extra field 1, in this order.
    wide: list[int] = []
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if 4 + length > len(extra):
            _damaged(f"The extra field of {name} is cut short.")
        if kind == 1:
            wide = [value for (value,) in struct.iter_unpack("<Q", extra[4 : 4 + length - length % 8])]
        extra = extra[4 + length :]
    values = []
    for value in (size, packed, offset):
        if value == _MAX32 and not wide:
            _damaged(f"The 64-bit size of {name} is missing.")
        values.append(wide.pop(0) if value == _MAX32 else value)
    return values[0], values[1], values[2]


def _locate(data: mmap.mmap, entries: list[_Entry], directory_offset: int) -> dict[str, Member]:
    members: dict[str, Member] = {}
    ordered = sorted(entries, key=lambda entry: entry.header_offset)
    position = 0
    for index, entry in enumerate(ordered):
        if entry.header_offset != position:
            _damaged(f"Bytes {position} to {entry.header_offset} belong to no member, or members overlap.")
        following = ordered[index + 1].header_offset if index + 1 < len(ordered) else directory_offset
        start = _check_local_header(data, entry, following)
        if entry.name in members:
            reject("archive_duplicate_member", f"The archive has two members named {entry.name}.")
        deflated = entry.method == _DEFLATED
        members[entry.name] = Member(entry.name, start, entry.size, entry.packed, entry.crc, deflated)
        _check_descriptor(data, entry, start + entry.packed, following)
        if not deflated and zlib.crc32(memoryview(data)[start : start + entry.size]) != entry.crc:
            _damaged(f"The checksum of {entry.name} is wrong.")
        position = following
    if position != directory_offset:
        _damaged(f"Bytes {position} to {directory_offset} belong to no member.")
    return members


def _check_local_header(data: mmap.mmap, entry: _Entry, following: int) -> int:
    position = entry.header_offset
    if position + _LOCAL.size > following:
        _damaged(f"The header of {entry.name} is cut short.")
    signature, _, flags, method, _, _, crc, packed, size, name_size, extra_size = _LOCAL.unpack_from(data, position)
    start: int = position + _LOCAL.size + name_size + extra_size
    name = data[position + _LOCAL.size : position + _LOCAL.size + name_size]
    if signature != b"PK\x03\x04" or name != entry.name.encode() or flags != entry.flags or method != entry.method:
        _damaged(f"The header of {entry.name} and the directory disagree.")
    # A streaming writer leaves zeros here; a ZIP64 one puts the sizes into the extra field.
    late = (0, _MAX32) if flags & _DESCRIPTOR else (_MAX32,)
    for value, expected in ((crc, entry.crc), (size, entry.size), (packed, entry.packed)):
        if value != expected and value not in late:
            _damaged(f"The header of {entry.name} and the directory disagree.")
    if start + entry.packed > following:
        _damaged(f"Archive member {entry.name} runs into the next one.")
    return start


def _check_descriptor(data: mmap.mmap, entry: _Entry, position: int, following: int) -> None:
    raw = data[position:following] if following - position <= 24 else b"?" * 25
    allowed: set[bytes] = {b""}
    if entry.flags & _DESCRIPTOR:
        long = struct.pack("<IQQ", entry.crc, entry.packed, entry.size)
        allowed = {long, b"PK\x07\x08" + long}
        if entry.size < _MAX32:
            short = struct.pack("<3I", entry.crc, entry.packed, entry.size)
            allowed |= {short, b"PK\x07\x08" + short}
    if raw not in allowed:
        _damaged(f"{following - position} unexpected bytes follow archive member {entry.name}.")
