"""Columns that lie in a file as they lie in memory, or deflated: what .npz and .safetensors files hold."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from worker.engine.errors import DatasetRejected
from worker.engine.training.columns import CHUNK_BYTES, Column, scratch_file, write_once
from worker.engine.training.rows import Rows, reorder


@dataclass(frozen=True)
class Part:
    """A run of bytes in a file."""

    name: str
    """For messages."""
    offset: int
    packed_bytes: int
    size: int
    """After unpacking."""
    deflated: bool
    crc: int | None
    """CRC-32 of the unpacked bytes, where the format has one."""


@dataclass(frozen=True)
class StoredColumn(Column):
    """An array whose bytes stand in the file in order."""

    part: Part
    skip_bytes: int = 0
    """Header bytes before the numbers, after unpacking."""
    fortran_order: bool = False

    def check(self, path: Path) -> None:
        """Compare the checksum, if the format has one."""
        if self.part.crc is not None:
            with path.open("rb") as file:
                for _ in unpack(file, self.part):
                    pass

    def open_rows(self, path: Path, directory: Path) -> Rows:
        """Read the file itself, or what was unpacked from it or brought into the order of rows."""
        assert self.dtype is not None
        offset = self.part.offset + self.skip_bytes
        if self.part.deflated:
            unpacked = scratch_file(path, directory, self.part.offset)
            with path.open("rb") as file:
                write_once(unpacked, unpack(file, self.part))
            path, offset = unpacked, self.skip_bytes
        shape = tuple(int(size) for size in self.shape)
        if self.fortran_order and len(shape) > 1:
            ordered = scratch_file(path, directory, self.part.offset, "rows")
            write_once(ordered, reorder(path, offset, self.dtype, shape))
            path, offset = ordered, 0
        return Rows(path, self.dtype, shape, offset)


def unpack(file: BinaryIO, part: Part) -> Iterator[bytes]:
    """Yield the unpacked bytes of a part, in bounded chunks, checking its size and checksum at the end."""
    file.seek(part.offset)
    decoder = zlib.decompressobj(-15) if part.deflated else None
    left, produced, crc = part.packed_bytes, 0, 0
    while left:
        packed = file.read(min(CHUNK_BYTES, left))
        if not packed:
            break
        left -= len(packed)
        while packed:
            try:
                chunk = decoder.decompress(packed, CHUNK_BYTES) if decoder else packed
            except zlib.error as error:
                raise _corrupt(part, f"{error}") from error
            packed = decoder.unconsumed_tail if decoder else b""
            produced += len(chunk)
            if produced > part.size:
                raise _corrupt(part, f"more than the declared {part.size} bytes")
            crc = zlib.crc32(chunk, crc)
            yield chunk
    if decoder:
        tail = decoder.flush()
        produced += len(tail)
        crc = zlib.crc32(tail, crc)
        yield tail
        if not decoder.eof or decoder.unused_data:
            raise _corrupt(part, "the deflate stream does not end where the member ends")
    if produced != part.size:
        raise _corrupt(part, f"{produced} bytes where {part.size} are declared")
    if part.crc is not None and crc != part.crc:
        raise _corrupt(part, f"checksum {crc:08x}, declared {part.crc:08x}")


def _corrupt(part: Part, what: str) -> DatasetRejected:
    return DatasetRejected(f"{part.name!r} is corrupt: {what}", code="dataset_corrupt", fix="Upload it again.")
