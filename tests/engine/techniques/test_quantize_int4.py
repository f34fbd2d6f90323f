"""Weights in 2 to 4 bits: every layer kind, data makes it better, masks and earlier codes stay, and honest words."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from app.recipes.quantization import QuantizeInt4
from tests.engine.digits import Rows, make_uploads
from tests.engine.process import plan_of
from tests.engine.process import run as run_job
from tests.engine.techniques.learning import context, make_zoo, random_examples
from worker.engine.errors import RecipeRefused, StepFailed
from worker.engine.measure.runtimes import open_model
from worker.engine.packing.encodings import Floating, Grouped
from worker.engine.programs.export_onnx import export_onnx
from worker.engine.programs.program import Program
from worker.engine.quantization.rounding import round_to_float
from worker.engine.techniques.base import Outcome
from worker.engine.techniques.quantize_int4 import inspect, run

torch.set_num_threads(1)


def quantize(program: Program, directory: Path, **spec: Any) -> Outcome:
    examples = random_examples(program, directory, 48, task="none")
    return run(program, QuantizeInt4.model_validate({"kind": "quantize_int4", **spec}), context(examples))


def number(outcome: Outcome, name: str) -> float:
    value = outcome.facts[name]
    assert isinstance(value, (int, float))
    return value


def outputs(program: Program, seed: int = 9) -> Tensor:
    with torch.no_grad():
        return torch.cat([each.flatten() for each in program.module.eval()(*program.example_inputs(32, seed))])


def disturb(program: Program, directory: Path, **spec: Any) -> float:
    """Return the relative squared change of the outputs."""
    before = outputs(program)
    quantize(program, directory, **spec)
    return float((outputs(program) - before).square().sum() / before.square().sum())


@pytest.mark.parametrize("method", ["rtn", "gptq", "hqq", "awq"])
@pytest.mark.parametrize("name", ["gpt", "unet", "gru_deep"])
def test_every_weight_of_every_family_is_coded(name: str, method: str, tmp_path: Path) -> None:
    program = make_zoo(name)
    outcome = quantize(program, tmp_path, bits=3, method=method, symmetric=method == "awq", quantize_embeddings=True)
    parameters = dict(program.module.named_parameters())
    assert set(program.encodings) == {name for name, each in parameters.items() if each.ndim > 1}
    for key, encoding in program.encodings.items():
        assert isinstance(encoding, Grouped)
        assert encoding.bits == 3
        assert torch.equal(parameters[key].detach(), encoding.decode())
    assert number(outcome, "layers_coded") == len(inspect(make_zoo(name)).layers)
    assert number(outcome, "bits_per_weight") < 6
    assert {each.choice for each in outcome.sensitivity} == {"int3"}


def test_gptq_makes_it_better(tmp_path: Path) -> None:
    # AWQ does not hold this: at 2 bits it disturbed this model more (0.41) than rounding to nearest (0.23).
    changes = {
        method: disturb(make_zoo("vit"), tmp_path, bits=2, method=method, group_size=64) for method in ("rtn", "gptq")
    }
    assert changes["gptq"] < 0.75 * changes["rtn"]
    few, more = (disturb(make_zoo("vit"), tmp_path, bits=bits, method="gptq") for bits in (3, 4))
    assert more < few < changes["gptq"]


def test_awq_scales_behind_norms_and_says_where_it_cannot(tmp_path: Path) -> None:
    program = make_zoo("vit")
    before = program.module.get_parameter("blocks.0.norm2.weight").detach().clone()
    outcome = quantize(program, tmp_path, method="awq")
    assert number(outcome, "layers_scaled") >= 2
    assert not torch.equal(program.module.get_parameter("blocks.0.norm2.weight").detach(), before)
    warning = next(each for each in outcome.warnings if "AWQ could not scale" in each)
    assert "blocks.0.mlp.3" in warning, "it is read through GELU"
    assert "blocks.0.mlp.0" not in warning


def test_pruned_weights_stay_zero(tmp_path: Path) -> None:
    for method in ("rtn", "gptq", "hqq", "awq"):
        program = make_zoo("cnn")
        weight = program.module.get_parameter("features.4.weight")
        program.masks["features.4.weight"] = torch.rand_like(weight) > 0.7
        program.apply_masks()
        quantize(program, tmp_path, method=method, bits=2)
        assert not bool(weight[~program.masks["features.4.weight"]].any())
        assert bool(weight.any())


def test_what_an_earlier_step_coded_and_what_is_skipped_stays(tmp_path: Path) -> None:
    program = make_zoo("mlp")
    kept = program.module.get_parameter("head.weight").detach().clone()
    program.encode("body.0.weight", round_to_float(program.module.get_parameter("body.0.weight"), "fp16"))
    outcome = quantize(program, tmp_path, skip_layers=["head"])
    assert isinstance(program.encodings["body.0.weight"], Floating)
    assert set(program.encodings) == {"body.0.weight", "body.3.weight"}
    assert torch.equal(program.module.get_parameter("head.weight").detach(), kept)
    assert number(outcome, "coded_before") == 1
    assert any("earlier step" in each and "body.0.weight" in each for each in outcome.warnings)
    with pytest.raises(RecipeRefused) as refused:
        quantize(program, tmp_path, skip_layers=["nope"])
    assert refused.value.code == "unknown_layer"
    with pytest.raises(StepFailed) as failed:
        quantize(program, tmp_path, skip_layers=["head"])
    assert failed.value.code == "nothing_to_quantize"


def test_a_table_tied_to_the_output_layer_is_coded_only_when_asked(tmp_path: Path) -> None:
    program = make_zoo("gpt")
    outcome = quantize(program, tmp_path)
    assert not any("tokens" in name or "head" in name for name in program.encodings)
    assert any("quantize_embeddings is false" in each and "head" in each for each in outcome.warnings)
    quantize(program, tmp_path, quantize_embeddings=True)
    shared = [name for name in program.encodings if "tokens" in name or "head" in name]
    assert len(shared) == 1


def test_it_says_what_runs_from_integers_and_what_is_storage(tmp_path: Path) -> None:
    program = make_zoo("cnn")
    outcome = quantize(program, tmp_path, bits=3)
    assert number(outcome, "layers_in_integers") == 2
    assert number(outcome, "layers_storage_only") == 2
    storage = next(each for each in outcome.warnings if "only take fewer bytes" in each)
    assert "features.0" in storage
    assert "fc1" not in storage
    assert any("stored in 4 bits" in each for each in outcome.warnings)
    assert "features.0" in str(inspect(make_zoo("cnn")).missing)


@pytest.mark.parametrize("bits", [3])
def test_the_onnx_file_is_small_and_gives_the_module_s_outputs(bits: int, tmp_path: Path) -> None:
    program = make_zoo("gpt")
    quantize(program, tmp_path, bits=bits, quantize_embeddings=True, symmetric=bits == 2)
    export_onnx(program, tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    assert sum(node.op_type == "MatMulNBits" for node in model.graph.node) == 9
    floats = [each for each in model.graph.initializer if each.data_type == onnx.TensorProto.FLOAT]
    assert max(int(np.prod(each.dims)) for each in floats) <= 128, "scales, norms and biases"
    inputs = program.example_inputs(3, 7)
    (found,) = open_model(tmp_path / "model.onnx", "onnxruntime", program.signature, 1)(
        tuple(each.numpy() for each in inputs)
    )
    with torch.no_grad():
        expected = program.module.eval()(*inputs)[0].numpy()
    assert np.abs(np.subtract(found, expected)).max() < 0.03 * np.abs(expected).max()
    before = tmp_path / "model.onnx"
    export_onnx(program, tmp_path / "again.onnx")
    assert before.read_bytes() == (tmp_path / "again.onnx").read_bytes()


@pytest.mark.long
def test_a_whole_job_verifies(tmp_path: Path) -> None:
    uploads = make_uploads(Rows(), tmp_path, epochs=1)
    step = {"kind": "quantize_int4", "method": "gptq", "num_calibration_examples": 64}
    fields = uploads.fields([step], outputs={"formats": ["onnx", "packed"]}, target={"num_runs": 10})
    finished = run_job(tmp_path / "job", plan_of("optimize", **fields), uploads.files)
    metrics = finished.good.metrics
    assert metrics is not None
    assert metrics.steps[0].facts["layers_in_integers"] == 7
    assert metrics.comparison.file_ratio < 0.6
    artifacts = finished.directory / "out" / "artifacts"
    files = {path.name: path for path in artifacts.iterdir()}
    assert run_job(tmp_path / "verify", plan_of("verify", artifacts=sorted(files)), files).good.artifacts == ()
