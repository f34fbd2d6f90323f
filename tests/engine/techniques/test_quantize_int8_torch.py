"""Integer models for torch: exact integer products in any shape, what torchao computes too, files for any device."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as some
from torch import Tensor, nn
from torch.nn import functional

from app.recipes.quantization import QuantizeInt8
from app.recipes.recipe import Target
from tests.engine.digits import Convolutions, Rows
from tests.engine.simulated_device import DEVICE, simulated_device
from tests.engine.techniques.digit_worlds import open_world
from tests.engine.techniques.opening import open_module
from worker.engine.errors import StepFailed
from worker.engine.measure.macs import count_macs
from worker.engine.measure.runtimes import open_model
from worker.engine.programs.intake import open_program
from worker.engine.programs.program import FileProgram, Program
from worker.engine.quantization.int8_grid import round_to_int8
from worker.engine.quantization.int8_torch import Int8Embedding, Int8Linear
from worker.engine.techniques import quantize_int8
from worker.engine.techniques.base import Context, Outcome
from worker.engine.techniques.quantize_int8 import run
from worker.engine.training.examples import BoundExamples
from worker.engine.training.quality import evaluate, evaluate_module

Device = Literal["cpu", "cuda"]
DEVICES: tuple[Device, ...] = ("cpu", "cuda")
MODES = ("dynamic", "weight_only")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def quantize(
    program: Program, directory: Path, device: Device, examples: BoundExamples | None = None, **spec: Any
) -> tuple[Outcome, FileProgram]:
    target = Target(device=device, runtime="torch")
    directory.mkdir(exist_ok=True)
    context = Context(0, 1, directory, examples, lambda *_, **__: None, target=target)
    step = QuantizeInt8.model_validate({"kind": "quantize_int8", "num_calibration_examples": 64, **spec})
    outcome = run(program, step, context)
    assert isinstance(outcome.program, FileProgram)
    return outcome, outcome.program


Quantize = Callable[[str, Device], tuple[Outcome, FileProgram]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Quantize:
    """Return what makes integers of the transformer for digits, each once."""
    program, examples = open_world(Rows)
    made: dict[tuple[str, Device], tuple[Outcome, FileProgram]] = {}

    def make(mode: str, device: Device) -> tuple[Outcome, FileProgram]:
        if (mode, device) not in made:
            made[mode, device] = quantize(program, tmp_path_factory.mktemp("rows"), device, examples, mode=mode)
        return made[mode, device]

    return make


def integers_of(path: Path) -> dict[str, Tensor]:
    state = torch.export.load(path).state_dict
    return {name: each for name, each in state.items() if each.dtype == torch.int8}


def operators(path: Path) -> list[str]:
    graph = torch.export.load(path).graph
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def make_layer(inputs: int, outputs: int, *, bias: bool, dynamic: bool, device: Device) -> tuple[nn.Linear, Int8Linear]:
    layer = nn.Linear(inputs, outputs, bias=bias)
    codes, scales = round_to_int8(layer.weight.detach().numpy(), 0)
    grid = torch.from_numpy(scales).flatten()
    layer.weight.data = torch.from_numpy(codes * scales)
    made = Int8Linear(layer, torch.from_numpy(codes), grid, dynamic=dynamic, for_cuda=device == "cuda")
    return layer.eval(), made.eval()


@given(
    sizes=some.tuples(*[some.integers(1, 40)] * 3),
    bias=some.booleans(),
    dynamic=some.booleans(),
    device=some.sampled_from(DEVICES),
    seed=some.integers(0, 1000),
)
@example(sizes=(2, 1, 2), bias=False, dynamic=True, device="cpu", seed=0)
@settings(max_examples=60, deadline=None)
def test_a_layer_multiplies_the_integers_that_it_says(
    sizes: tuple[int, int, int], bias: bool, dynamic: bool, device: Device, seed: int
) -> None:
    torch.manual_seed(seed)
    rows, inputs, outputs = sizes
    layer, made = make_layer(inputs, outputs, bias=bias, dynamic=dynamic, device=device)
    x = torch.randn(rows, inputs)
    x[0] = 0
    given_x = x
    if dynamic:
        steps = (x.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
        given_x = (x / steps).round() * steps
        assert float((given_x - x).abs().amax()) <= float(steps.max()) / 2 * 1.001
    with torch.inference_mode():
        torch.testing.assert_close(made(x), layer(given_x), rtol=1e-4, atol=1e-5)
    # Of more axes, and transposed in memory.
    with torch.inference_mode():
        torch.testing.assert_close(made(x.unsqueeze(1)), made(x).unsqueeze(1))
        torch.testing.assert_close(made(x.t().contiguous().t()), made(x))


def test_for_cuda_every_product_has_the_shape_that_cublas_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    multiply = torch._int_mm

    def watch(left: Tensor, right: Tensor) -> Tensor:
        shapes.append((left.shape, right.shape))
        assert left.is_contiguous()
        assert right.t().is_contiguous()
        return multiply(left, right)

    monkeypatch.setattr(torch, "_int_mm", watch)
    for rows, inputs, outputs in ((1, 5, 3), (16, 8, 8), (32, 64, 10), (33, 7, 16)):
        _, made = make_layer(inputs, outputs, bias=True, dynamic=True, device="cuda")
        assert made(torch.randn(rows, inputs)).shape == (rows, outputs)
    # Transposed in memory, and of a shape that needs no filling.
    _, made = make_layer(64, 8, bias=True, dynamic=True, device="cuda")
    assert made(torch.randn(64, 32).t()).shape == (32, 8)
    assert all(left[0] > 16 and left[1] % 8 == right[1] % 8 == 0 for left, right in shapes)
    assert [left[0] for left, _ in shapes] == [32, 32, 32, 64, 32]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "weight_only"])
def test_torchao_computes_the_same_from_the_same_integers(dynamic: bool) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    int8 = pytest.importorskip("torchao.quantization.quantize_.workflows.int8.int8_tensor")
    torch.manual_seed(0)
    layer, made = make_layer(64, 48, bias=True, dynamic=dynamic, device="cuda")
    activations = int8.QuantizeTensorToInt8Kwargs(granularity=quantization.PerRow()) if dynamic else None
    weight = int8.Int8Tensor(made.codes, made.scales[:, None], [1, 64], torch.float32, act_quant_kwargs=activations)
    x = torch.randn(20, 64)
    with torch.inference_mode():
        theirs, ours = functional.linear(x, weight, layer.bias), made(x)
        exact = layer(x)
    if not dynamic:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    else:
        # torchao's largest code is 127.5, rounded: steps of activations differ by 0.4 %.
        errors = [float((each - exact).norm() / exact.norm()) for each in (ours, theirs)]
        assert max(errors) < 0.01
        assert float((ours - theirs).norm() / exact.norm()) < sum(errors)
        assert errors[0] < 1.05 * errors[1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", MODES)
def test_digits_stay_recognized_from_integers(mode: str, device: Device, rows: Quantize) -> None:
    program, examples = open_world(Rows)
    before = evaluate_module(program.module, examples, 64)
    outcome, result = rows(mode, device)
    after = evaluate(open_model(result.path, "torch", result.signature, 1), examples)
    assert before.value > 0.25  # a few steps of training, from 0.1
    assert after.value > before.value - 0.02
    weights = dict(torch.export.load(result.path).state_dict)
    integers = {name: each for name, each in weights.items() if each.dtype == torch.int8}
    assert len(integers) == outcome.facts["layers_quantized"] == 7
    assert sum(each.numel() for each in integers.values()) > 0.9 * sum(each.numel() for each in weights.values())
    assert result.parameters == sum(each.numel() for each in weights.values())
    assert result.nonzero_parameters == sum(int(each.count_nonzero()) for each in weights.values())
    assert outcome.facts["weight_bytes_after"] == sum(each.nbytes for each in weights.values())
    before_bytes, after_bytes = (outcome.facts[f"weight_bytes_{word}"] for word in ("before", "after"))
    assert isinstance(before_bytes, int)
    assert isinstance(after_bytes, int)
    assert after_bytes < before_bytes / 2.5
    found = operators(result.path)
    assert all(each.startswith("aten.") for each in found if "built-in" not in each)
    assert found.count("aten._int_mm.default") == (7 if mode == "dynamic" else 0)
    assert any("decoded at every call" in each for each in outcome.warnings) == (mode == "weight_only")
    assert {each.metric for each in outcome.sensitivity} == {"layer_output_error"}


def test_the_same_program_gives_the_same_bytes(rows: Quantize, tmp_path: Path) -> None:
    _, again = quantize(open_world(Rows)[0], tmp_path, "cuda")
    assert again.path.read_bytes() == rows("dynamic", "cuda")[1].path.read_bytes()


def test_the_file_needs_torch_alone(rows: Quantize, tmp_path: Path) -> None:
    _, examples = open_world(Rows)
    _, result = rows("dynamic", "cuda")
    (x,) = next(examples.evaluation_batches(3))[0]
    (expected,) = open_model(result.path, "torch", result.signature, 1)((x.numpy(),))
    np.savez(tmp_path / "arrays.npz", x=x.numpy(), expected=expected)
    alone = (
        "import sys\n"
        "for name in ('app', 'worker', 'pare', 'torchao', 'onnxruntime'): sys.modules[name] = None\n"
        "import numpy, torch\n"
        "arrays = numpy.load(sys.argv[2])\n"
        "with torch.inference_mode():\n"
        "    (made,) = torch.export.load(sys.argv[1]).module()(torch.from_numpy(arrays['x']))\n"
        "numpy.testing.assert_allclose(made.numpy(), arrays['expected'], rtol=1e-5, atol=1e-6)\n"
    )
    command = [sys.executable, "-I", "-c", alone, str(result.path), str(tmp_path / "arrays.npz")]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_file_for_cuda_mixes_no_devices(rows: Quantize) -> None:
    _, examples = open_world(Rows)
    _, result = rows("dynamic", "cuda")
    inputs = next(examples.evaluation_batches(5))[0]
    here = torch.export.load(result.path).module()
    with torch.inference_mode():
        expected = here(*inputs)
    with simulated_device() as simulated:
        there = here.to(DEVICE)
        with torch.inference_mode():
            made = there(*(each.to(DEVICE) for each in inputs))
        assert simulated.num_operators > 7
        assert made[0].device == DEVICE
        torch.testing.assert_close(made[0].to("cpu"), expected[0])


def test_layers_without_integer_products_stay_and_are_named(tmp_path: Path) -> None:
    program, examples = open_world(Convolutions)
    outcome, _ = quantize(program, tmp_path, "cpu", examples, skip_layers=["hidden"])
    assert outcome.facts["layers_quantized"] == 1
    kept = next(each for each in outcome.warnings if "stay in floating point" in each)
    assert all(name in kept for name in ("first.0", "second.0", "hidden"))
    with pytest.raises(StepFailed) as caught:
        quantize(program, tmp_path / "none", "cpu", examples, skip_layers=["hidden", "classifier"])
    assert caught.value.code == "nothing_quantized"


class Tied(nn.Module):
    """A language model whose table is also its output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 16)
        self.norm = nn.LayerNorm(16)
        self.output = nn.Linear(16, 64, bias=False)
        self.output.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.output(self.norm(self.table(tokens)))
        return logits


