"""Counting what protobuf would make of a file, before it does: an empty message has two bytes and takes a hundred."""

from functools import cache

import onnx
from google.protobuf.descriptor import Descriptor, FieldDescriptor

MAX_FIELDS = 3_000_000
"""torch writes about fifty for a node, with its metadata."""
MAX_PACKED_BYTES = 2**28
"""Of lists of integers, which have a byte each in the file and eight in memory."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_REAL = (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE)


class TooLarge(ValueError):
    """The file would need far more memory than it has bytes."""


class Damaged(ValueError):
    """The bytes are no message."""


def check_wire(data: bytes) -> None:
    """Raise TooLarge or Damaged; see https://protobuf.dev/programming-guides/encoding/ for the format."""
    fields = packed = 0
    waiting: list[tuple[int, int, Descriptor]] = [(0, len(data), onnx.ModelProto.DESCRIPTOR)]
    while waiting:
        position, end, kind = waiting.pop()
        messages, integers = _children(kind)
        while position < end:
            fields += 1
            if fields > MAX_FIELDS:
                raise TooLarge(f"more than {MAX_FIELDS} fields")
            tag, position = _read_varint(data, position, end)
            number, wire = tag >> 3, tag & 7
            if wire == _VARINT:
                _, position = _read_varint(data, position, end)
            elif wire == _BYTES:
                length, position = _read_varint(data, position, end)
                if length > end - position:
                    raise Damaged(f"field {number} is longer than what holds it")
                if number in messages:
                    waiting.append((position, position + length, messages[number]))
                elif number in integers:
                    packed += length
                position += length
            elif wire in (_FIXED64, _FIXED32):
                position += 8 if wire == _FIXED64 else 4
            else:
                raise Damaged(f"field {number} is of wire type {wire}")
        if position != end:
            raise Damaged("a field runs past what holds it")
        if packed > MAX_PACKED_BYTES:
            raise TooLarge(f"more than {MAX_PACKED_BYTES} bytes of packed integers")


def _read_varint(data: bytes, position: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while position < end and shift < 70:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise Damaged("a number is cut short")


@cache
def _children(kind: Descriptor) -> tuple[dict[int, Descriptor], frozenset[int]]:
    """Return the fields that hold messages, and those that hold lists of integers, by number."""
    messages = {field.number: field.message_type for field in kind.fields if field.message_type is not None}
    scalar = (field for field in kind.fields if field.is_repeated and field.message_type is None)
    texts = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)
    return messages, frozenset(
        field.number for field in scalar if field.type not in texts and field.cpp_type not in _REAL
    )
