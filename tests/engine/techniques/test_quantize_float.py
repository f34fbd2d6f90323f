"""Weights as 16-bit and 8-bit floats: torch's own values, small files with the same outputs, no claim of speed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.recipes.quantization import QuantizeFloat
from tests.engine.techniques.learning import context, make_zoo, random_examples
from worker.engine.errors import RecipeRefused, StepFailed
from worker.engine.measure.runtimes import open_model
from worker.engine.packing.encodings import FLOAT_TYPES, FloatFormat, Floating
from worker.engine.programs.export_onnx import export_onnx
from worker.engine.programs.program import Program
from worker.engine.techniques.base import Outcome
from worker.engine.techniques.quantize_float import inspect, run

torch.set_num_threads(1)


def quantize(program: Program, directory: Path, **spec: Any) -> Outcome:
    examples = random_examples(program, directory, 8, task="none")
    return run(program, QuantizeFloat.model_validate({"kind": "quantize_float", **spec}), context(examples))


def number(outcome: Outcome, name: str) -> float:
    value = outcome.facts[name]
    assert isinstance(value, (int, float))
    return value


@pytest.mark.parametrize("format", ["fp16", "bf16"])
def test_every_weight_matrix_becomes_what_torch_casts_to(format: FloatFormat, tmp_path: Path) -> None:
    program = make_zoo("lstm")
    before = {name: each.detach().clone() for name, each in program.module.named_parameters()}
    outcome = quantize(program, tmp_path, format=format)
    for name, parameter in program.module.named_parameters():
        cast = before[name].to(FLOAT_TYPES[format]).float() if parameter.ndim > 1 else before[name]
        assert torch.equal(parameter.detach(), cast)
    assert number(outcome, "weight_bytes_after") == number(outcome, "weight_bytes_before") / 2
    assert set(inspect(program).layers) == set()


@pytest.mark.parametrize("format", ["bf16", "fp8_e4m3"])
def test_the_onnx_file_is_small_and_exact(format: FloatFormat, tmp_path: Path) -> None:
    program = make_zoo("vit")
    export_onnx(program, tmp_path / "float.onnx")
    outcome = quantize(program, tmp_path, format=format)
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


def test_eight_bits_have_a_scale_per_row_and_small_rows_do_not_vanish(tmp_path: Path) -> None:
    program = make_zoo("mlp")
    with torch.no_grad():
        program.module.get_parameter("head.weight")[0].mul_(1e-8)
    before = program.module.get_parameter("head.weight").detach().clone()
    outcome = quantize(program, tmp_path, format="fp8_e4m3")
    encoding = program.encodings["head.weight"]
    assert isinstance(encoding, Floating)
    assert encoding.scales is not None
    after = program.module.get_parameter("head.weight").detach()
    assert float((after[0] - before[0]).norm() / before[0].norm()) < 0.05
    assert 0 < number(outcome, "largest_weight_error") < 0.01


def test_overflow_and_earlier_codes_are_said(tmp_path: Path) -> None:
    program = make_zoo("mlp")
    with torch.no_grad():
        program.module.get_parameter("head.weight")[0, 0] = 1e6
    outcome = quantize(program, tmp_path, format="fp16", skip_layers=["body.0"])
    assert any("65504" in each and "head.weight" in each for each in outcome.warnings)
    assert any("as fast as before" in each for each in outcome.warnings)
    again = quantize(program, tmp_path, format="bf16")
    assert number(again, "coded_before") == 2
    assert program.encodings["body.0.weight"].format == "bf16"  # type: ignore[union-attr]
    assert program.encodings["head.weight"].format == "fp16"  # type: ignore[union-attr]


def test_unknown_and_missing_layers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeRefused, match="nope"):
        quantize(make_zoo("mlp"), tmp_path, skip_layers=["nope"])
    with pytest.raises(StepFailed, match="no weights are left"):
        quantize(make_zoo("mlp"), tmp_path, skip_layers=["body.0", "body.3", "head"])
