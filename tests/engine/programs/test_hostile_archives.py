"""Hostile archives: each is refused with its code; nothing in them runs (a marker file would show it)."""

import json
import pickle
import random
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.engine.programs.hostile import (
    CONSTANTS,
    MODEL,
    WEIGHTS,
    Members,
    Payload,
    alter_json,
    evil_pickle,
    read_members,
    refuse,
    write_members,
)
from worker.engine.programs.intake import open_program


def test_the_valid_archive_is_accepted(valid: Path, tmp_path: Path) -> None:
    program = open_program(valid, tmp_path)
    assert [facts.name for facts in program.signature.outputs] == ["logits", "y"]


def test_members_rewritten_by_another_zip_writer_are_accepted(members: Members, tmp_path: Path) -> None:
    open_program(write_members(tmp_path / "a.pt2", members), tmp_path)


def test_the_payload_would_run_if_it_were_unpickled(marker: Path) -> None:
    pickle.loads(evil_pickle(marker)).close()
    assert marker.exists()


def test_pickled_sample_inputs_are_dropped_unread(members: Members, tmp_path: Path, marker: Path) -> None:
    evil = {**members, "data/sample_inputs/model.pt": evil_pickle(marker)}
    open_program(write_members(tmp_path / "a.pt2", evil), tmp_path)
    assert not marker.exists()
    assert read_members(tmp_path / "checked.pt2")["data/sample_inputs/model.pt"] == b""


@pytest.mark.parametrize(
    ("config", "folder", "name"), [(WEIGHTS, "weights", "fc.weight"), (CONSTANTS, "constants", "table")]
)
def test_pickled_tensors_are_refused(
    members: Members, tmp_path: Path, marker: Path, config: str, folder: str, name: str
) -> None:
    entry = json.loads(members[config])["config"][name]
    evil = alter_json(members, config, lambda value: value["config"][name].update(use_pickle=True))
    evil[f"data/{folder}/{entry['path_name']}"] = evil_pickle(marker)
    refuse(write_members(tmp_path / "a.pt2", evil), "pickled_weight")
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["custom_obj_0", "opaque_obj_0"])
def test_pickled_objects_are_refused(members: Members, tmp_path: Path, marker: Path, kind: str) -> None:
    entry = {"path_name": kind, "is_param": False, "use_pickle": True, "tensor_meta": None}
    evil = alter_json(members, CONSTANTS, lambda value: value["config"].update(thing=entry))
    refuse(write_members(tmp_path / "a.pt2", evil), "pickled_weight")
    evil[f"data/constants/{kind}"] = evil_pickle(marker)
    refuse(write_members(tmp_path / "b.pt2", evil), "custom_object")
    evil = alter_json(evil, CONSTANTS, lambda value: value["config"]["thing"].update(use_pickle=False))
    refuse(write_members(tmp_path / "c.pt2", evil), "custom_object")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("member", "code"),
    [
        ("data/aotinductor/model/evil.so", "native_code"),
        ("data/aotinductor/model/weights_config.json", "native_code"),
        ("data/weights/model.pt", "old_archive"),
        ("data/constants/model.pt", "old_archive"),
        ("models/second.json", "several_models"),
        ("data/weights/weight_0.pkl", "unknown_member"),
        ("xl_model_weights/model", "unknown_member"),
        ("data/../escape", "archive_member_name"),
        ("data//weights", "archive_member_name"),
        ("data/we\\ights", "archive_member_name"),
    ],
)
def test_unknown_members_are_refused(members: Members, tmp_path: Path, member: str, code: str) -> None:
    refuse(write_members(tmp_path / "a.pt2", {**members, member: b"\x7fELF"}), code)


@pytest.mark.parametrize("name", [MODEL, WEIGHTS, CONSTANTS])
def test_missing_members_are_refused(members: Members, tmp_path: Path, name: str) -> None:
    del members[name]
    refuse(write_members(tmp_path / "a.pt2", members), "not_a_model", "format_zip")


def test_compressed_members_are_refused_before_inflation(members: Members, tmp_path: Path) -> None:
    bomb = {**members, "data/weights/weight_0": bytes(50 * 2**20)}
    path = write_members(tmp_path / "a.pt2", bomb, compression=zipfile.ZIP_DEFLATED)
    refuse(path, "archive_compressed")


def test_archives_that_readers_see_differently_are_refused(valid: Path, tmp_path: Path) -> None:
    raw = valid.read_bytes()
    cases = {
        "prepended": b"MZ" + raw,
        "prepended zip": write_members(tmp_path / "other.zip", {"x": b"y"}).read_bytes() + raw,
        "trailing": raw + b"x",
        "comment": raw[:-2] + b"\x04\x00evil",
        "two directories": raw + raw,
        "truncated": raw[: len(raw) // 2],
        "cut directory": raw[:-30],
        "flipped": raw.replace(b"PK\x01\x02", b"PK\x01\x03", 1),
        "seven zip": b"7z\xbc\xaf\x27\x1c" + raw,
    }
    for name, content in cases.items():
        path = tmp_path / "a.pt2"
        path.write_bytes(content)
        error = refuse(path)
        assert error.code in ("archive_damaged", "not_a_model", "format_compressed", "format_zip", "file_cut_off"), (
            name,
            error.code,
        )


def test_duplicate_members_are_refused(members: Members, tmp_path: Path) -> None:
    # A writer that makes this exists nowhere: rename a member inside the finished bytes.
    path = write_members(tmp_path / "a.pt2", {**members, "models/mode2.json": members[MODEL]})
    path.write_bytes(path.read_bytes().replace(b"models/mode2.json", b"models/model.json"))
    refuse(path, "archive_duplicate_member")


@pytest.mark.parametrize(
    "text",
    [
        b'{"config": {}, "config": {}}',
        b'{"config": {"a": NaN}}',
        b'{"config": 1e999}',
        b'{"config": ' + b"9" * 100 + b"}",
        b"[" * 100_000,
        b'{"config": {}} x',
        b"\xff\xfe",
        b"[]",
        b"",
    ],
)
def test_json_that_is_not_plain_is_refused(members: Members, tmp_path: Path, text: bytes) -> None:
    refuse(write_members(tmp_path / "a.pt2", {**members, CONSTANTS: text}), "bad_structure")


def test_other_formats_are_named(tmp_path: Path, marker: Path) -> None:
    model = nn.Linear(2, 2)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    (tmp_path / "evil.pt").write_bytes(evil_pickle(marker))
    torch.save(Payload(marker), tmp_path / "zipped.pt")
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    (tmp_path / "a.onnx").write_bytes(b"\x08\x08\x12\x07pytorch\x1a\x052.13.0" + bytes(100))
    (tmp_path / "random").write_bytes(random.Random(0).randbytes(4096))
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "text.pt2").write_text("hello, this is not a model")
    write_members(tmp_path / "archive.zip", {"constants.pkl": b"", "code/x.py": b"", "data.pkl": b""})
    expected = {
        "state.pt": "format_pickle", "evil.pt": "format_pickle", "zipped.pt": "format_pickle",
        "a.safetensors": "format_safetensors", "a.onnx": "format_onnx", "random": "not_a_model", "empty": "not_a_model",
        "text.pt2": "not_a_model", "archive.zip": "format_torchscript",
    }  # fmt: skip
    for name, code in expected.items():
        error = refuse(tmp_path / name, code)
        assert "torch.export.export(" in error.fix
        assert "torch.export.save(" in error.fix
    assert not marker.exists()
