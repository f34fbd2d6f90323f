"""Altering valid files: bytes, numbers, members of zips, values of JSON, fields of protobuf, headers."""

import json
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import onnx
from google.protobuf.message import DecodeError, Message

from tests.fuzz.samples import read_zip, safetensors_file, zip_members
from tests.fuzz.watched import Upload

NUMBERS = (0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 4095, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**53,
           2**62, 2**63 - 1, 2**63, 2**64 - 1)  # fmt: skip
CODE = "__import__('pathlib').Path('../marker').touch()"
TEXTS = (CODE, "../../marker", "/etc/passwd", "", "a" * 5000, "\0", "x\ny", "\u202e", "os.system", "NaN", "s0", "self",
         "https://example.com/x", "auto_map", "__class__", "0", "{}", "%s%s%n", "a.b.c", "torch", "import")  # fmt: skip
VALUES: tuple[Any, ...] = (None, True, False, -1, 0.5, 1e308, [], {}, [[]], *NUMBERS, *TEXTS)


def mutate(upload: Upload, choice: random.Random) -> Upload:
    """Return a file that differs from a valid one in one to three places."""
    content = upload.content
    for _ in range(choice.choice((1, 1, 1, 2, 3))):
        ways: list[Callable[[bytes, random.Random], bytes]] = [_alter_bytes]
        ways += 6 * [_WAYS.get((upload.kind, upload.format), _alter_bytes)]
        try:
            content = choice.choice(ways)(content, choice)
        except (ValueError, KeyError, IndexError, zipfile.BadZipFile, zlib.error, struct.error, RecursionError,
                NotImplementedError, RuntimeError, EOFError, OverflowError, DecodeError):  # fmt: skip
            # It is broken already, so that its structure cannot be read.
            content = _alter_bytes(content, choice)
    return replace(upload, content=content)


def _alter_bytes(content: bytes, choice: random.Random) -> bytes:
    data = bytearray(content or b"\0")
    place = choice.randrange(len(data))
    match choice.randrange(7):
        case 0:
            data[place] ^= 1 << choice.randrange(8)
        case 1:
            data[place] = choice.randrange(256)
        case 2:
            del data[place : place + choice.choice((1, 4, 100, len(data)))]
        case 3:
            data[place:place] = choice.randbytes(choice.choice((1, 4, 100)))
        case 4:
            start = choice.randrange(len(data))
            data[place:place] = data[start : start + choice.choice((4, 46, 300))]
        case 5:
            width = choice.choice("BHIQ")
            number = choice.choice(NUMBERS) & (2 ** (8 * struct.calcsize(width)) - 1)
            raw = struct.pack(choice.choice("<>") + width, number)
            data[place : place + len(raw)] = raw
        case 6:
            start = choice.randrange(len(data))
            data[place : place + 8] = data[start : start + 8]
    return bytes(data)


def _alter_json(content: bytes, choice: random.Random) -> bytes:
    root = [json.loads(content)]
    places: list[tuple[Any, Any]] = []
    waiting: list[Any] = [root]
    while waiting:
        owner = waiting.pop()
        keys = list(owner) if isinstance(owner, dict) else range(len(owner))
        places += [(owner, key) for key in keys]
        waiting += [owner[key] for key in keys if isinstance(owner[key], dict | list)]
    owner, key = choice.choice(places)
    other, source = choice.choice(places)
    match choice.randrange(8):
        case 0 | 1:
            owner[key] = choice.choice(VALUES)
        case 2:
            owner[key] = json.loads(json.dumps(other[source]))
        case 3:
            del owner[key]
        case 4 if isinstance(owner, dict):
            owner[choice.choice(TEXTS)] = owner.pop(key)
        case 5 if isinstance(owner, dict):
            owner[choice.choice(TEXTS)] = choice.choice(VALUES)
        case 6 if isinstance(owner[key], str):
            text = owner[key]
            at = choice.randrange(len(text) + 1)
            owner[key] = text[:at] + choice.choice(TEXTS) + text[at + choice.randrange(3) :]
        case 7 if isinstance(owner[key], str):
            # Numbers and words inside of a text: a size expression, a call structure.
            owner[key] = _alter_words(owner[key], choice)
        case _ if isinstance(owner, list):
            owner.insert(key, json.loads(json.dumps(other[source])))
    text = json.dumps(root[0] if root else None)
    if choice.random() < 0.05:
        text = text.replace(": ", choice.choice((": NaN, ", ": 1e999, ", ": " + "[" * 2000, ': {"a": 1, "a": ')), 1)
    return text.encode("utf-8", "surrogatepass")


