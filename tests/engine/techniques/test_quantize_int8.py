"""Integer models: really integer, small, right on real digits, the same bytes each time; options have effects."""

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from pydantic import ValidationError
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from app.recipes.quantization import QuantizeInt8
from tests.engine.techniques.opening import bind, load, open_module
from worker.engine.errors import RecipeRefused, StepFailed
from worker.engine.measure.runtimes import open_model
from worker.engine.programs.export_onnx import export_onnx
from worker.engine.programs.program import FileProgram, Program
from worker.engine.quantization import int8_onnx
from worker.engine.quantization.int8_grid import round_to_int8
from worker.engine.quantization.layers import find_layers
from worker.engine.techniques.base import Context, Outcome
from worker.engine.techniques.quantize_int8 import inspect, run
from worker.engine.training.examples import BoundExamples
from worker.engine.training.quality import evaluate, evaluate_module


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def random_examples(program: Program, directory: Path, rows: int = 48) -> BoundExamples:
    inputs = program.example_inputs(program.signature.batch_size or rows, seed=1)
    copies = -(-rows // len(inputs[0]))
    columns = {f"c{i}": np.concatenate([tensor.numpy()] * copies) for i, tensor in enumerate(inputs)}
    return bind(program, columns, directory)


def quantize(
    program: Program, directory: Path, examples: BoundExamples | None = None, **spec: Any
) -> tuple[Outcome, FileProgram]:
    directory.mkdir(exist_ok=True)
    context = Context(0, 1, directory, examples, lambda *_, **__: None)
    step = QuantizeInt8.model_validate({"kind": "quantize_int8", "num_calibration_examples": 32, **spec})
    outcome = run(program, step, context)
    assert isinstance(outcome.program, FileProgram)
    return outcome, outcome.program


def int8_share(path: Path) -> float:
    tensors = onnx.load(path).graph.initializer
    integers = sum(
        int(np.prod(t.dims)) for t in tensors if t.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    )
    return integers / sum(int(np.prod(t.dims)) for t in tensors)


def count_operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@dataclass
class Digits:
    program: Program
    examples: BoundExamples


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
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
        functional.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y)).backward()
        optimizer.step()
    program = open_module(model, (torch.from_numpy(x[:4]),), directory)
    examples = bind(program, {"x": x, "y": y}, directory, task="classification", label_column="y")
    return Digits(program, examples)


@pytest.fixture(scope="module")
def cnn(tmp_path_factory: pytest.TempPathFactory) -> Program:
    return load("cnn", tmp_path_factory.mktemp("cnn"))


EXPORTED: dict[int, tuple[Program, bytes]] = {}


