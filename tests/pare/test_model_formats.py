"""`pare models upload` finds out what a file is, and asks for the architecture where the file does not say it."""

import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest

from pare.cli import run
from pare.resources import model_format


@pytest.fixture(autouse=True)
def address(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARE_URL", url)
    monkeypatch.setenv("COLUMNS", "200")


def write_zip(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"{}")
    return path


def write_weights(path: Path) -> Path:
    header = b'{"fc.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    return path


def write_onnx(path: Path) -> Path:
    path.write_bytes(b"\x08\x08\x12\x07pytorch\x3a\x00")
    return path


def test_the_content_says_the_format(tmp_path: Path) -> None:
    assert model_format(write_zip(tmp_path / "a.zip", "folder/config.json", "folder/model.safetensors")) == "hf"
    assert model_format(write_zip(tmp_path / "b.zip", "model/archive_format", "model/extra/config.json")) == "pt2"
    assert model_format(write_zip(tmp_path / "c.zip", "model/data/weights_config.json")) == "pt2"
    assert model_format(write_weights(tmp_path / "weights.bin")) == "safetensors"
    assert model_format(write_onnx(tmp_path / "net.bin")) == "onnx"
    (tmp_path / "empty.bin").write_bytes(b"")
    assert model_format(tmp_path / "empty.bin") == "pt2"


def test_a_zip_is_uploaded_as_a_hugging_face_folder(
    capsys: pytest.CaptureFixture[str], hands: Any, tmp_path: Path
) -> None:
    file = write_zip(tmp_path / "folder.zip", "config.json", "model.safetensors")
    assert run(["models", "upload", str(file), "--no-wait", "-o", "json"]) == 0
    model = json.loads(capsys.readouterr().out)
    assert (model["name"], model["format"], model["architecture"]) == ("folder", "hf", None)
    hands.check_model(model["id"])


def test_an_onnx_file_is_uploaded_as_one(capsys: pytest.CaptureFixture[str], hands: Any, tmp_path: Path) -> None:
    assert run(["models", "upload", str(write_onnx(tmp_path / "net.onnx")), "--no-wait", "-o", "json"]) == 0
    model = json.loads(capsys.readouterr().out)
    assert (model["name"], model["format"], model["architecture"]) == ("net", "onnx", None)
    hands.check_model(model["id"])


def test_weights_are_uploaded_with_their_architecture(
    capsys: pytest.CaptureFixture[str], hands: Any, tmp_path: Path
) -> None:
    upload = ["models", "upload", str(write_weights(tmp_path / "w.safetensors")), "--no-wait", "-o", "json"]
    assert run([*upload, "--architecture", "vit:heads=3"]) == 0
    model = json.loads(capsys.readouterr().out)
    assert (model["format"], model["architecture"]) == ("safetensors", "vit:heads=3")
    hands.check_model(model["id"])

    assert run(upload) == 2
    assert "pare models architectures" in json.loads(capsys.readouterr().err)["error"]["fix"]
    assert run([*upload, "--architecture", "vitt"]) == 4
    assert "did you mean 'vit'?" in capsys.readouterr().err


def test_the_architectures_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models", "architectures"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("resnet20 ") and "akamaster" in line for line in lines)
    assert run(["models", "architectures", "-o", "json"]) == 0
    assert "vit" in [item["name"] for item in json.loads(capsys.readouterr().out)["items"]]