@pytest.mark.parametrize("quantize_embeddings", [True, False])
def test_a_shared_table_is_stored_once(quantize_embeddings: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = open_module(Tied(), (torch.randint(0, 64, (4, 7)),), tmp_path)
    outcome, result = quantize(program, tmp_path / "step", "cuda", quantize_embeddings=quantize_embeddings)
    stored = [each.dtype for each in torch.export.load(result.path).state_dict.values() if each.ndim == 2]
    assert outcome.facts["layers_quantized"] == 1 + quantize_embeddings
    # The codes are there once, the scales for each use; a table of floats stays beside codes made of it.
    num_bytes = 64 * 16 + 4 * 64 + 4 * 2 * 16 + (4 * 64 if quantize_embeddings else 4 * 64 * 16)
    assert outcome.facts["weight_bytes_after"] == num_bytes
    assert stored.count(torch.int8) == 1 + quantize_embeddings
    cosine = outcome.facts["cosine_with_float"]
    assert isinstance(cosine, float)
    assert cosine > 0.999


@pytest.mark.parametrize(("tied", "largest"), [(False, 127), (True, 64)])
def test_where_sums_need_room_a_table_that_is_only_looked_up_has_8_bits(
    tied: bool, largest: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize_int8, "has_exact_integer_products", lambda: False)
    torch.manual_seed(0)
    module = Tied()
    if not tied:
        module.output.weight = nn.Parameter(torch.randn(64, 16))
    outcome, result = quantize(open_module(module, (torch.randint(0, 64, (4, 7)),), tmp_path), tmp_path / "step", "cpu")

    state = torch.export.load(result.path).state_dict
    codes = {name.split(".")[0]: int(each.abs().max()) for name, each in state.items() if each.dtype == torch.int8}
    assert codes["table"] == largest
    assert codes.get("output", largest) == 64
    effect = next(each.effect for each in outcome.sensitivity if each.layer == "table")
    again = Int8Embedding(state["table.codes"], state["table.scales"])(torch.arange(64))
    wanted = module.table.weight.detach()
    assert effect == pytest.approx(float((again - wanted).square().sum() / wanted.square().sum()), rel=1e-3)


def test_gptq_reaches_the_file(rows: Quantize, tmp_path: Path) -> None:
    program, examples = open_world(Rows)
    outcome, result = quantize(program, tmp_path, "cpu", examples, rounding="gptq")
    before, after = (outcome.facts[f"output_error_{when}_rounded_by_gptq"] for when in ("before", "after"))
    assert isinstance(before, float)
    assert isinstance(after, float)
    assert 0 < after < before
    plain, moved = (integers_of(path) for path in (rows("dynamic", "cpu")[1].path, result.path))
    assert plain.keys() == moved.keys()
    assert not any(torch.equal(plain[name], each) for name, each in moved.items())


def test_the_file_can_be_uploaded_again_and_its_products_are_counted(rows: Quantize, tmp_path: Path) -> None:
    program, _ = open_world(Rows)
    again = open_program(rows("dynamic", "cpu")[1].path, tmp_path)
    assert count_macs(again).total == count_macs(program).total
    assert not count_macs(again).uncounted
