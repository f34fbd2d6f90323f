"""Training that simulates integers: the file computes what was simulated, and recovers what rounding broke."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from app.recipes.data import Data
from app.recipes.quantization import QuantizeAwareTraining, QuantizeInt8
from tests.engine.digits import DATASET_ID, Convolutions, Rows, make_uploads
from worker.engine.errors import RecipeRefused
from worker.engine.measure.runtimes import open_model
from worker.engine.programs.intake import open_program
from worker.engine.programs.program import FileProgram, Program
from worker.engine.quantization.fake_quantization import FakeActivation, FakeWeights, convert
from worker.engine.techniques import quantize_int8
from worker.engine.techniques.base import Context, Outcome
from worker.engine.techniques.quantize_aware_training import inspect, run
from worker.engine.training.examples import BoundExamples, open_examples
from worker.engine.training.quality import evaluate, evaluate_module


def prepare(module: nn.Module, directory: Path) -> tuple[Program, BoundExamples]:
    uploads = make_uploads(module, directory)
    (directory / "work").mkdir()
    program = open_program(uploads.model, directory / "work")
    data = Data.model_validate(
        {
            "dataset_id": DATASET_ID,
            "task": "classification",
            "label_column": "label",
            "inputs": {"image": {"column": "image", "scale": 1 / 16}},
        }
    )
    files: Any = {DATASET_ID: (uploads.data, "npz")}
    return program, open_examples(data, files, program.signature, 0, directory)


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, BoundExamples]:
    torch.manual_seed(0)
    return prepare(Convolutions(), tmp_path_factory.mktemp("cnn"))


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, BoundExamples]:
    torch.manual_seed(0)
    return prepare(Rows(), tmp_path_factory.mktemp("rows"))


def train(program: Program, examples: BoundExamples, directory: Path, **spec: Any) -> tuple[Outcome, FileProgram]:
    torch.set_num_threads(1)
    step = QuantizeAwareTraining.model_validate(
        {"kind": "quantize_aware_training", "epochs": 1, "num_calibration_examples": 64, **spec}
    )
    directory.mkdir(exist_ok=True)
    outcome = run(program, step, Context(0, 1, directory, examples, lambda *_, **__: None))
    assert isinstance(outcome.program, FileProgram)
    return outcome, outcome.program


@pytest.mark.parametrize("name", ["cnn", "transformer"])
def test_the_file_computes_what_was_simulated(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    program, examples = request.getfixturevalue(name)
    program.module.eval()
    state = {key: value.clone() for key, value in program.module.state_dict().items()}
    outcome, result = train(program, examples, tmp_path)
    difference = outcome.facts["difference_from_simulation"]
    assert isinstance(difference, float)
    # A value on the edge between two codes may fall to either side: one code of 256, seldom.
    assert difference < 0.01
    before = evaluate_module(program.module, examples, 64)
    quality = evaluate(open_model(result.path, "onnxruntime", result.signature, 1), examples)
    assert quality.value > before.value - 0.03
    stored = {each.name: numpy_helper.to_array(each) for each in onnx.load(result.path).graph.initializer}
    integers = sum(each.size for each in stored.values() if each.dtype == np.int8)
    assert integers > 0.9 * sum(each.size for each in stored.values())
    assert outcome.facts["layers_quantized"] == len(inspect(program).layers)
    for key, value in program.module.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=0)
    assert len(outcome.sensitivity) == outcome.facts["layers_quantized"]
    assert all(0 < each.effect < 0.1 for each in outcome.sensitivity)


def test_pruned_weights_are_zero_codes(cnn: tuple[Program, BoundExamples], tmp_path: Path) -> None:
    program = cnn[0].copy()
    program.masks["hidden.weight"] = torch.rand(64, 256) > 0.5
    program.apply_masks()
    _, result = train(program, cnn[1], tmp_path)
    codes = [numpy_helper.to_array(each) for each in onnx.load(result.path).graph.initializer]
    hidden = next(each for each in codes if each.dtype == np.int8 and each.shape == (256, 64))
    assert not hidden.T[~program.masks["hidden.weight"].numpy()].any()
    assert hidden.any()


def test_the_file_has_the_trained_ranges(cnn: tuple[Program, BoundExamples], tmp_path: Path, monkeypatch: Any) -> None:
    from worker.engine.techniques import quantize_aware_training

    seen: list[Any] = []

    def convert_and_keep(module: Any) -> Any:
        seen.append(module)
        return convert(module)

    monkeypatch.setattr(quantize_aware_training, "convert", convert_and_keep)
    _, result = train(*cnn, tmp_path)
    trained = sorted(np.float32(each.grid()[0]) for each in seen[0].modules() if isinstance(each, FakeActivation))
    model = onnx.load(result.path)
    constants = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    stored = sorted(np.float32(constants[n.input[1]]) for n in model.graph.node if n.op_type == "QuantizeLinear")
    assert stored == trained


def test_training_recovers_what_per_tensor_rounding_broke(cnn: tuple[Program, BoundExamples], tmp_path: Path) -> None:
    program, examples = cnn[0].copy(), cnn[1]
    with torch.no_grad():
        # The same function, with channels of very different size: one scale for all cannot hold them.
        factors = torch.logspace(0, 4.5, 64)
        program.module.get_submodule("second.1").weight.div_(factors)  # type: ignore[operator]
        program.module.get_submodule("second.1").bias.div_(factors)  # type: ignore[operator]
        program.module.hidden.weight.mul_(factors.repeat_interleave(4))  # type: ignore[union-attr, operator]
    (tmp_path / "static").mkdir()
    step = QuantizeInt8.model_validate({"kind": "quantize_int8", "mode": "static", "per_channel": False})
    static = quantize_int8.run(program, step, Context(0, 1, tmp_path / "static", examples, lambda *_, **__: None))
    assert isinstance(static.program, FileProgram)
    broken = evaluate(open_model(static.program.path, "onnxruntime", program.signature, 1), examples).value
    _, result = train(program, examples, tmp_path / "qat", per_channel=False, epochs=6, learning_rate=3e-3)
    recovered = evaluate(open_model(result.path, "onnxruntime", program.signature, 1), examples).value
    print(f"static {broken:.3f}, trained {recovered:.3f}")
    assert recovered > broken + 0.1


def test_unknown_layers_are_refused(cnn: tuple[Program, BoundExamples], tmp_path: Path) -> None:
    with pytest.raises(RecipeRefused, match="nope"):
        train(*cnn, tmp_path, skip_layers=["nope"])


def test_ranges_are_learned_in_bf16_too() -> None:
    activation = FakeActivation()
    activation(torch.tensor([-1.0, 3.0], dtype=torch.bfloat16))
    assert (float(activation.low), float(activation.high)) == (-1.0, 3.0)


def test_simulated_values_are_on_the_grid_and_gradients_stop_outside() -> None:
    torch.manual_seed(0)
    activation = FakeActivation()
    activation.observe(torch.tensor([-1.0, 3.0]))
    scale, zero = activation.eval().grid()
    x = torch.linspace(-3, 5, 101, requires_grad=True)
    y = activation(x)
    codes = (y / scale + zero).detach()
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
    y.sum().backward()
    inside = (x.detach() >= -zero * scale) & (x.detach() <= (255 - zero) * scale)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, inside.float())
    layer = FakeWeights(nn.Linear(5, 3), bits=7, per_channel=True)
    assert int(layer.codes().abs().max()) == 64
    layer(torch.randn(2, 5)).sum().backward()
    assert layer.layer.weight.grad is not None
