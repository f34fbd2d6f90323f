"""One checkpoint file: texts and tensors in the safetensors format, written atomically and hashed on the way.

Nothing in it can run code when it is read: names, numbers and bytes. Written by ourselves and not by the library,
which would first copy every tensor.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_ALIASES = "aliases"
_ALIGNMENT = 8
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


class NotRestorable(Exception):
    """A checkpoint cannot be written of this state, or not be read back: the detail says why."""


@dataclass(frozen=True)
class Written:
    """A file that is safely on disk."""

    path: Path
    size_bytes: int
    sha256: str


def write_archive(path: Path, texts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Written:
    """Write a file, all or nothing. Names of the same tensor share its bytes. Raises OSError and NotRestorable."""
    kept, aliases = _find_aliases(tensors)
    # The widest first: then every tensor lies at a multiple of its item's size, and can be mapped.
    names = sorted(kept, key=lambda name: (-kept[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": {**texts, _ALIASES: json.dumps(aliases)}}
    position = 0
    for name in names:
        tensor = kept[name]
        if tensor.dtype not in _DTYPES:
            raise NotRestorable(f"{name} has dtype {tensor.dtype}, which a checkpoint cannot hold")
        end = position + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % _ALIGNMENT)
    digest = hashlib.sha256()
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb", buffering=0) as file:
            start = memoryview(len(head).to_bytes(8, "little") + head)
            for view in (start, *(_bytes_of(kept[name]) for name in names)):
                digest.update(view)
                while view:
                    view = view[file.write(view) :]
            os.fsync(file.fileno())
            size_bytes = os.fstat(file.fileno()).st_size
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return Written(path, size_bytes, digest.hexdigest())


def read_archive(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the texts and the tensors of a file, mapped and not to be changed. Raises NotRestorable."""
    try:
        with safe_open(path, "pt") as file:
            texts = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        aliases = json.loads(texts.pop(_ALIASES))
        return texts, tensors | {name: tensors[kept] for name, kept in aliases.items()}
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise NotRestorable(f"{path.name} is no checkpoint: {type(error).__name__}: {str(error)[:200]}") from error


def _find_aliases(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[object, ...], str] = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()) if tensor.numel() else (name,)
        if key in seen:
            aliases[name] = seen[key]
        else:
            seen[key] = name
            kept[name] = tensor
    return kept, aliases


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
