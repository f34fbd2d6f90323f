"""Weights as fixed-point numbers: on the grid, in range, small files with the same outputs, saturation said."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.recipes.quantization import QuantizeFixed
from tests.engine.techniques.learning import context, make_zoo, random_examples
from worker.engine.errors import RecipeRefused
from worker.engine.measure.runtimes import open_model
from worker.engine.packing.encodings import FixedPoint
from worker.engine.programs.export_onnx import export_onnx
from worker.engine.programs.program import Program
from worker.engine.techniques.base import Outcome
from worker.engine.techniques.quantize_fixed import inspect, run

torch.set_num_threads(1)


def quantize(program: Program, directory: Path, **spec: Any) -> Outcome:
    examples = random_examples(program, directory, 8, task="none")
    return run(program, QuantizeFixed.model_validate({"kind": "quantize_fixed", **spec}), context(examples))


def number(outcome: Outcome, name: str) -> float:
    value = outcome.facts[name]
    assert isinstance(value, (int, float))
    return value


@pytest.mark.parametrize("bits", [4, 8, 12, 16])
def test_every_weight_is_an_integer_times_a_power_of_two(bits: int, tmp_path: Path) -> None:
    program = make_zoo("mobilenet")
    before = {name: each.detach().clone() for name, each in program.module.named_parameters()}
    outcome = quantize(program, tmp_path, bits=bits)
    assert len(program.encodings) == len(inspect(make_zoo("mobilenet")).layers)
    for name, encoding in program.encodings.items():
        assert isinstance(encoding, FixedPoint)
        after = program.module.get_parameter(name).detach()
        integers = after * 2.0**encoding.fraction_bits
        assert torch.equal(integers, integers.round())
        assert -(2 ** (bits - 1)) <= float(integers.min())
        assert float(integers.max()) <= 2 ** (bits - 1) - 1
        assert float((after - before[name]).abs().max()) <= 2.0**-encoding.fraction_bits / 2
    assert number(outcome, "weights_saturated") == 0
    assert number(outcome, "weight_bytes_after") == pytest.approx(
        number(outcome, "weight_bytes_before") * bits / 32, rel=0.01
    )


@pytest.mark.parametrize("bits", [3, 12])
def test_the_onnx_file_is_small_and_exact(bits: int, tmp_path: Path) -> None:
    program = make_zoo("cnn")
    export_onnx(program, tmp_path / "float.onnx")
    outcome = quantize(program, tmp_path, bits=bits)
    export_onnx(program, tmp_path / "model.onnx")
    before, after = ((tmp_path / name).stat().st_size for name in ("float.onnx", "model.onnx"))
    assert after - before < -0.38 * number(outcome, "weight_bytes_before")
    inputs = program.example_inputs(3, 7)
    (found,) = open_model(tmp_path / "model.onnx", "onnxruntime", program.signature, 1)(
        tuple(each.numpy() for each in inputs)
    )
    with torch.no_grad():
        expected = program.module.eval()(*inputs)[0].numpy()
    assert np.abs(np.subtract(found, expected)).max() <= 1e-5 * np.abs(expected).max()


def test_a_given_point_saturates_and_says_so(tmp_path: Path) -> None:
    program = make_zoo("mlp")
    with torch.no_grad():
        program.module.get_parameter("head.weight")[0, :3] = torch.tensor([5.0, -5.0, 0.99])
    outcome = quantize(program, tmp_path, bits=8, fraction_bits=7)
    assert number(outcome, "weights_saturated") == 2
    values = program.module.get_parameter("head.weight").detach()[0, :3]
    assert torch.equal(values, torch.tensor([127 / 128, -1.0, 127 / 128]))
    assert any("head.weight (2)" in each for each in outcome.warnings)
    assert {each.choice for each in outcome.sensitivity} == {"Q0.7"}


def test_few_bits_are_said_to_lose_much_and_to_be_stored_wider(tmp_path: Path) -> None:
    outcome = quantize(make_zoo("mlp"), tmp_path, bits=3)
    assert any("loses more than 1%" in each for each in outcome.warnings)
    assert any("stores each number in 4 bits" in each for each in outcome.warnings)
    assert any("storage gain" in each for each in outcome.warnings)
    with pytest.raises(RecipeRefused, match="nope"):
        quantize(make_zoo("mlp"), tmp_path, skip_layers=["nope"])