def _alter_words(text: str, choice: random.Random) -> str:
    words = re.findall(r"[A-Za-z_]+|[0-9]+|[^A-Za-z_0-9]+", text)
    place = choice.randrange(len(words))
    pool = (str(choice.choice(NUMBERS)), choice.choice(words), choice.choice(TEXTS), "Pow", "Max", "-")
    words[place] = choice.choice(pool)
    return "".join(words)


def _alter_zip(content: bytes, choice: random.Random) -> bytes:
    members = read_zip(content)
    name = choice.choice(list(members))
    method = choice.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)) if choice.random() < 0.2 else _method(content)
    match choice.randrange(12):
        case 0:
            del members[name]
        case 1:
            other = choice.choice(list(members))
            members[name], members[other] = members[other], members[name]
        case 2:
            part = choice.choice(("../marker", "/marker", name.upper(), name + "/x", "a\\b", "x" * 300, "evil.py",
                                  "data/aotinductor/evil.so", "pytorch_model.bin", "x.npy", "__MACOSX/x"))  # fmt: skip
            members[part] = members.pop(name) if choice.random() < 0.5 else members[name]
        case 3:
            changed = zip_members(members, method)
            # Links, flags, methods, sizes: what the directory says of its members.
            at = [match.start() for match in re.finditer(rb"PK\x01\x02|PK\x03\x04", changed)]
            return _put_number(changed, choice.choice(at) + choice.randrange(4, 46), choice)
        case 4:
            members[name] = bytes(choice.choice((0, 1, 2**20, 2**24)))
        case _:
            members[name] = _alter_member(name, members[name], choice)
    return zip_members(members, method)


def _method(content: bytes) -> int:
    return zipfile.ZIP_DEFLATED if int.from_bytes(content[8:10], "little") else zipfile.ZIP_STORED


def _put_number(content: bytes, at: int, choice: random.Random) -> bytes:
    data = bytearray(content)
    width = choice.choice("BHI")
    raw = struct.pack("<" + width, choice.choice(NUMBERS) & (2 ** (8 * struct.calcsize(width)) - 1))
    data[at : at + len(raw)] = raw
    return bytes(data[: len(content)])


def _alter_member(name: str, content: bytes, choice: random.Random) -> bytes:
    if name.endswith(".json") and choice.random() < 0.95:
        return _alter_json(content, choice)
    if name.endswith(".safetensors"):
        return _alter_safetensors(content, choice)
    if name.endswith(".npy") and choice.random() < 0.8:
        head = content[10:].partition(b"\n")[0].decode("latin-1")
        text = _alter_words(head, choice).encode("latin-1", "replace") + b"\n"
        return content[:8] + struct.pack("<H", len(text) & 0xFFFF) + text + content[11 + len(head) :]
    if name.endswith(".img") and choice.random() < 0.7:
        return _alter_image(content, choice)
    return _alter_bytes(content, choice)


def _alter_image(content: bytes, choice: random.Random) -> bytes:
    head = bytearray(_put_number(content, choice.randrange(min(64, len(content))), choice))
    if head[:4] == b"\x89PNG":
        # With right checksums, so that what is altered reaches the decoder.
        position = 8
        while position + 12 <= len(head):
            (length,) = struct.unpack_from(">I", head, position)
            if position + 12 + length > len(head):
                break
            struct.pack_into(">I", head, position + 8 + length, zlib.crc32(head[position + 4 : position + 8 + length]))
            position += 12 + length
    return bytes(head)


