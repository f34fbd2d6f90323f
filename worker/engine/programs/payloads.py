"""Weights and constants of an archive: raw bytes with a description, checked against each other and read as tensors."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from worker.engine.programs.archive import Archive
from worker.engine.programs.json_reader import boolean, mapping, parse_json, record, text
from worker.engine.programs.rejections import reject, shown
from worker.engine.programs.values import DTYPES, rebuild_tensor_meta

_PATH_NAME = re.compile(r"(weight|tensor)_[0-9]{1,6}")
_COMPONENT = re.compile(r"[A-Za-z0-9_]{1,200}")
_MAX_PARTS = 50
"""Of a name. Modules are walked and copied by functions that call themselves."""
_MAX_TENSORS = 20_000
_MAX_CONFIG_BYTES = 64 * 2**20
_SLACK_BYTES = 64 * 2**20
_TORCH_DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16,
    7: torch.float32, 8: torch.float64, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip


@dataclass(frozen=True)
class Payload:
    """One named tensor of the archive."""

    name: str
    tensor: Tensor
    """A view into the archive's mapping."""
    dtype: int
    is_parameter: bool
    requires_grad: bool
    key: tuple[Any, ...]
    """Equal for names that are one tensor (tied)."""


def check_path(value: Any, where: str) -> str:
    """Return a dotted name that can become an attribute of a module."""
    name = text(value, where, 1000)
    if name.count(".") >= _MAX_PARTS:
        reject("bad_name", f"{where}: {shown(name)} has more than {_MAX_PARTS} parts.")
    for part in name.split("."):
        # An attribute of every module (forward, training, _parameters, ...) must not be replaced.
        if not _COMPONENT.fullmatch(part) or part.startswith("__") or hasattr(_MODULE, part):
            reject("bad_name", f"{where}: {shown(name)} is not an allowed name of a weight.")
    return name


_MODULE = nn.Module()


def read_payloads(archive: Archive, config: str, folder: str) -> dict[str, Payload]:
    """Return the tensors that a config member lists, by name. Files are `folder`/<path_name>."""
    where = config.rsplit("/", 1)[-1]
    listed = record(parse_json(archive.read(config, _MAX_CONFIG_BYTES), where), where, ("config",))["config"]
    payloads: dict[str, Payload] = {}
    budget = archive.size_bytes + _SLACK_BYTES
    # Each once, however many names a tensor or a member has.
    counted: set[tuple[Any, ...]] = set()
    checked: set[str] = set()
    if len(mapping(listed, where)) > _MAX_TENSORS:
        reject("weights_count", f"{where}: {len(listed)} tensors; at most {_MAX_TENSORS} are taken.")
    for name, value in listed.items():
        payload = _read_payload(archive, folder, check_path(name, where), value)
        payloads[name] = payload
        if payload.tensor.dtype is torch.bool and payload.tensor.numel() and payload.key[0] not in checked:
            checked.add(payload.key[0])
            _check_booleans(archive, payload.key[0], where)
        if payload.key not in counted:
            counted.add(payload.key)
            budget -= payload.tensor.numel() * payload.tensor.element_size()
            if budget < 0:
                reject(
                    "shape_bomb",
                    f"{where}: the tensors up to {name} (shape {tuple(payload.tensor.shape)}) need more memory than "
                    "the archive has bytes; they repeat elements with stride 0.",
                    "Call .contiguous() on expanded parameters and buffers before exporting.",
                )
    return payloads


def _read_payload(archive: Archive, folder: str, name: str, value: Any) -> Payload:
    where = f"the tensor {name}"
    meta = record(value, where, ("path_name", "is_param", "use_pickle", "tensor_meta"))
    if boolean(meta["use_pickle"], where) or meta["tensor_meta"] is None:
        reject(
            "pickled_weight",
            f"The tensor {name} is stored as a pickle, which runs code when loaded.",
            "Export a model whose parameters and buffers are plain tensors (no tensor subclasses).",
        )
    path_name = text(meta["path_name"], where, 40)
    if not _PATH_NAME.fullmatch(path_name):
        reject("custom_object", f"The constant {name} is stored as {shown(path_name)}, which is not a raw tensor.")
    member = f"{folder}/{path_name}"
    if member not in archive.members:
        reject("bad_structure", f"{where}: the archive has no member {member}.")
    tensor_meta = rebuild_tensor_meta(meta["tensor_meta"], where)
    sizes = [int(size["as_int"]) for size in tensor_meta["sizes"]]
    strides = [int(stride["as_int"]) for stride in tensor_meta["strides"]]
    offset = int(tensor_meta["storage_offset"]["as_int"])
    number = tensor_meta["dtype"]
    data = archive.view(member)
    tensor = _view(data, number, sizes, strides, offset, where)
    is_parameter = boolean(meta["is_param"], where)
    requires_grad = tensor_meta["requires_grad"] and is_parameter
    if requires_grad and not tensor.is_floating_point():
        reject("bad_structure", f"{where}: {tensor.dtype} cannot require a gradient.")
    key = (member, number, tuple(sizes), tuple(strides), offset)
    return Payload(name, tensor, number, is_parameter, requires_grad, key if tensor.numel() else (name,))


def _view(data: memoryview, number: int, sizes: list[int], strides: list[int], offset: int, where: str) -> Tensor:
    dtype, width = _TORCH_DTYPES[number], DTYPES[number]
    if math.prod(sizes) == 0:
        return torch.empty(sizes, dtype=dtype)
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if len(data) % width or (last + 1) * width > len(data):
        reject(
            "tensor_out_of_bounds",
            f"{where}: shape {tuple(sizes)}, strides {tuple(strides)} and offset {offset} need {(last + 1) * width} "
            f"bytes; the archive stores {len(data)}.",
        )
    flat = torch.frombuffer(data, dtype=torch.uint8 if number == 12 else dtype)
    return torch.as_strided(flat.view(dtype), sizes, strides, offset)


def _check_booleans(archive: Archive, member: str, where: str) -> None:
    flat = torch.frombuffer(archive.view(member), dtype=torch.uint8)
    if bool((flat > 1).any()):
        reject("bad_structure", f"{where}: a boolean is stored as something else than 0 or 1.")


def check_finite(payloads: Iterable[Payload]) -> None:
    """Refuse parameters with NaN or infinite values. (Buffers may hold -inf, as attention masks do, but not NaN.)"""
    # Tied names are looked at once: a file can give one large tensor any number of names.
    for payload in {(*payload.key, payload.is_parameter): payload for payload in payloads}.values():
        tensor = payload.tensor
        if not tensor.is_floating_point():
            continue
        wrong = ~torch.isfinite(tensor) if payload.is_parameter else torch.isnan(tensor)
        count = int(wrong.sum())
        if count:
            kind = "NaN or infinite" if payload.is_parameter else "NaN"
            reject(
                "nonfinite_weight",
                f"The tensor {payload.name} of shape {tuple(tensor.shape)} has {count} {kind} values.",
                "Find out why training diverged, or repair the tensor, and export again.",
            )
