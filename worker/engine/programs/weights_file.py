"""Strict reading of safetensors files: a checked header, tensors that tile the rest of the file, finite values."""

import math
import mmap
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worker.engine.programs.json_reader import integer, items, mapping, parse_json, record
from worker.engine.programs.rejections import reject, shown

MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 20_000
MAX_RANK = 8
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
WEIGHTS_FIX = (
    'Write the weights with safetensors.torch.save_file({name: tensor.contiguous() for ...}, "model.safetensors"), '
    "or save_pretrained of transformers; both refuse what this file has."
)
_NAME = re.compile(r"[A-Za-z0-9_.\-/]{1,300}")


@dataclass(frozen=True)
class Stored:
    """One tensor of the file: where it lies behind the header."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> tuple[dict[str, Stored], int]:
    """Return the tensors that the file's header lists, by name, and the offset of the first byte behind the header."""
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size_bytes - 8):
            reject(
                "weights_damaged",
                f"The file has {size_bytes} bytes and says that its header has {length}; a safetensors header has at "
                f"most {MAX_HEADER_BYTES} bytes and lies inside the file.",
                WEIGHTS_FIX,
            )
        raw = file.read(length)
    listed = mapping(parse_json(raw, "the safetensors header"), "the safetensors header")
    metadata = mapping(listed.pop("__metadata__", {}), "the metadata of the safetensors header")
    if not all(isinstance(value, str) for value in metadata.values()):
        reject("bad_structure", "The metadata of the safetensors header holds something else than text.", WEIGHTS_FIX)
    if not 1 <= len(listed) <= MAX_TENSORS:
        reject("weights_count", f"The file has {len(listed)} tensors; 1 to {MAX_TENSORS} are allowed.", WEIGHTS_FIX)
    stored = [_read_entry(name, value) for name, value in listed.items()]
    position = 0
    for each in sorted(stored, key=lambda entry: (entry.begin, entry.end)):
        if each.begin != position:
            reject(
                "weights_damaged",
                f"{each.name} begins at byte {each.begin} behind the header, the one before ends at {position}; "
                "tensors overlap or leave a gap.",
                WEIGHTS_FIX,
            )
        position = each.end
    if position != size_bytes - 8 - length:
        reject(
            "weights_damaged",
            f"The tensors need {position} bytes; the file has {size_bytes - 8 - length} behind its header. "
            "It is truncated, or something was appended.",
            WEIGHTS_FIX,
        )
    return {each.name: each for each in stored}, 8 + length


def _read_entry(name: str, value: Any) -> Stored:
    where = f"the tensor {shown(name)}"
    if not _NAME.fullmatch(name):
        reject("bad_name", f"{where} has a name that no parameter has.", WEIGHTS_FIX)
    entry = record(value, where, ("dtype", "shape", "data_offsets"))
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        reject(
            "unsupported_dtype",
            f"{where} has dtype {shown(entry['dtype'])}; taken are {', '.join(DTYPES)}.",
            "Save the weights in float32, float16 or bfloat16; quantized weights cannot be trained.",
        )
    shape = tuple(integer(size, where, 1, 2**40) for size in items(entry["shape"], where, MAX_RANK))
    offsets = items(entry["data_offsets"], where, 2)
    if len(offsets) != 2:
        reject("bad_structure", f"{where}: data_offsets must be two integers.", WEIGHTS_FIX)
    begin, end = (integer(offset, where, 0, 2**48) for offset in offsets)
    if end - begin != math.prod(shape) * dtype.itemsize:
        reject(
            "weights_damaged",
            f"{where} of shape {shape} and dtype {entry['dtype']} needs {math.prod(shape) * dtype.itemsize} bytes; "
            f"its place has {end - begin}.",
            WEIGHTS_FIX,
        )
    return Stored(name, dtype, shape, begin, end)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file; floats are finite. They lie in a private mapping of the file."""
    header, start = read_header(path)
    with path.open("rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))[start:]
    return {each.name: _view(data, each) for each in header.values()}


def _view(data: memoryview, stored: Stored) -> Tensor:
    raw = torch.frombuffer(data[stored.begin : stored.end], dtype=torch.uint8)
    if stored.dtype is torch.bool and bool((raw > 1).any()):
        reject(
            "bad_structure", f"The tensor {stored.name} stores a boolean as something else than 0 or 1.", WEIGHTS_FIX
        )
    # A tensor may lie at an odd address: the format promises no alignment.
    aligned = raw if raw.data_ptr() % stored.dtype.itemsize == 0 else raw.clone()
    tensor = aligned.view(stored.dtype).reshape(stored.shape)
    if tensor.is_floating_point():
        count = int((~torch.isfinite(tensor)).sum())
        if count:
            reject(
                "nonfinite_weight",
                f"The tensor {stored.name} of shape {stored.shape} has {count} NaN or infinite values.",
                "Find out why training diverged, or repair the tensor, and save again.",
            )
    return tensor