@pytest.fixture(autouse=True)
def _export_each_program_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter takes a second or more and has tests of its own. No test changes a program after its export."""

    def export(program: Program, path: Path) -> None:
        if id(program) not in EXPORTED:
            export_onnx(program, path)
            EXPORTED[id(program)] = program, path.read_bytes()
        path.write_bytes(EXPORTED[id(program)][1])

    monkeypatch.setattr(int8_onnx, "export_onnx", export)


@pytest.mark.parametrize(
    "spec",
    [
        {"mode": "dynamic"},
        {"mode": "dynamic", "per_channel": False},
        {"mode": "dynamic", "per_row": "none"},
        {"mode": "weight_only"},
        {"mode": "weight_only", "per_channel": False},
        {"mode": "static"},
        {"mode": "static", "calibration": "entropy"},
        {"mode": "static", "calibration": "mse"},
        {"mode": "static", "calibration": "percentile", "per_channel": False},
    ],
    ids=lambda spec: "-".join(map(str, spec.values())),
)
def test_digits_stay_recognized_in_a_third_of_the_size(spec: dict[str, Any], digits: Digits, tmp_path: Path) -> None:
    before = evaluate_module(digits.program.module, digits.examples, 64)
    outcome, result = quantize(digits.program, tmp_path, digits.examples, **spec)
    after = evaluate(open_model(result.path, "onnxruntime", result.signature, 1), digits.examples)
    assert before.value > 0.9
    assert after.value > before.value - 0.02
    assert result.path.stat().st_size < 0.35 * (tmp_path / "float.onnx").stat().st_size
    assert int8_share(result.path) > 0.95
    assert outcome.facts["layers_quantized"] == 3
    cosine = outcome.facts["cosine_with_float"]
    assert isinstance(cosine, float)
    assert 0.98 < cosine < 1.0
    initializers = onnx.load(result.path).graph.initializer
    weights = [numpy_helper.to_array(tensor) for tensor in initializers]
    assert result.parameters == sum(weight.size for weight in weights)
    assert result.nonzero_parameters == sum(int(np.count_nonzero(weight)) for weight in weights)
    scales = [each for each in initializers if "weight" in each.name and each.name.endswith("_scale")]
    assert len(scales) == 3
    assert all((int(np.prod(each.dims)) > 1) is spec.get("per_channel", True) for each in scales)
    integer_operators = {"MatMulInteger", "QuantizeLinear"} & set(count_operators(result.path))
    assert bool(integer_operators) is (spec["mode"] != "weight_only")


@pytest.mark.parametrize("mode", ["dynamic", "static"])
def test_the_same_seed_gives_the_same_bytes(mode: str, digits: Digits, tmp_path: Path) -> None:
    digests = [
        hashlib.sha256(
            quantize(digits.program, tmp_path / part, digits.examples, mode=mode)[1].path.read_bytes()
        ).hexdigest()
        for part in ("one", "two")
    ]
    assert digests[0] == digests[1]


def test_each_calibration_chooses_other_ranges(digits: Digits, tmp_path: Path) -> None:
    x = (load_digits().data / 16).astype(np.float32)
    # Of 100,000 numbers three are twice as large as the rest: the only kind of range that 8 bits gain from cutting.
    x[[100, 200, 300], 0] = 2.0
    examples = bind(digits.program, {"x": x}, tmp_path)
    scales, files = {}, set()
    # Entropy comes to the whole range for as few values as these.
    for calibration in ("minmax", "percentile", "mse"):
        spec = {"mode": "static", "calibration": calibration, "num_calibration_examples": 1400}
        _, made = quantize(digits.program, tmp_path / calibration, examples, **spec)
        files.add(made.path.read_bytes())
        model = onnx.load(made.path)
        reader = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
        assert reader.input[0] == model.graph.input[0].name
        scale = next(each for each in model.graph.initializer if each.name == reader.input[1])
        scales[calibration] = float(numpy_helper.to_array(scale))
    assert scales["minmax"] == pytest.approx(2 / 255)
    assert 0.8 * scales["minmax"] < scales["mse"] < 0.99 * scales["minmax"]
    assert len(files) == 3


def test_rows_are_evened_out_only_where_asked(digits: Digits, tmp_path: Path) -> None:
    counts = {}
    for per_row in ("all", "narrowing", "none"):
        _, made = quantize(digits.program, tmp_path / per_row, per_row=per_row)
        counts[per_row] = count_operators(made.path)["ReduceMax"]
    # 64 -> 256 widens, 256 -> 256 does neither, 256 -> 10 narrows.
    assert counts == {"all": 3, "narrowing": 1, "none": 0}


def test_one_loud_row_does_not_coarsen_the_others(digits: Digits, tmp_path: Path) -> None:
    x = next(iter(digits.examples.evaluation_batches(16)))[0][0].numpy().copy()
    x[0] *= 100
    errors = {}
    for per_row in ("all", "none"):
        _, made = quantize(digits.program, tmp_path / per_row, per_row=per_row)
        expected, found = (
            np.asarray(open_model(path, "onnxruntime", made.signature, 1)((x,))[0][1:], np.float32)
            for path in (tmp_path / per_row / "float.onnx", made.path)
        )
        errors[per_row] = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    assert errors["all"] < 0.03
    assert errors["none"] > 10 * errors["all"]


def test_weight_only_computes_with_the_stored_weights(digits: Digits, tmp_path: Path) -> None:
    _, made = quantize(digits.program, tmp_path, mode="weight_only")
    rounded = digits.program.copy()
    with torch.no_grad():
        for layer in (each for each in rounded.module.modules() if isinstance(each, nn.Linear)):
            codes, scales = round_to_int8(layer.weight.numpy(), 0)
            layer.weight.copy_(torch.from_numpy(codes * scales))
    (x,) = rounded.example_inputs(8, seed=3)
    (found,) = open_model(made.path, "onnxruntime", made.signature, 1)((x.numpy(),))
    np.testing.assert_allclose(np.asarray(found, np.float32), rounded.module(x)[0].detach().numpy(), atol=1e-4)


@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_gptq_lowers_the_error(mode: str, digits: Digits, tmp_path: Path) -> None:
    spec = {"mode": mode, "rounding": "gptq", "num_calibration_examples": 512}
    outcome, _ = quantize(digits.program, tmp_path, digits.examples, **spec)
    assert outcome.facts["layers_rounded_by_gptq"] == 3
    before, after = (outcome.facts[f"output_error_{word}_rounded_by_gptq"] for word in ("before", "after"))
    assert isinstance(before, float)
    assert isinstance(after, float)
    # With 8 bits and exact activations the weights are the only error; else that of activations stays.
    assert after < (0.7 if mode == "weight_only" else 0.98) * before


def test_each_layer_on_integers_has_its_effect_and_no_other(digits: Digits, tmp_path: Path) -> None:
    outcome, _ = quantize(digits.program, tmp_path, digits.examples, skip_layers=["2"])
    effects = {each.layer: each for each in outcome.sensitivity}
    linear = {name for name, layer in digits.program.module.named_modules() if isinstance(layer, nn.Linear)}
    assert set(effects) == linear - {"2"}
    assert all(0 < each.effect < 0.01 and each.metric == "layer_output_error" for each in effects.values())
    weights = quantize(digits.program, tmp_path / "w", digits.examples, mode="weight_only", skip_layers=["2"])[0]
    assert all(0 < each.effect < effects[each.layer].effect for each in weights.sensitivity)


def test_gptq_is_refused_where_it_would_have_no_effect() -> None:
    for other in ({"mode": "static"}, {"correct_bias": True}):
        with pytest.raises(ValidationError, match="gptq"):
            QuantizeInt8.model_validate({"kind": "quantize_int8", "rounding": "gptq", **other})


def test_pruned_weights_stay_zero(digits: Digits, tmp_path: Path) -> None:
    program = digits.program.copy()
    weight = program.module.get_parameter("2.weight")
    program.masks["2.weight"] = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) > 0.8
    program.apply_masks()
    mask = program.masks["2.weight"].numpy()
    for mode in ("dynamic", "static", "weight_only"):
        _, result = quantize(program, tmp_path / mode, digits.examples, mode=mode)
        quantized = [
            numpy_helper.to_array(tensor)
            for tensor in onnx.load(result.path).graph.initializer
            if list(tensor.dims) == [256, 256] and tensor.data_type == onnx.TensorProto.INT8
        ]
        assert len(quantized) == 1
        assert quantized[0].any()
        assert any(not np.any(array[~mask]) for array in (quantized[0], quantized[0].T))


@pytest.mark.parametrize("mode", ["dynamic", "static", "weight_only"])
def test_skipped_layers_stay_in_floating_point(mode: str, digits: Digits, tmp_path: Path) -> None:
    outcome, result = quantize(digits.program, tmp_path, digits.examples, mode=mode, skip_layers=["2"])
    assert outcome.facts["layers_quantized"] == 2
    assert any("floating point: 2." in warning for warning in outcome.warnings)
    floats = [t for t in onnx.load(result.path).graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    assert [t.name for t in floats if int(np.prod(t.dims)) == 256 * 256] != []
    with pytest.raises(RecipeRefused, match="nope"):
        quantize(digits.program, tmp_path, digits.examples, skip_layers=["nope"])
    with pytest.raises(StepFailed) as caught:
        quantize(digits.program, tmp_path, digits.examples, mode=mode, skip_layers=["0", "2", "4"])
    assert caught.value.code == "nothing_quantized"


class Tokens(nn.Module):
    """Reads tokens with a mask; one feature is loud, as in trained transformers; padded positions hold noise."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.norm = nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        with torch.no_grad():
            self.norm.weight[3] = 40.0
            self.up.weight[:, 3] /= 40.0

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.table(input_ids)
        y: Tensor = x + self.down(functional.gelu(self.up(self.norm(x))))
        # Chaotic where the mask is zero.
        return torch.where(attention_mask[..., None] > 0, y, torch.sin(1e4 * y))


