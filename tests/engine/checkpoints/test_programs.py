"""A program written to a file and read back: the same outputs, the same training, the same structure, bit by bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from app.recipes.low_rank import FactorizeLowRank
from app.recipes.pruning import PruneStructured
from app.recipes.quantization import QuantizeFixed, QuantizeFloat, QuantizeInt4
from app.recipes.sharing import ShareWeights
from tests.engine.zoo import ZOO, export_model
from worker.engine.checkpoints.archive import NotRestorable, read_archive, write_archive
from worker.engine.checkpoints.programs import decode_program, encode_program
from worker.engine.checkpoints.values import decode, encode
from worker.engine.programs.intake import open_program
from worker.engine.programs.program import Program
from worker.engine.techniques import (
    factorize_low_rank,
    prune_structured,
    quantize_fixed,
    quantize_float,
    quantize_int4,
    share_weights,
)
from worker.engine.techniques.base import Context


def open_model(name: str, directory: Path) -> Program:
    export_model(name, directory / "model.pt2")
    return open_program(directory / "model.pt2", directory)


def write_and_read(program: Program, original: Program, directory: Path) -> Program:
    structure, tensors = encode_program(program)
    write_archive(directory / "program", {}, tensors)
    return decode_program(structure, read_archive(directory / "program")[1], original)


def train(program: Program) -> list[Tensor]:
    """Three steps with dropout and batch norm at work; return the outputs afterwards."""
    torch.manual_seed(3)
    module = program.module.train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    inputs = program.example_inputs(4, seed=1)
    for _ in range(3):
        optimizer.zero_grad()
        sum(output.square().mean() for output in module(*inputs) if output.is_floating_point()).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    module.eval()
    with torch.no_grad():
        return list(module(*inputs))


def assert_same(restored: Program, program: Program) -> None:
    assert restored.module.code == program.module.code
    assert list(restored.module.state_dict()) == list(program.module.state_dict())
    assert [name for name, _ in restored.module.named_parameters()] == [
        name for name, _ in program.module.named_parameters()
    ]
    assert [repr(each) for each in restored.module.modules()][1:] == [repr(each) for each in program.module.modules()][
        1:
    ]
    assert restored.tied == program.tied
    assert {name: mask.tolist() for name, mask in restored.masks.items()} == {
        name: mask.tolist() for name, mask in program.masks.items()
    }
    for name, encoding in program.encodings.items():
        assert type(restored.encodings[name]) is type(encoding)
        assert torch.equal(restored.encodings[name].decode(), encoding.decode())
    for one, other in zip(train(restored), train(program), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ZOO)
def test_every_family_trains_on_as_if_nothing_had_happened(name: str, tmp_path: Path) -> None:
    program = open_model(name, tmp_path)

    assert_same(write_and_read(program, program, tmp_path), program)


STEPS: dict[str, tuple[Any, Any, str]] = {
    "prune_structured": (prune_structured, PruneStructured(kind="prune_structured", ratio=0.5, round_to=4), "cnn"),
    "prune_structured of a view": (prune_structured, PruneStructured(kind="prune_structured", round_to=1), "vit"),
    "factorize_low_rank": (factorize_low_rank, FactorizeLowRank(kind="factorize_low_rank"), "resnet20"),
    "share_weights": (share_weights, ShareWeights(kind="share_weights"), "cnn"),
    "quantize_int4": (quantize_int4, QuantizeInt4(kind="quantize_int4"), "vit"),
    "quantize_float": (quantize_float, QuantizeFloat(kind="quantize_float"), "gpt"),
    "quantize_fixed": (quantize_fixed, QuantizeFixed(kind="quantize_fixed"), "mlp"),
}


@pytest.mark.parametrize("case", STEPS)
def test_what_steps_made_of_a_program_comes_back(case: str, tmp_path: Path) -> None:
    technique, step, name = STEPS[case]
    original = open_model(name, tmp_path)
    context = Context(0, 1, tmp_path, None, lambda *_, **__: None)
    program = technique.run(original.copy(), step, context).program

    assert_same(write_and_read(program, original, tmp_path), program)


def test_masks_and_shared_parameters_come_back(tmp_path: Path) -> None:
    program = open_model("gpt", tmp_path)
    name, parameter = next((n, p) for n, p in program.module.named_parameters() if p.ndim == 2)
    program.masks[name] = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    program.apply_masks()
    next(program.module.parameters()).requires_grad_(False)

    restored = write_and_read(program, program, tmp_path)

    assert [each.requires_grad for each in restored.module.parameters()] == [
        each.requires_grad for each in program.module.parameters()
    ]
    parameters = dict(restored.module.named_parameters(remove_duplicate=False))
    for group in program.tied:
        assert len({id(parameters[each]) for each in group}) == 1
    assert_same(restored, program)


def test_names_are_those_of_the_program_that_was_written(tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    teacher, student = open_model("mlp", tmp_path / "teacher"), open_model("encoder_decoder", tmp_path)
    assert student.renamed
    assert student.joined

    restored = write_and_read(student, teacher, tmp_path)

    assert (restored.renamed, restored.joined) == (student.renamed, student.joined)


def test_tensors_that_share_memory_are_stored_once(tmp_path: Path) -> None:
    tensor = torch.randn(1000)
    written = write_archive(tmp_path / "a", {"text": "x"}, {"one": tensor, "two": tensor, "empty": torch.zeros(0, 3)})

    texts, tensors = read_archive(tmp_path / "a")

    assert texts == {"text": "x"}
    assert written.size_bytes < 5000
    assert torch.equal(tensors["two"], tensor)
    assert tensors["empty"].shape == (0, 3)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text"])
def test_a_damaged_file_is_refused(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_archive(path, {}, {"x": torch.randn(100)})
    data = path.read_bytes()
    flipped = data[:20] + bytes([data[20] ^ 0x80]) + data[21:]
    path.write_bytes({"truncated": data[:-1], "flipped": flipped, "empty": b"", "text": b"no checkpoint"}[damage])

    with pytest.raises(NotRestorable):
        read_archive(path)


@pytest.mark.parametrize(
    "node",
    [
        ["call_function", "x", "os.system", {"tuple": ["true"]}, {}],
        ["call_function", "x", "torch.ops.aten.from_file.default", {"tuple": ["/etc/passwd"]}, {}],
        ["call_function", "x", "torch.load", {"tuple": ["x"]}, {}],
        ["call_method", "x", "save", {"tuple": []}, {}],
        ["get_attr", "x", 'a")+exec("1', {"tuple": []}, {}],
        ["placeholder", "x=exec('1')", "x", {"tuple": []}, {}],
        ["call_function", "x", "torch.ops.aten.relu.default", {"tuple": [{"node": "nobody"}]}, {}],
    ],
)
def test_a_graph_that_calls_anything_else_is_refused(node: list[Any], tmp_path: Path) -> None:
    program = open_model("mlp", tmp_path)
    structure, tensors = encode_program(program)
    structure["nodes"].insert(1, node)

    with pytest.raises(NotRestorable):
        decode_program(structure, tensors, program)


@pytest.mark.parametrize(
    "value",
    [None, True, 3, 2.5, float("inf"), "text", [1, (2, None)], slice(0, None, 2), torch.float32, torch.device("cpu"),
     torch.strided, torch.channels_last],
)  # fmt: skip
def test_plain_values_come_back(value: object) -> None:
    assert decode(encode(value), {}) == value


def test_unknown_values_are_refused() -> None:
    with pytest.raises(NotRestorable, match="object"):
        encode(object())
