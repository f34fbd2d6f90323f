"""From an uploaded archive to a new one that holds only what was understood; only the new one is ever loaded."""

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from worker.engine.programs.archive import Archive
from worker.engine.programs.formats import refuse_other_formats
from worker.engine.programs.json_reader import parse_json
from worker.engine.programs.payloads import Payload, check_finite, read_payloads
from worker.engine.programs.program_check import NAMES_MEMBER, rebuild_names, rebuild_program
from worker.engine.programs.rejections import reject, shown

_MAX_MODEL_JSON = 256 * 2**20
_ROOT = "model"
_WEIGHTS, _CONSTANTS = "data/weights", "data/constants"
_WEIGHTS_CONFIG, _CONSTANTS_CONFIG = (
    f"{_WEIGHTS}/model_weights_config.json",
    f"{_CONSTANTS}/model_constants_config.json",
)
_SAMPLE_INPUTS = "data/sample_inputs/model.pt"
_REQUIRED = {"archive_format", "archive_version", "models/model.json", _WEIGHTS_CONFIG, _CONSTANTS_CONFIG}
_KNOWN = _REQUIRED | {_SAMPLE_INPUTS, ".data/version", ".data/serialization_id", "byteorder", "version"}
_PAYLOAD = re.compile(r"data/(weights/weight|constants/tensor)_[0-9]{1,6}")
_EXTRA = re.compile(r"extra/[A-Za-z0-9_.\-/]{1,200}")
_ALIGNMENT = 64
_CHUNK = 16 * 2**20


def check_and_rewrite(path: Path, directory: Path) -> Path:
    """Check an uploaded .pt2 strictly and write a new archive, `directory`/checked.pt2, from the parsed parts."""
    target = directory / "checked.pt2"
    rewrite(path, target)
    return target


def rewrite(path: Path, target: Path, output_names: list[str] | None = None) -> None:
    """Check the archive at `path` and write a new one to `target`; `output_names` replaces the names in the file."""
    refuse_other_formats(path)
    with Archive(path) as archive:
        _strip_root(archive)
        _check_members(archive)
        weights = read_payloads(archive, _WEIGHTS_CONFIG, _WEIGHTS)
        constants = read_payloads(archive, _CONSTANTS_CONFIG, _CONSTANTS)
        check_finite((*weights.values(), *constants.values()))
        where = "models/model.json"
        program = rebuild_program(parse_json(archive.read(where, _MAX_MODEL_JSON), where), weights, constants)
        names = program.output_names
        if output_names is not None:
            names = output_names
        elif NAMES_MEMBER in archive.members:
            names = rebuild_names(parse_json(archive.read(NAMES_MEMBER, 2**20), NAMES_MEMBER), names)
        members: list[tuple[str, Any]] = [
            ("archive_format", b"pt2"),
            ("archive_version", b"0"),
            (".data/version", b"6\n"),
            ("byteorder", b"little"),
            ("models/model.json", _json(program.document)),
            (_SAMPLE_INPUTS, b""),
            (NAMES_MEMBER, _json(names)),
        ]
        members += _pack(weights, _WEIGHTS_CONFIG, f"{_WEIGHTS}/weight_")
        members += _pack(constants, _CONSTANTS_CONFIG, f"{_CONSTANTS}/tensor_")
        write_archive(target, members)


def _strip_root(archive: Archive) -> None:
    roots = {name.partition("/")[0] for name in archive.members}
    if len(roots) != 1 or any("/" not in name for name in archive.members):
        reject("not_a_model", f"The archive has the top folders {shown(sorted(roots)[:5])}; a .pt2 has exactly one.")
    archive.members = {name.partition("/")[2]: member for name, member in archive.members.items()}