def test_tokens_smoothed_and_compared_without_padding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    ids, mask = torch.randint(50, (64, 12)), (torch.arange(12) < torch.randint(2, 12, (64, 1))).long()
    program = open_module(Tokens(), (ids[:4], mask[:4]), tmp_path)
    examples = bind(program, {"ids": ids.numpy(), "mask": mask.numpy()}, tmp_path)
    outcome, made = quantize(program, tmp_path / "out", examples, smoothing=0.5, per_row="none")
    cosine, before, after = (
        outcome.facts[name]
        for name in ("cosine_with_float", "output_error_before_smoothed", "output_error_after_smoothed")
    )
    assert isinstance(cosine, float)
    assert isinstance(before, float)
    assert isinstance(after, float)
    assert cosine > 0.99
    assert after < 0.7 * before
    assert outcome.facts["layers_smoothed"] == 2
    assert outcome.facts["layers_quantized"] == 3
    stored = {each.name: each.data_type for each in onnx.load(made.path).graph.initializer}
    assert stored["table.weight_quantized"] == onnx.TensorProto.INT8
    assert "table.weight" not in stored
    _, kept = quantize(program, tmp_path / "kept", examples, quantize_embeddings=False)
    assert "table.weight" in {each.name for each in onnx.load(kept.path).graph.initializer}


