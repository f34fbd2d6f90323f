"""Effects of single layers: equal to running the whole model, bits restored, remembered, and cheap."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from tests.engine.zoo import export_model
from worker.engine.measure.replay import Replay
from worker.engine.measure.sensitivity import LARGEST_EFFECT, Sensitivity, Variant, replaced
from worker.engine.programs.intake import open_program
from worker.engine.programs.program import Program
from worker.engine.training.examples import BoundExamples

torch.set_num_threads(1)


class Rows:
    """Random inputs in the place of bound data."""

    def __init__(self, program: Program, task: str = "none") -> None:
        self.program, self.task, self.output_index = program, task, 0

    def training_batches(self, batch_size: int, *, seed: int) -> Iterator[tuple[tuple[Tensor, ...], None]]:
        for index in range(3):
            yield self.program.example_inputs(batch_size, seed + index), None


def rows(program: Program, task: str = "none") -> BoundExamples:
    return cast(BoundExamples, Rows(program, task))


def load(name: str, directory: Path) -> Program:
    export_model(name, directory / f"{name}.pt2")
    program = open_program(directory / f"{name}.pt2", directory)
    program.module.eval()
    return program


def list_matrices(program: Program) -> list[str]:
    return [name for name, each in program.module.named_parameters() if each.ndim > 1]


def halve(program: Program, name: str) -> Variant:
    weight = program.module.get_parameter(name)
    values: Callable[[], Mapping[str, Tensor]] = lambda: {name: weight.detach() * 0.5}  # noqa: E731
    return Variant((name,), values, "half")


@pytest.mark.parametrize("name", ["gru", "mobilenet", "resnet20", "two_tower", "unet", "vit"])
def test_replaying_from_a_changed_weight_equals_a_whole_run(name: str, tmp_path: Path) -> None:
    program = load(name, tmp_path)
    inputs = program.example_inputs(4)
    replay = Replay(program.module)
    with torch.inference_mode():
        before = program.module(*inputs)
    for left, right in zip(replay.start(inputs), before, strict=True):
        assert torch.equal(left, right)
    for parameter in list_matrices(program):
        with replaced(program.module, halve(program, parameter).values()):
            found = replay.run((parameter,))
            with torch.inference_mode():
                whole = program.module(*inputs)
        assert all(torch.equal(left, right) for left, right in zip(found, whole, strict=True)), parameter
    whole_runs = replay.num_nodes * len(list_matrices(program))
    assert replay.nodes_run - replay.num_nodes < (0.7 if name in ("mobilenet", "resnet20") else 1.0) * whole_runs


def test_a_tied_weight_counts_wherever_it_is_used(tmp_path: Path) -> None:
    program = load("gpt", tmp_path)
    assert program.tied
    inputs = program.example_inputs(2)
    replay = Replay(program.module)
    replay.start(inputs)
    for parameter in program.tied[0]:
        with replaced(program.module, halve(program, parameter).values()), torch.inference_mode():
            assert torch.equal(replay.run((parameter,))[0], program.module(*inputs)[0])


def test_a_value_that_is_changed_in_place_and_read_elsewhere_is_not_kept(tmp_path: Path) -> None:
    class InPlace(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            z = self.second(y)
            y.add_(z)
            return y * 2

    batch = torch.export.Dim("batch", max=64)
    exported = torch.export.export(InPlace().eval(), (torch.randn(2, 8),), dynamic_shapes=({0: batch},))
    torch.export.save(exported, tmp_path / "model.pt2")
    program = open_program(tmp_path / "model.pt2", tmp_path)
    inputs = program.example_inputs(4)
    replay = Replay(program.module.eval())
    replay.start(inputs)
    for _ in range(2):
        with replaced(program.module, halve(program, "second.weight").values()), torch.inference_mode():
            assert torch.equal(replay.run(("second.weight",))[0], program.module(*inputs)[0])
    assert replay.nodes_run == 3 * replay.num_nodes


@pytest.mark.parametrize("name", ["cnn", "lstm"])
def test_the_effect_is_the_relative_squared_error_of_the_output(name: str, tmp_path: Path) -> None:
    program = load(name, tmp_path)
    before = {key: value.clone() for key, value in program.module.state_dict().items()}
    sensitivity = Sensitivity(program.module, rows(program), num_examples=40, seed=0)
    assert sensitivity.metric == "output_error"
    assert sensitivity.num_examples == 48
    names = list_matrices(program)
    found = sensitivity.measure_alone([halve(program, each) for each in names])
    for parameter, effect in zip(names, found, strict=True):
        with replaced(program.module, halve(program, parameter).values()), torch.inference_mode():
            error = size = 0.0
            for inputs in sensitivity.inputs:
                new = program.module(*inputs)[0].double()
                with replaced(program.module, {parameter: before[parameter]}):
                    old = program.module(*inputs)[0].double()
                error += float((new - old).square().sum())
                size += float(old.square().sum())
        assert effect == pytest.approx(error / size, rel=1e-6)
        assert effect > 0
    for key, value in program.module.state_dict().items():
        assert value.numpy().tobytes() == before[key].numpy().tobytes()
    assert sensitivity.measure_now() == 0.0


def test_class_scores_are_compared_as_distributions(tmp_path: Path) -> None:
    program = load("cnn", tmp_path)
    sensitivity = Sensitivity(program.module, rows(program, "classification"), num_examples=16, seed=0)
    assert sensitivity.metric == "output_divergence"
    name = list_matrices(program)[-1]
    (effect,) = sensitivity.measure_alone([halve(program, name)])
    with torch.inference_mode():
        old = program.module(*sensitivity.inputs[0])[0].double().softmax(-1)
        with replaced(program.module, halve(program, name).values()):
            new = program.module(*sensitivity.inputs[0])[0].double().softmax(-1)
    assert effect == pytest.approx(float((old * (old / new).log()).sum(-1).mean()), rel=1e-3)
    bias = next(key for key, _ in program.module.named_parameters() if key == name.replace("weight", "bias"))
    shift = Variant((bias,), lambda: {bias: program.module.get_parameter(bias).detach() + 3}, "shift")
    assert sensitivity.measure_alone([shift])[0] < 1e-6  # adding the same to all scores changes no probability


def test_effects_are_remembered_by_layer_weight_choice_and_rows(tmp_path: Path) -> None:
    program = load("mlp", tmp_path)
    cache: dict[str, float] = {}

    def measure(variants: list[Variant], **options: Any) -> tuple[list[float], Sensitivity]:
        given = {"num_examples": 16, "seed": 0, **options}
        sensitivity = Sensitivity(program.module, rows(program), cache=cache, **given)
        return sensitivity.measure_alone(variants), sensitivity

    names = list_matrices(program)
    variants = [halve(program, each) for each in names]
    first, sensitivity = measure(variants)
    assert (sensitivity.num_measured, sensitivity.num_remembered) == (len(names), 0)
    second, sensitivity = measure(variants)
    assert (sensitivity.num_measured, sensitivity.num_remembered) == (0, len(names))
    assert sensitivity.forwards == 1
    assert second == first
    assert measure(variants, seed=9)[1].num_remembered == 0
    assert measure([Variant((names[0],), variants[0].values, "other")])[1].num_remembered == 0
    with torch.no_grad():
        program.module.get_parameter(names[0]).mul_(1.01)
    assert measure(variants)[1].num_remembered < len(names)


def test_what_is_not_finite_is_very_bad_and_still_a_number(tmp_path: Path) -> None:
    program = load("mlp", tmp_path)
    name = list_matrices(program)[0]
    broken = Variant((name,), lambda: {name: torch.full_like(program.module.get_parameter(name), torch.nan)}, "nan")
    for task in ("none", "classification"):
        sensitivity = Sensitivity(program.module, rows(program, task), num_examples=16, seed=0)
        assert sensitivity.measure_alone([broken]) == [LARGEST_EFFECT]