def _check_members(archive: Archive) -> None:
    for name in archive.members:
        if name.startswith("data/aotinductor/"):
            reject("native_code", f"The archive holds compiled code ({shown(name)}), which is never loaded.")
        if re.match(r"data/constants/(custom|opaque)_obj_", name):
            reject("custom_object", f"The archive holds a pickled object ({shown(name)}), which runs code when loaded.")
        if re.match(r"data/(weights|constants)/[^/]*\.pt$", name) or name in ("serialized_exported_program.json",):
            reject("old_archive", f"The archive is of an old layout with pickled tensors ({shown(name)}).", _NEWER)
        if name not in _KNOWN and not _PAYLOAD.fullmatch(name) and not _EXTRA.fullmatch(name):
            if name.startswith("models/"):
                reject(
                    "several_models", f"The archive holds {shown(name)}; exactly one program, named model, is allowed."
                )
            reject("unknown_member", f"The archive holds {shown(name)}, which is not part of a torch.export program.")
    missing = sorted(_REQUIRED - set(archive.members))
    if missing:
        reject("not_a_model", f"The archive has no {missing[0]}; it is not a torch.export program.")
    if bytes(archive.view("archive_format")[:8]) != b"pt2":
        reject("not_a_model", f"The archive's format is {shown(bytes(archive.view('archive_format')[:8]))}, not pt2.")
    if bytes(archive.view("archive_version")[:8]) != b"0":
        reject("old_archive", "The archive's layout version is not 0.", _NEWER)
    if "byteorder" in archive.members and bytes(archive.view("byteorder")[:8]) != b"little":
        reject("unsupported_byte_order", "The tensors are stored big-endian.")


_NEWER = "Export the model with torch 2.13: torch.export.save(torch.export.export(model.eval(), inputs), 'model.pt2')."


def _json(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def _pack(payloads: dict[str, Payload], config: str, prefix: str) -> list[tuple[str, Any]]:
    files: dict[tuple[Any, ...], str] = {}
    members: list[tuple[str, Any]] = []
    entries = {}
    for name, payload in payloads.items():
        if payload.key not in files:
            files[payload.key] = f"{prefix}{len(files)}"
            members.append((files[payload.key], payload))
        strides: list[dict[str, int]] = []
        step = 1
        for size in reversed(payload.tensor.shape):
            strides.insert(0, {"as_int": step})
            step *= max(size, 1)
        entries[name] = {
            "path_name": files[payload.key].rsplit("/", 1)[1],
            "is_param": payload.is_parameter,
            "use_pickle": False,
            "tensor_meta": {
                "dtype": payload.dtype,
                "sizes": [{"as_int": size} for size in payload.tensor.shape],
                "requires_grad": payload.requires_grad,
                "device": {"type": "cpu", "index": None},
                "strides": strides,
                "storage_offset": {"as_int": 0},
                "layout": 7,
            },
        }
    return [*members, (config, _json({"config": entries}))]


def write_archive(path: Path, members: list[tuple[str, Any]]) -> None:
    """Write members (bytes or Payload) as a stored ZIP whose bytes depend on nothing else. Tensors are aligned."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members:
            data = content if isinstance(content, bytes) else _tensor_bytes(content)
            info = zipfile.ZipInfo(f"{_ROOT}/{name}", date_time=(1980, 1, 1, 0, 0, 0))
            info.external_attr = 0o644 << 16
            info.create_system = 3
            info.file_size = len(data)
            large = len(data) >= 2**31
            header = archive.fp.tell() + 30 + len(info.filename) + (20 if large else 0)  # type: ignore[union-attr]
            gap = -(header + 4) % _ALIGNMENT
            info.extra = b"PA" + gap.to_bytes(2, "little") + b"\0" * gap
            with archive.open(info, "w", force_zip64=large) as file:
                for start in range(0, len(data), _CHUNK):
                    file.write(data[start : start + _CHUNK])


def _tensor_bytes(payload: Payload) -> memoryview:
    tensor = payload.tensor.contiguous().flatten()
    if not tensor.numel():
        return memoryview(b"")
    return tensor.view(torch.uint8).numpy().data