class Uneven(nn.Module):
    """Convolutions whose channels have very different ranges, which one scale per tensor cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3)
        factors = torch.logspace(0, 2.5, 8)
        with torch.no_grad():
            self.first.weight.mul_(factors[:, None, None, None])
            self.first.bias.mul_(factors)  # type: ignore[union-attr]
            self.second.weight.div_(factors[None, :, None, None])

    def forward(self, image: Tensor) -> Tensor:
        return self.second(functional.relu(self.norm(self.first(image)))).mean((2, 3))


def test_equalization_and_bias_correction_lower_the_error(tmp_path: Path) -> None:
    torch.manual_seed(0)
    image = torch.randn(64, 1, 8, 8)
    program = open_module(Uneven(), (image[:4],), tmp_path)
    examples = bind(program, {"x": image.numpy()}, tmp_path)
    spec = {"mode": "weight_only", "per_channel": False}
    outcome, _ = quantize(program, tmp_path / "out", examples, equalize=True, correct_bias=True, **spec)
    for word, share in (("equalized", 0.3), ("corrected", 0.9)):
        before, after = (outcome.facts[f"output_error_{when}_{word}"] for when in ("before", "after"))
        assert isinstance(before, float)
        assert isinstance(after, float)
        assert after < share * before
    assert outcome.facts["layers_equalized"] == 1
    assert outcome.facts["layers_corrected"] == 2
    dynamic = QuantizeInt8.model_validate({"kind": "quantize_int8"})
    with pytest.raises(StepFailed, match="quantized none") as caught:
        run(program, dynamic, Context(0, 1, tmp_path, None, lambda *_, **__: None))
    assert "static" in caught.value.fix


@pytest.mark.parametrize("name", ["cnn", "gpt"])
def test_families_are_quantized_statically(name: str, cnn: Program, tmp_path: Path) -> None:
    program = cnn if name == "cnn" else load(name, tmp_path, dynamic=False)
    outcome, result = quantize(program, tmp_path / "out", random_examples(program, tmp_path), mode="static")
    layers = {n for n, layer in program.module.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}
    embeddings = {n for n, layer in program.module.named_modules() if isinstance(layer, nn.Embedding)}
    assert layers
    assert outcome.facts["layers_quantized"] in (len(layers), len(layers | embeddings))
    cosine = outcome.facts["cosine_with_float"]
    assert isinstance(cosine, float)
    assert cosine > 0.98
    assert set(find_layers(onnx.load(tmp_path / "out" / "float.onnx"), program).values()) >= layers
    assert result.signature == program.signature


def test_dynamic_mode_leaves_convolutions_and_says_so(cnn: Program, tmp_path: Path) -> None:
    outcome, _ = quantize(cnn, tmp_path / "out")
    assert outcome.facts["layers_quantized"] == 2
    assert any("features.0, features.4" in warning for warning in outcome.warnings)
    capability = inspect(cnn)
    assert capability.applicable
    assert capability.missing is not None
    assert "convolutions" in capability.missing


# torch.export swaps the flat weight list of recurrent layers while it traces.
@pytest.mark.filterwarnings("ignore:The tensor attributes? .* assigned during export:UserWarning")
def test_lstm_is_quantized_dynamically(tmp_path: Path) -> None:
    program = load("lstm", tmp_path)
    outcome, result = quantize(program, tmp_path / "out")
    assert outcome.facts["layers_quantized"] == 3
    assert "DynamicQuantizeLSTM" in {node.op_type for node in onnx.load(result.path).graph.node}
    assert not any("floating point" in warning for warning in outcome.warnings)
