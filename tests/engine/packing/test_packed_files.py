"""Packed files: every family of model round-trips exactly, runs without Pare, and damage is refused, not executed."""

import lzma
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.zoo import export_model
from worker.engine import load
from worker.engine.measure.size import count_packed_bytes
from worker.engine.packing.encodings import Codebook
from worker.engine.packing.streams import pack_varint
from worker.engine.programs.export_onnx import export_onnx
from worker.engine.programs.export_packed import export_packed
from worker.engine.programs.intake import open_program
from worker.engine.programs.program import Program
from worker.engine.quantization.rounding import round_to_fixed, round_to_float, round_to_groups

torch.set_num_threads(1)


def open_zoo(name: str, directory: Path) -> Program:
    export_model(name, directory / "model.pt2")
    (directory / "scratch").mkdir()
    program = open_program(directory / "model.pt2", directory / "scratch")
    program.module.eval()
    return program


def run(model: bytes, program: Program) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (expected, actual) of each output."""
    inputs = program.example_inputs(3)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    used = {each.name for each in session.get_inputs()}
    names = [each.name for each in program.signature.inputs]
    feed = {name: value.numpy() for name, value in zip(names, inputs, strict=True) if name in used}
    outputs = session.run([each.name for each in program.signature.outputs], feed)
    with torch.inference_mode():
        expected = program.module(*inputs)
    return [(one.numpy(), other) for one, other in zip(expected, outputs, strict=True)]


def code_everything(program: Program) -> None:
    """Put the weights into all the encodings there are, in turn, and prune one that has none."""
    weights = [(name, each) for name, each in program.module.named_parameters() if each.ndim >= 2]
    for number, (name, parameter) in enumerate(weights):
        match number % 6:
            case 0:
                parameter.data[parameter.abs() < parameter.abs().median()] = 0
            case 1:
                indices = (torch.arange(parameter.numel()) % 3).to(torch.uint8).reshape(parameter.shape)
                program.encode(name, Codebook(indices, torch.tensor([[0.0, -0.1, 0.2]]), parameter.shape[0]))
            case 2:
                program.encode(name, round_to_groups(parameter, 4, 32, symmetric=True))
            case 3:
                program.encode(name, round_to_groups(parameter, 3, 16, symmetric=False))
            case 4:
                program.encode(name, round_to_float(parameter, "fp8_e4m3"))
            case 5:
                program.encode(name, round_to_fixed(parameter, 10, None))


@pytest.mark.parametrize("name", ["cnn", "lstm", "gpt", "two_tower"])
def test_models_round_trip_exactly_and_run(name: str, tmp_path: Path) -> None:
    program = open_zoo(name, tmp_path)
    code_everything(program)
    path = tmp_path / "model.packed"
    export_packed(program, path)
    _, weights, tied = load.read_packed(path.read_bytes())
    state = program.module.state_dict()
    for weight, array in weights.items():
        np.testing.assert_array_equal(array, state[weight].numpy())
    assert {*weights, *tied} >= {weight for weight, _ in program.module.named_parameters(remove_duplicate=False)}
    for expected, actual in run(load.unpack(path.read_bytes()), program):
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4)
    export_packed(program, tmp_path / "again.packed")
    assert path.read_bytes() == (tmp_path / "again.packed").read_bytes()


def test_weights_make_up_the_file_but_for_graph_and_index(tmp_path: Path) -> None:
    program = open_zoo("cnn", tmp_path)
    code_everything(program)
    export_packed(program, tmp_path / "model.packed")
    size = (tmp_path / "model.packed").stat().st_size
    reader = load._Reader((tmp_path / "model.packed").read_bytes(), len(load.MAGIC))
    reader.read_number()
    header = reader.read_number() + reader.position
    assert count_packed_bytes(program) == pytest.approx(size - header, abs=200)
    assert header < 1000


def test_what_is_unpacked_is_an_ordinary_onnx_file(tmp_path: Path) -> None:
    program = open_zoo("cnn", tmp_path)
    export_packed(program, tmp_path / "model.packed")
    export_onnx(program, tmp_path / "model.onnx")
    model = onnx.load_from_string(load.unpack((tmp_path / "model.packed").read_bytes()))
    onnx.checker.check_model(model, full_check=True)
    assert [each.name for each in model.graph.output] == [each.name for each in program.signature.outputs]
    assert (tmp_path / "model.packed").stat().st_size < (tmp_path / "model.onnx").stat().st_size


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    directory = tmp_path_factory.mktemp("packed")
    program = open_zoo("mlp", directory)
    code_everything(program)
    export_packed(program, directory / "model.packed")
    return (directory / "model.packed").read_bytes()


@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), cut=st.booleans())
@settings(max_examples=150, deadline=None)
def test_damaged_files_raise_value_errors_or_are_harmless(packed: bytes, place: float, value: int, cut: bool) -> None:
    position = int(place * len(packed))
    damaged = packed[:position] if cut else packed[:position] + bytes([value]) + packed[position + 1 :]
    try:
        _, weights, _ = load.read_packed(damaged)
    except ValueError:
        return
    assert not cut
    assert sum(each.nbytes for each in weights.values()) < 1 << 20


def hostile(shape: tuple[int, ...], coding: int, body: bytes, *, size: int | None = None) -> bytes:
    header = b"".join(
        (pack_varint(0), pack_varint(1), b"w", bytes([1, coding, len(shape)]), *map(pack_varint, shape), pack_varint(0))
    )
    compressed = lzma.compress(header, lzma.FORMAT_RAW, filters=[load.LZMA_FILTER])
    return load.MAGIC + pack_varint(size or len(header)) + pack_varint(len(compressed)) + compressed + body


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"PK\x03\x04", "does not begin with PAREPK01"),
        (hostile((1 << 40,), 0, b"\x00\x00" * 4), "too many"),
        (hostile((1 << 20, 1 << 20), 2, b"\x01\x10"), "too many"),
        (hostile((4,), 0, b"\x00\x00" * 4, size=1 << 50), "too many"),
        (hostile((4,), 9, b""), "unknown way 9"),
        (hostile((4,), 0, b"\x00\x00" * 5), "left over"),
        (hostile((4,), 0, b"\x00\x00\x81"), "ends too early"),
        (hostile((4,), 2, b"\x01\x02\x81\xff\x00\x00"), "ends too early|outside|form"),
        (hostile((1 << 20, 2), 2, b"\x01\xff\x01\x00\x00"), "codebooks are too large"),
        (hostile((4,), 3, b"\x04\x00"), "no bits or no weights"),
        (hostile((4,), 4, b"\x07"), "format is unknown"),
        (hostile((4, 4), 1, b"\x01\x03\x00\x02\x05"), "not n of m"),
    ],
)
def test_hostile_files_are_refused_before_anything_is_allocated(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        load.read_packed(data)
