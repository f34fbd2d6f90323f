"""A precision per layer: within the budget, better than uniform, sensitivity told, honest where nothing is gained."""

from pathlib import Path
from typing import Any

import pytest
import torch

from app.recipes.data import Data
from app.recipes.plan import Plan
from app.recipes.quantization import QuantizeMixed
from app.recipes.recipe import Recipe, Target
from tests.engine.digits import DATASET_ID, Convolutions, Rows, Uploads, make_uploads
from worker.engine.checkpoints.stop import StopRequest
from worker.engine.errors import RecipeRefused, StepFailed
from worker.engine.measure.sensitivity import Sensitivity
from worker.engine.pipeline import optimize
from worker.engine.programs.intake import open_program
from worker.engine.programs.program import Program
from worker.engine.progress import Reporter
from worker.engine.quantization.precisions import PRECISIONS, count_bytes
from worker.engine.quantization.rounding import round_to_groups
from worker.engine.techniques.base import Context, Outcome
from worker.engine.techniques.quantize_mixed import inspect, run
from worker.engine.training.examples import BoundExamples, open_examples
from worker.engine.training.quality import evaluate_module

torch.set_num_threads(1)
LOW = ["int8", "int4", "int3", "int2"]


@pytest.fixture(scope="module")
def uploads(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Uploads]:
    made = {}
    for module in (Convolutions(), Rows()):
        directory = tmp_path_factory.mktemp("digits")
        made[type(module).__name__] = make_uploads(module, directory)
    return made


class Job:
    """A digits model with its data, and one memory of effects for all its steps."""

    def __init__(self, uploads: Uploads, directory: Path) -> None:
        self.directory, self.uploads = directory, uploads
        self.program = open_program(uploads.model, directory)
        data = Data.model_validate(uploads.fields([])["recipe"]["data"])
        self.examples: BoundExamples = open_examples(
            data, {DATASET_ID: (uploads.data, "npz")}, self.program.signature, 0, directory
        )
        self.effects: dict[str, float] = {}

    def run(self, program: Program | None = None, *, target: Target | None = None, **spec: Any) -> Outcome:
        step = QuantizeMixed.model_validate({"kind": "quantize_mixed", **spec})
        context = Context(
            0, 1, self.directory, self.examples, lambda *_, **__: None, effects=self.effects, target=target or Target()
        )
        return run(program or self.program, step, context)

    def fresh(self) -> Program:
        return open_program(self.uploads.model, self.directory)


@pytest.fixture(params=["Convolutions", "Rows"])
def job(request: pytest.FixtureRequest, uploads: dict[str, Uploads], tmp_path: Path) -> Job:
    return Job(uploads[request.param], tmp_path)


@pytest.fixture
def convolutions(uploads: dict[str, Uploads], tmp_path: Path) -> Job:
    return Job(uploads["Convolutions"], tmp_path)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_the_result_fits_the_budget_and_beats_every_uniform_precision_that_fits(job: Job, method: str) -> None:
    outcome = job.run(max_size_ratio=0.17, precisions=LOW, method=method, group_size=16)
    program = outcome.program
    assert program is job.program
    assert isinstance(program, Program)
    weights = {name: each for name, each in program.module.named_parameters() if each.ndim > 1}
    size = sum(count_bytes(program.encodings[name]) for name in weights)
    full = sum(4 * each.numel() for each in weights.values())
    assert size == outcome.facts["weight_bytes_after"]
    assert size <= 0.17 * full
    for name, parameter in weights.items():
        assert torch.equal(parameter, program.encodings[name].decode())
    metric = "output_divergence"
    error, uniform = outcome.facts[metric], outcome.facts[f"best_uniform_{metric}"]
    assert isinstance(error, float)
    assert isinstance(uniform, float)
    assert error < 0.9 * uniform
    # The claimed error is that of the program which is handed on.
    original = job.fresh()
    sensitivity = Sensitivity(original.module, job.examples.set_apart(), num_examples=64, seed=0)
    for name, parameter in program.module.named_parameters():
        original.module.get_parameter(name).data.copy_(parameter)
    assert sensitivity.measure_now() == pytest.approx(error, rel=1e-6)


def test_every_layer_and_precision_is_told_with_its_bytes(job: Job) -> None:
    outcome = job.run(precisions=list(PRECISIONS), method="rtn")
    layers = {name.removesuffix(".weight") for name, each in job.program.module.named_parameters() if each.ndim > 1}
    assert {(each.layer, each.choice) for each in outcome.sensitivity} == {(a, b) for a in layers for b in PRECISIONS}
    assert sum(each.chosen for each in outcome.sensitivity) == len(layers)
    assert (
        sum(each.weight_bytes or 0 for each in outcome.sensitivity if each.chosen)
        == (outcome.facts["weight_bytes_after"])
    )
    original = job.fresh()
    for each in outcome.sensitivity:
        weight = original.module.get_parameter(f"{each.layer}.weight")
        if each.choice == "fp32":
            assert (each.effect, each.weight_bytes) == (0.0, 4 * weight.numel())
        if each.choice == "int4":
            assert each.weight_bytes == count_bytes(round_to_groups(weight, 4, 32, symmetric=False))
            assert each.effect > 0
    for layer in layers:
        effects = {each.choice: each.effect for each in outcome.sensitivity if each.layer == layer}
        assert effects["fp16"] < effects["int8"] < effects["int2"]