def _alter_safetensors(content: bytes, choice: random.Random) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    match choice.randrange(6):
        case 0:
            return struct.pack("<Q", choice.choice(NUMBERS) & (2**64 - 1)) + content[8:]
        case 1:
            return safetensors_file(header, _alter_bytes(data, choice))
        case 2:
            return safetensors_file(header, struct.pack("<f", float("nan")) * (len(data) // 4))
        case _:
            return safetensors_file(_alter_json(header, choice), data)


def _alter_parquet(content: bytes, choice: random.Random) -> bytes:
    length = int.from_bytes(content[-8:-4], "little")
    start = len(content) - 8 - length
    if choice.random() < 0.75:
        # The footer describes everything else.
        footer = _alter_bytes(content[start:-8], choice)
        return content[:start] + footer + struct.pack("<I", len(footer)) + b"PAR1"
    return _alter_bytes(content[:start], choice) + content[start:]


def _alter_onnx(content: bytes, choice: random.Random) -> bytes:
    model = onnx.ModelProto()
    model.ParseFromString(content)
    messages: list[Message] = []
    waiting: list[Message] = [model]
    while waiting:
        message = waiting.pop()
        messages.append(message)
        for field, value in message.ListFields():
            if field.type == field.TYPE_MESSAGE:
                waiting += list(value) if _repeats(field) else [value]
    message = choice.choice(messages)
    field = choice.choice(list(message.DESCRIPTOR.fields))
    if choice.random() < 0.6 and message.ListFields():
        field = choice.choice(message.ListFields())[0]
    if choice.random() < 0.15:
        message.ClearField(field.name)
    elif field.type == field.TYPE_MESSAGE:
        others = [each for each in messages if each.DESCRIPTOR is field.message_type]
        target = getattr(message, field.name)
        if _repeats(field):
            if len(target) and choice.random() < 0.3:
                del target[choice.randrange(len(target))]
            else:
                target.add().CopyFrom(choice.choice(others) if others else field.message_type._concrete_class())
        elif others:
            target.CopyFrom(choice.choice(others))
        else:
            target.SetInParent()
    elif _repeats(field):
        values = getattr(message, field.name)
        if len(values) and choice.random() < 0.7:
            values[choice.randrange(len(values))] = _scalar(field, choice)
        else:
            values.append(_scalar(field, choice))
    else:
        setattr(message, field.name, _scalar(field, choice))
    return model.SerializeToString()


def _repeats(field: Any) -> bool:
    return bool(field.is_repeated)


def _scalar(field: Any, choice: random.Random) -> Any:
    if field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return choice.choice((0.0, -1.0, 1e30, float("inf"), float("nan")))
    if field.type == field.TYPE_BYTES:
        return choice.choice((b"", b"\xff\xfe", b"ab,bc", choice.randbytes(choice.choice((4, 96)))))
    if field.type == field.TYPE_STRING:
        return choice.choice(
            [text for text in TEXTS if "\0" not in text] + ["Conv", "x", "If", "Loop", "com.microsoft"]
        )
    if field.type == field.TYPE_ENUM:
        return choice.choice([value.number for value in field.enum_type.values])
    low, high = (-(2**31), 2**31 - 1) if field.type == field.TYPE_INT32 else (-(2**63), 2**63 - 1)
    if field.type in (field.TYPE_UINT32, field.TYPE_UINT64, field.TYPE_FIXED64):
        low, high = 0, 2**32 - 1
    return min(high, max(low, choice.choice((*NUMBERS, -1, -2))))


_WAYS: dict[tuple[str, str], Callable[[bytes, random.Random], bytes]] = {
    ("model", "pt2"): _alter_zip, ("model", "hf"): _alter_zip, ("model", "onnx"): _alter_onnx,
    ("model", "safetensors"): _alter_safetensors, ("dataset", "safetensors"): _alter_safetensors,
    ("dataset", "npz"): _alter_zip, ("dataset", "images"): _alter_zip, ("dataset", "parquet"): _alter_parquet,
}  # fmt: skip
