"""Every model family: imported outputs equal the original's, training works, and all exports load and agree."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.engine.zoo import ZOO, export_model, make_model
from worker.engine.programs.export_onnx import export_onnx
from worker.engine.programs.export_pt2 import export_pt2
from worker.engine.programs.export_safetensors import export_safetensors
from worker.engine.programs.intake import open_program
from worker.engine.programs.original_names import restore_state
from worker.engine.programs.program import Program

MODE_FREE = {"mlp", "two_tower"}


def evaluate(module: torch.nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    module.eval()
    with torch.no_grad():
        return list(module(*inputs))


def assert_equal(left: list[Tensor], right: list[Tensor], tolerance: float = 0.0) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def train_step(program: Program, batch_size: int) -> None:
    module = program.module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    sum(output.square().mean() for output in module(*program.example_inputs(batch_size, seed=1))).backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("dynamic", "training"), [(False, False), (True, False), (True, True)], ids=["static", "dynamic", "dynamic-train"]
)
@pytest.mark.parametrize("name", ZOO)
def test_imported_outputs_equal_and_training_changes_the_weights(
    name: str, dynamic: bool, training: bool, tmp_path: Path
) -> None:
    model = export_model(name, tmp_path / "model.pt2", dynamic=dynamic, training=training)
    program = open_program(tmp_path / "model.pt2", tmp_path)
    batch_size = 7 if dynamic else 4
    torch.manual_seed(1)
    inputs, keywords = ZOO[name].inputs(batch_size), ZOO[name].keywords(batch_size)
    with torch.no_grad():
        expected = pytree.tree_leaves(model(*inputs, **keywords))
    assert_equal(evaluate(program.module, tuple(pytree.tree_leaves((inputs, keywords)))), expected)

    names = set(restore_state(program.module.state_dict(), program))
    assert names == set(model.state_dict())
    assert program.exported_in == ("train" if training and name not in MODE_FREE else "eval")
    assert program.signature.batch_size == (None if dynamic else 4)
    first = program.signature.inputs[0].shape[0]
    assert first == ("batch" if dynamic else 4)

    before = {key: value.clone() for key, value in program.module.state_dict().items()}
    train_step(program, batch_size)
    changed = {key for key, value in program.module.state_dict().items() if not torch.equal(value, before[key])}
    trainable = {key for key, _ in program.module.named_parameters(remove_duplicate=False)}
    # A bias before a norm has no influence on the outputs, one of attention's keys neither.
    assert len(changed & trainable) > 0.7 * len(trainable)
    counters = {key for key in before if key.endswith("num_batches_tracked")}
    assert all(program.module.state_dict()[key] == before[key] + 1 for key in counters)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.long] if name in ("gru_deep", "unet") else [])
        for name in sorted(set(ZOO) - {"mlp", "lstm", "gru"})  # the deep recurrent ones have all of it
    ],
)
def test_exports_load_and_agree(name: str, tmp_path: Path) -> None:
    export_model(name, tmp_path / "model.pt2")
    program = open_program(tmp_path / "model.pt2", tmp_path)
    train_step(program, 4)
    inputs = program.example_inputs(3, seed=2)
    expected = evaluate(program.module, inputs)

    export_pt2(program, tmp_path / "result.pt2")
    (tmp_path / "again").mkdir()
    again = open_program(tmp_path / "result.pt2", tmp_path / "again")
    assert again.signature == program.signature
    assert again.tied == program.tied
    assert_equal(evaluate(again.module, inputs), expected)
    for size in (1, 3):
        batch = program.example_inputs(size, seed=2)
        loaded = torch.export.load(tmp_path / "result.pt2").module()
        with torch.no_grad():
            assert_equal(list(loaded(*batch)), evaluate(program.module, batch), 1e-6)

    export_onnx(program, tmp_path / "result.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "result.onnx", providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == [facts.name for facts in program.signature.inputs]
    assert [value.name for value in session.get_outputs()] == [facts.name for facts in program.signature.outputs]
    assert session.get_inputs()[0].shape[0] == "batch"
    for size in (1, 3):
        batch = program.example_inputs(size, seed=2)
        found = session.run(
            None, {facts.name: value.numpy() for facts, value in zip(program.signature.inputs, batch, strict=True)}
        )
        for value, other in zip(found, evaluate(program.module, batch), strict=True):
            np.testing.assert_allclose(value, other.numpy(), atol=2e-5, rtol=1e-5)

    export_safetensors(program, tmp_path / "result.safetensors")
    stored = load_file(tmp_path / "result.safetensors")
    state = restore_state(program.module.state_dict(), program)
    assert set(stored) == set(state) == set(torch.export.load(tmp_path / "result.pt2").state_dict)
    assert set(state) == set(make_model(name).state_dict()), "it can be loaded into the model's own code"
    assert all(torch.equal(stored[key], state[key]) for key in state)


@pytest.mark.parametrize("name", ["cnn", pytest.param("lstm", marks=pytest.mark.long)])
def test_the_same_program_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    export_model(name, tmp_path / "model.pt2")
    digests = []
    for attempt in ("one", "two"):
        directory = tmp_path / attempt
        directory.mkdir()
        program = open_program(tmp_path / "model.pt2", directory)
        export_pt2(program, directory / "result.pt2")
        export_onnx(program, directory / "result.onnx")
        export_safetensors(program, directory / "result.safetensors")
        digests.append([(directory / f"result.{kind}").read_bytes() for kind in ("pt2", "onnx", "safetensors")])
    assert digests[0] == digests[1]
    for content in digests[0][:2]:
        assert str(tmp_path).encode() not in content
        assert str(Path(torch.__file__).parent).encode() not in content
        assert b".py" not in content


def test_tied_weights_stay_one_tensor(tmp_path: Path) -> None:
    export_model("gpt", tmp_path / "model.pt2")
    program = open_program(tmp_path / "model.pt2", tmp_path)
    assert program.tied == (("tokens.weight", "head.weight"),)
    train_step(program, 4)
    copy = program.copy()
    for module in (program.module, copy.module):
        parameters = dict(module.named_parameters(remove_duplicate=False))
        assert parameters["tokens.weight"] is parameters["head.weight"]
    assert copy.module.get_parameter("head.weight") is not program.module.get_parameter("head.weight")


def test_a_copy_is_independent(tmp_path: Path) -> None:
    export_model("cnn", tmp_path / "model.pt2")
    program = open_program(tmp_path / "model.pt2", tmp_path)
    inputs = program.example_inputs(2)
    before = evaluate(program.module, inputs)
    train_step(program.copy(), 4)
    assert_equal(evaluate(program.module, inputs), before)


def test_dropout_follows_the_mode_after_import(tmp_path: Path) -> None:
    for training in (False, True):
        export_model("vit", tmp_path / "model.pt2", training=training)
        program = open_program(tmp_path / "model.pt2", tmp_path)
        inputs = program.example_inputs(4)
        one, two = evaluate(program.module, inputs), evaluate(program.module, inputs)
        assert_equal(one, two)
        program.module.train()
        with torch.no_grad():
            assert not torch.equal(program.module(*inputs)[0], program.module(*inputs)[0])


def test_names_of_several_inputs_and_outputs(tmp_path: Path) -> None:
    export_model("two_tower", tmp_path / "model.pt2")
    signature = open_program(tmp_path / "model.pt2", tmp_path).signature
    assert [facts.name for facts in signature.inputs] == ["first", "pair_0", "pair_1", "scale"]
    assert [facts.name for facts in signature.outputs] == ["score", "parts_0", "parts_1"]
    assert [facts.shape for facts in signature.outputs] == [("batch", 4), ("batch", 2), ("batch", 2)]