def test_a_second_step_does_not_measure_again_and_leaves_coded_weights_alone(convolutions: Job) -> None:
    first = convolutions.run(convolutions.fresh(), method="rtn", precisions=["fp32", "int8", "int4"])
    assert first.facts["effects_remembered"] == 0
    again = convolutions.run(
        convolutions.fresh(), method="rtn", precisions=["fp32", "int8", "int4"], max_size_ratio=0.2
    )
    assert (again.facts["effects_measured"], again.facts["effects_remembered"]) == (0, 8)
    assert [each.effect for each in again.sensitivity] == [each.effect for each in first.sensitivity]
    coded = convolutions.fresh()
    coded.encode("hidden.weight", round_to_groups(coded.module.get_parameter("hidden.weight"), 3, 32, symmetric=True))
    third = convolutions.run(coded, method="rtn", precisions=["fp32", "int8", "int4"])
    assert third.facts["weights_coded_before"] == 1
    assert "hidden" not in {each.layer for each in third.sensitivity}
    assert coded.encodings["hidden.weight"].bits == 3  # type: ignore[union-attr]


def test_the_smallest_size_within_a_quality_limit(job: Job) -> None:
    strict = job.run(job.fresh(), budget="quality", max_quality_loss=0.0, precisions=["fp32", *LOW], method="rtn")
    program = job.program
    loose = job.run(program, budget="quality", max_quality_loss=0.3, precisions=["fp32", *LOW], method="rtn")
    sizes = [outcome.facts["size_ratio"] for outcome in (loose, strict)]
    assert sizes == sorted(sizes)  # type: ignore[type-var]
    assert float(sizes[0] or 1) < 0.2
    choosing = job.examples.set_apart()
    loss = (
        evaluate_module(job.fresh().module.eval(), choosing, 64).value
        - evaluate_module(program.module, choosing, 64).value
    )
    assert loss == pytest.approx(loose.facts["quality_loss"])
    assert loss <= 0.3
    assert float(strict.facts["quality_loss"] or 0) <= 0


def test_a_quality_that_no_precision_reaches_is_refused(convolutions: Job) -> None:
    # An outlier for a channel that is always zero changes nothing, but leaves few bits nothing for the other weights.
    module = convolutions.program.module
    module.get_parameter("first.1.bias").data[0] = -1000
    module.get_parameter("second.0.weight").data[:, 0, 0, 0] = 1000
    with pytest.raises(StepFailed) as caught:
        convolutions.run(
            budget="quality", max_quality_loss=0.0, precisions=["int3", "int2"], method="rtn", group_size=256
        )
    assert caught.value.code == "quality_not_reached"


def test_latency_is_measured_and_nothing_is_claimed_that_is_not_faster(convolutions: Job) -> None:
    outcome = convolutions.run(
        budget="latency", max_latency_ratio=0.05, precisions=["fp32", "fp16"], target=Target(num_runs=10)
    )
    assert isinstance(outcome.facts["fp16_everywhere_latency_ratio"], float)
    taken = {each.choice for each in outcome.sensitivity if each.chosen}
    assert any("faster" in warning or "not reached" in warning for warning in outcome.warnings)
    if "latency_ratio" not in outcome.facts:
        assert taken == {"fp32"}
    with pytest.raises(RecipeRefused) as caught:
        convolutions.run(budget="latency", target=Target(runtime="torch"))
    assert caught.value.code == "latency_cannot_change"


def test_refusals_hold_the_numbers(convolutions: Job) -> None:
    with pytest.raises(RecipeRefused, match=r"max_size_ratio 0.05 allows 7148 bytes") as caught:
        convolutions.run(max_size_ratio=0.05)
    assert caught.value.code == "budget_too_small"
    with pytest.raises(RecipeRefused, match="nope"):
        convolutions.run(skip_layers=["nope"])
    with pytest.raises(StepFailed) as nothing:
        convolutions.run(skip_layers=["first.0", "second.0", "hidden", "classifier"])
    assert nothing.value.code == "nothing_to_quantize"
    assert not convolutions.program.encodings


def test_what_stays_finer_is_named_and_skipped_layers_stay(convolutions: Job) -> None:
    before = convolutions.program.module.get_parameter("hidden.weight").detach().clone()
    outcome = convolutions.run(max_size_ratio=0.11, precisions=LOW, method="rtn", skip_layers=["hidden"])
    assert any(warning.startswith("Kept finer than") and "classifier" in warning for warning in outcome.warnings)
    assert torch.equal(convolutions.program.module.get_parameter("hidden.weight"), before)
    assert "hidden" not in {each.layer for each in outcome.sensitivity}
    assert set(inspect(convolutions.fresh()).layers) == {"first.0", "second.0", "hidden", "classifier"}


def test_a_job_tells_the_sensitivity_in_metrics_and_report(convolutions: Job, tmp_path: Path) -> None:
    recipe = {"steps": [{"kind": "quantize_mixed", "method": "rtn"}], "target": {"num_runs": 10}}
    fields = convolutions.uploads.fields(**recipe, outputs={"formats": ["onnx"]})  # type: ignore[arg-type]
    plan = Plan.model_validate({"action": "optimize", **fields}, strict=False)
    assert isinstance(plan.recipe, Recipe)
    directory = tmp_path / "job"
    for name in ("in", "out", "tmp"):
        (directory / name).mkdir(parents=True)
    for name, path in convolutions.uploads.files.items():
        (directory / "in" / name).write_bytes(path.read_bytes())
    result = optimize(plan, directory, Reporter(lambda _: None), StopRequest())
    assert result.metrics is not None
    assert len(result.metrics.sensitivity) == 16
    report = (directory / "out" / "artifacts" / "report.md").read_text()
    section = report.split("## Sensitivity")[1].split("## Layers")[0]
    assert "output divergence" in section
    assert "| first.0 |" in section
    assert "**" in section
