"""Integer models: really integer, small, right on real digits, the same bytes every time."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from sklearn.datasets import load_digits
from torch import nn

from app.recipes.data import Data
from app.recipes.quantization import QuantizeInt8
from tests.engine.zoo import export_model
from worker.engine.errors import RecipeRefused, StepFailed
from worker.engine.measure.runtimes import open_model
from worker.engine.programs.intake import open_program
from worker.engine.programs.program import OnnxProgram, Program
from worker.engine.quantization.layers import find_layers
from worker.engine.techniques.base import Context, Outcome
from worker.engine.techniques.quantize_int8 import inspect, run
from worker.engine.training.examples import BoundExamples, open_examples
from worker.engine.training.quality import evaluate, evaluate_module

ID = "dst_" + "a" * 26


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def load(name: str, directory: Path, **options: Any) -> Program:
    export_model(name, directory / f"{name}.pt2", **options)
    (directory / "work").mkdir(exist_ok=True)
    return open_program(directory / f"{name}.pt2", directory / "work")


def random_examples(program: Program, directory: Path, rows: int = 48) -> BoundExamples:
    inputs = program.example_inputs(program.signature.batch_size or rows, seed=1)
    copies = -(-rows // len(inputs[0]))
    names = [tensor.name for tensor in program.signature.inputs]
    table = {f"c{i}": np.concatenate([tensor.numpy()] * copies) for i, tensor in enumerate(inputs)}
    np.savez(directory / "random.npz", **table)  # type: ignore[arg-type]
    data = Data.model_validate(
        {"dataset_id": ID, "inputs": {name: {"column": f"c{i}"} for i, name in enumerate(names)}}
    )
    return open_examples(data, {ID: (directory / "random.npz", "npz")}, program.signature, 0, directory)


def quantize(
    program: Program, directory: Path, examples: BoundExamples | None = None, **spec: Any
) -> tuple[Outcome, OnnxProgram]:
    directory.mkdir(exist_ok=True)
    context = Context(0, 1, directory, examples, lambda *_, **__: None)
    step = QuantizeInt8.model_validate({"kind": "quantize_int8", "num_calibration_examples": 32, **spec})
    outcome = run(program, step, context)
    assert isinstance(outcome.program, OnnxProgram)
    return outcome, outcome.program


def int8_share(path: Path) -> float:
    tensors = onnx.load(path).graph.initializer
    integers = sum(
        int(np.prod(t.dims)) for t in tensors if t.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    )
    return integers / sum(int(np.prod(t.dims)) for t in tensors)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, BoundExamples]:
    """Return a wide MLP trained on handwritten digits, imported from its file, and the data."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("digits")
    data = load_digits()
    x, y = (data.data / 16).astype(np.float32), data.target
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y)).backward()
        optimizer.step()
    exported = torch.export.export(
        model.eval(), (torch.from_numpy(x[:4]),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    torch.export.save(exported, directory / "digits.pt2")
    (directory / "work").mkdir()
    program = open_program(directory / "digits.pt2", directory / "work")
    np.savez(directory / "digits.npz", x=x, y=y)
    spec = Data.model_validate(
        {
            "dataset_id": ID,
            "task": "classification",
            "label_column": "y",
            "inputs": {program.signature.inputs[0].name: {"column": "x"}},
        }
    )
    return program, open_examples(spec, {ID: (directory / "digits.npz", "npz")}, program.signature, 0, directory)


@pytest.mark.parametrize(
    "spec",
    [
        {"mode": "dynamic"},
        {"mode": "dynamic", "per_channel": False},
        {"mode": "static"},
        {"mode": "static", "calibration": "entropy"},
        {"mode": "static", "calibration": "percentile", "per_channel": False},
    ],
    ids=lambda spec: "-".join(map(str, spec.values())),
)
def test_digits_stay_recognized_in_a_third_of_the_size(
    spec: dict[str, Any], digits: tuple[Program, BoundExamples], tmp_path: Path
) -> None:
    program, examples = digits
    before = evaluate_module(program.module, examples, 64)
    outcome, result = quantize(program, tmp_path, examples, **spec)
    after = evaluate(open_model(result.path, "onnxruntime", result.signature, 1), examples)
    assert before.value > 0.9
    assert after.value > before.value - 0.02
    assert result.path.stat().st_size < 0.35 * (tmp_path / "float.onnx").stat().st_size
    assert int8_share(result.path) > 0.95
    assert outcome.facts["layers_quantized"] == 3
    cosine = outcome.facts["cosine_with_float"]
    assert isinstance(cosine, float)
    assert 0.98 < cosine < 1.0
    weights = [numpy_helper.to_array(tensor) for tensor in onnx.load(result.path).graph.initializer]
    assert result.parameters == sum(weight.size for weight in weights)
    assert result.nonzero_parameters == sum(int(np.count_nonzero(weight)) for weight in weights)


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_the_same_seed_gives_the_same_bytes(mode: str, digits: tuple[Program, BoundExamples], tmp_path: Path) -> None:
    program, examples = digits
    digests = [
        hashlib.sha256(quantize(program, tmp_path / part, examples, mode=mode)[1].path.read_bytes()).hexdigest()
        for part in ("one", "two")
    ]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_each_channel_has_its_scale_only_if_asked(
    mode: str, digits: tuple[Program, BoundExamples], tmp_path: Path
) -> None:
    for per_channel in (True, False):
        _, made = quantize(digits[0], tmp_path / str(per_channel), digits[1], mode=mode, per_channel=per_channel)
        initializers = onnx.load(made.path).graph.initializer
        scales = [each for each in initializers if "weight" in each.name and each.name.endswith("_scale")]
        assert len(scales) == 3
        assert all((int(np.prod(each.dims)) > 1) is per_channel for each in scales)


def test_each_calibration_chooses_other_ranges(digits: tuple[Program, BoundExamples], tmp_path: Path) -> None:
    files = set()
    # Entropy comes to the whole range for as few values as these.
    for calibration in ("minmax", "percentile"):
        _, made = quantize(digits[0], tmp_path / calibration, digits[1], mode="static", calibration=calibration)
        files.add(made.path.read_bytes())
    assert len(files) == 2


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_pruned_weights_stay_zero(mode: str, digits: tuple[Program, BoundExamples], tmp_path: Path) -> None:
    original, examples = digits
    program = original.copy()
    weight = program.module.get_parameter("2.weight")
    program.masks["2.weight"] = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) > 0.8
    program.apply_masks()
    _, result = quantize(program, tmp_path, examples, mode=mode)
    quantized = [
        numpy_helper.to_array(tensor)
        for tensor in onnx.load(result.path).graph.initializer
        if list(tensor.dims) == [256, 256] and tensor.data_type == onnx.TensorProto.INT8
    ]
    assert len(quantized) == 1
    mask = program.masks["2.weight"].numpy()
    assert any(not np.any(array[~mask]) for array in (quantized[0], quantized[0].T))


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_skipped_layers_stay_in_floating_point(
    mode: str, digits: tuple[Program, BoundExamples], tmp_path: Path
) -> None:
    program, examples = digits
    outcome, result = quantize(program, tmp_path, examples, mode=mode, skip_layers=["2"])
    assert outcome.facts["layers_quantized"] == 2
    assert any("floating point: 2." in warning for warning in outcome.warnings)
    floats = [t for t in onnx.load(result.path).graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    assert [t.name for t in floats if int(np.prod(t.dims)) == 256 * 256] != []
    with pytest.raises(RecipeRefused, match="nope"):
        quantize(program, tmp_path, examples, skip_layers=["nope"])
    with pytest.raises(StepFailed) as caught:
        quantize(program, tmp_path, examples, mode=mode, skip_layers=["0", "2", "4"])
    assert caught.value.code == "nothing_quantized"


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("name", ["cnn", "mobilenet", "vit", "gpt"])
def test_every_family_is_quantized_statically(name: str, dynamic: bool, tmp_path: Path) -> None:
    program = load(name, tmp_path, dynamic=dynamic)
    outcome, result = quantize(program, tmp_path / "out", random_examples(program, tmp_path), mode="static")
    layers = {n for n, layer in program.module.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}
    assert outcome.facts["layers_quantized"] == len(layers)
    cosine = outcome.facts["cosine_with_float"]
    assert isinstance(cosine, float)
    assert cosine > 0.98
    assert set(find_layers(onnx.load(tmp_path / "out" / "float.onnx"), program).values()) >= layers
    assert result.signature == program.signature


def test_dynamic_mode_leaves_convolutions_and_says_so(tmp_path: Path) -> None:
    program = load("cnn", tmp_path)
    outcome, _ = quantize(program, tmp_path / "out")
    assert outcome.facts["layers_quantized"] == 2
    assert any("features.0, features.4" in warning for warning in outcome.warnings)
    capability = inspect(program)
    assert capability.applicable
    assert capability.missing is not None
    assert "convolutions" in capability.missing


# torch.export swaps the flat weight list of recurrent layers while it traces.
@pytest.mark.filterwarnings("ignore:The tensor attributes? .* assigned during export:UserWarning")
def test_lstm_is_quantized_dynamically(tmp_path: Path) -> None:
    program = load("lstm", tmp_path)
    outcome, result = quantize(program, tmp_path / "out")
    assert outcome.facts["layers_quantized"] == 2
    assert "DynamicQuantizeLSTM" in {node.op_type for node in onnx.load(result.path).graph.node}
    assert any("embedding" in warning for warning in outcome.warnings)


def test_a_model_without_linear_layers_fails_with_advice(tmp_path: Path) -> None:
    program = load("unet", tmp_path)
    with pytest.raises(StepFailed, match="quantized none") as caught:
        quantize(program, tmp_path / "out")
    assert "static" in caught.value.fix
