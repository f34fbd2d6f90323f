"""Distillation: repairs without labels, learns from other models, matches layers of other widths, refuses misfits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from app.recipes.distillation import Distill
from app.recipes.pruning import PruneStructured
from app.recipes.training import Train
from tests.engine.techniques.learning import (
    context,
    digit_examples,
    facts,
    make_cnn,
    make_zoo,
    random_examples,
    state_bytes,
)
from worker.engine.errors import RecipeRefused
from worker.engine.programs.program import Program
from worker.engine.techniques import distill, prune_structured, train
from worker.engine.techniques.base import Outcome
from worker.engine.training.examples import BoundExamples
from worker.engine.training.quality import evaluate_module


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Program:
    """A CNN that knows the digits."""
    directory = tmp_path_factory.mktemp("teacher")
    program = make_cnn(width=12)
    step = Train.model_validate({"kind": "train", "epochs": 6, "learning_rate": 0.02})
    outcome = train.run(program, step, context(digit_examples(program, directory)))
    assert outcome.facts["quality_after"] > 0.85  # type: ignore[operator]
    return program


@pytest.fixture(scope="module")
def unlabelled(teacher: Program, tmp_path_factory: pytest.TempPathFactory) -> BoundExamples:
    return digit_examples(teacher, tmp_path_factory.mktemp("unlabelled"), labels=False)


@pytest.fixture(scope="module")
def labelled(teacher: Program, tmp_path_factory: pytest.TempPathFactory) -> BoundExamples:
    return digit_examples(teacher, tmp_path_factory.mktemp("labelled"))


def imitate(program: Program, examples: BoundExamples, teacher: Program, **spec: Any) -> Outcome:
    step = Distill.model_validate({"kind": "distill", "epochs": 2, "learning_rate": 0.01, **spec})
    return distill.run(program, step, context(examples, teacher))


def agreement(program: Program, teacher: Program, unlabelled: BoundExamples) -> float:
    return evaluate_module(program.module.eval(), unlabelled, 256, teacher.module).value


def prune(program: Program) -> Program:
    step = PruneStructured.model_validate({"kind": "prune_structured", "ratio": 0.5})
    outcome = prune_structured.run(program.copy(), step, context_without_data())
    assert isinstance(outcome.program, Program)
    return outcome.program


def context_without_data() -> Any:
    return replace(context(None), examples=None)  # type: ignore[arg-type]


def test_a_pruned_model_is_repaired_without_any_label(teacher: Program, unlabelled: BoundExamples) -> None:
    small = prune(teacher)
    before = agreement(small, teacher, unlabelled)
    outcome = imitate(small, unlabelled, teacher, epochs=4)
    after = agreement(small, teacher, unlabelled)
    assert after > before + 0.1
    assert after > 0.75
    # Epochs are compared by agreement with the teacher, on rows set apart: not with the student itself, which is 1.
    assert outcome.facts["quality_metric"] == "agreement"
    assert outcome.facts["quality_before"] < outcome.facts["quality_after"] < 1.0  # type: ignore[operator]
    assert outcome.facts["best_epoch"] > 0  # type: ignore[operator]
    assert outcome.facts["label_loss_used"] is False
    assert outcome.facts["teacher"] == "original"


def test_the_student_learns_from_the_teacher_and_not_from_the_labels(teacher: Program, labelled: BoundExamples) -> None:
    """A teacher that says 0 for everything makes a student that says 0, whatever the labels are."""
    stubborn, student = teacher.copy(), teacher.copy()
    with torch.no_grad():
        stubborn.module.get_parameter("fc.weight").zero_()
        stubborn.module.get_parameter("fc.bias").copy_(torch.tensor([9.0] + [0.0] * 9))
    outcome = imitate(student, labelled, stubborn, keep_best=False, label_weight=0.0, epochs=1)
    (inputs, _), *_ = labelled.evaluation_batches(256)
    with torch.no_grad():
        chosen = student.module(*inputs)[0].argmax(1)
    assert (chosen == 0).float().mean() > 0.95
    assert any("little to teach" in warning for warning in outcome.warnings)


def test_labels_are_added_by_their_weight(teacher: Program, labelled: BoundExamples) -> None:
    first = {}
    for weight in (0.0, 1.0, 3.0):
        outcome = imitate(teacher.copy(), labelled, teacher, label_weight=weight, max_steps=1, keep_best=False)
        first[weight] = float(outcome.facts["first_loss"])  # type: ignore[arg-type]
        assert outcome.facts["label_loss_used"] is (weight > 0)
    assert first[1.0] > first[0.0]
    assert first[3.0] - first[0.0] == pytest.approx(3 * (first[1.0] - first[0.0]), rel=1e-4)


def test_another_model_teaches_through_layers_of_other_widths_and_sizes(
    teacher: Program, unlabelled: BoundExamples
) -> None:
    student = make_cnn(width=4, stride=2, seed=3)
    spec = {"teacher_model_id": "mdl_" + "t" * 26, "hidden_weight": 1.0, "attention_weight": 1.0}
    outcome = imitate(student, unlabelled, teacher, epochs=4, learning_rate=0.03, **spec)
    assert outcome.facts["teacher"] == "mdl_" + "t" * 26
    assert outcome.facts["pairs"] == "norms.0, norms.1"
    assert outcome.facts["projections"] == 2
    assert outcome.facts["last_loss"] < outcome.facts["first_loss"]  # type: ignore[operator]
    assert agreement(student, teacher, unlabelled) > 0.3
    # Neither hooks nor projections stay behind.
    assert not any(layer._forward_hooks for layer in student.module.modules())
    assert set(student.module.state_dict()) == set(teacher.module.state_dict())


@pytest.mark.parametrize("weight", ["hidden_weight", "attention_weight"])
def test_inner_features_come_closer(teacher: Program, unlabelled: BoundExamples, weight: str) -> None:
    student = make_cnn(width=12, seed=5)
    spec = {
        "soft_weight": 0.0,
        weight: 1.0,
        "keep_best": False,
        "pairs": [{"student": "norms.1", "teacher": "norms.1"}],
    }
    head = student.module.get_parameter("fc.weight").detach().clone()
    outcome = imitate(student, unlabelled, teacher, weight_decay=0.0, **spec)
    assert outcome.facts["last_loss"] < 0.5 * outcome.facts["first_loss"]  # type: ignore[operator]
    # What lies behind the matched layer has nothing to learn from.
    assert torch.equal(student.module.get_parameter("fc.weight").detach(), head)


def test_a_pruned_models_layers_are_paired_by_name(teacher: Program, unlabelled: BoundExamples) -> None:
    small = prune(teacher)
    outcome = imitate(small, unlabelled, teacher, hidden_weight=0.5, attention_weight=0.5, max_steps=3)
    assert outcome.facts["pairs"] == "norms.0, norms.1"
    assert outcome.facts["projections"] == 2


def test_same_seed_same_bits(teacher: Program, unlabelled: BoundExamples) -> None:
    states = []
    for copy in range(2):
        student = make_cnn(width=4, seed=3)
        torch.rand(copy * 7 + 1)
        spec = {"hidden_weight": 1.0, "keep_best": False, "augmentations": ["crop"], "max_steps": 4}
        imitate(student, unlabelled, teacher, **spec)
        states.append(state_bytes(student))
    assert states[0] == states[1]


def test_only_the_projection_learns_where_nothing_before_the_matched_layer_may(
    teacher: Program, unlabelled: BoundExamples
) -> None:
    student = make_cnn(width=4, seed=3)
    student.module.requires_grad_(False)
    student.module.get_parameter("fc.bias").requires_grad_(True)
    outcome = imitate(
        student, unlabelled, teacher, soft_weight=0.0, hidden_weight=1.0, epochs=1, learning_rate=0.05, keep_best=False,
        pairs=[{"student": "norms.0", "teacher": "norms.0"}],
    )  # fmt: skip
    assert outcome.facts["last_loss"] < 0.8 * outcome.facts["first_loss"]  # type: ignore[operator]


def test_models_of_different_depths_are_paired_evenly(teacher: Program, unlabelled: BoundExamples) -> None:
    deep = make_cnn(width=4, depth=3)
    outcome = imitate(deep, unlabelled, teacher, hidden_weight=1.0, max_steps=2, keep_best=False)
    assert outcome.facts["pairs"] == "norms.0, norms.2:norms.1"


def test_pruned_weights_stay_zero(teacher: Program, unlabelled: BoundExamples) -> None:
    student = teacher.copy()
    mask = torch.rand(student.module.get_parameter("convs.1.weight").shape) > 0.7
    student.masks["convs.1.weight"] = mask
    student.apply_masks()
    imitate(student, unlabelled, teacher, max_steps=4, keep_best=False)
    weight = student.module.get_parameter("convs.1.weight").detach()
    assert not weight[~mask].any()
    assert (weight[mask] != teacher.module.get_parameter("convs.1.weight")[mask]).any()


def test_the_original_is_not_changed_by_teaching(teacher: Program, unlabelled: BoundExamples) -> None:
    """In training mode its batch norms would follow the student's batches."""
    opened: list[Program] = []

    def open_original() -> Program:
        opened.append(teacher.copy())
        opened[-1].module.train()
        return opened[-1]

    step = Distill.model_validate({"kind": "distill", "max_steps": 3, "keep_best": False})
    distill.run(prune(teacher), step, replace(context(unlabelled), open_original=open_original))
    assert [state_bytes(each) for each in opened] == [state_bytes(teacher)]


def test_unknown_layers_and_misfits_are_refused(
    teacher: Program, unlabelled: BoundExamples, labelled: BoundExamples
) -> None:
    def code(program: Program, other: Program, **spec: Any) -> str:
        with pytest.raises(RecipeRefused) as caught:
            imitate(program.copy(), unlabelled, other, hidden_weight=1.0, **spec)
        return caught.value.code

    assert code(teacher, teacher, pairs=[{"student": "norm.1", "teacher": "norms.1"}]) == "unknown_layer"
    assert code(teacher, teacher, pairs=[{"student": "norms.1", "teacher": "nrms.1"}]) == "unknown_layer"
    assert code(teacher, teacher, pairs=[{"student": "norms.1", "teacher": "fc"}]) == "layers_do_not_fit"
    with pytest.raises(RecipeRefused) as caught:
        imitate(teacher.copy(), labelled, teacher, attention_weight=1.0, pairs=[{"student": "fc", "teacher": "fc"}])
    assert caught.value.code == "no_attention"
    renamed = teacher.copy()
    renamed.signature = replace(renamed.signature, inputs=(facts("picture", "float32", "batch", 1, 8, 8),))
    fixed = teacher.copy()
    fixed.signature = replace(fixed.signature, batch_size=4)
    wide = teacher.copy()
    wide.module.fc = torch.nn.Linear(24, 11)
    assert [code(teacher, other) for other in (renamed, fixed, wide)] == ["teacher_does_not_fit"] * 3


@pytest.mark.parametrize("name", ["mlp", "vit", "gpt", "lstm_deep", "two_tower", "unet", "mobilenet"])
def test_every_family_of_the_zoo_is_distilled(tmp_path: Path, name: str) -> None:
    original = make_zoo(name)
    student = original.copy()
    with torch.no_grad():
        for parameter in student.module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    task = {"task": "language_modeling"} if name == "gpt" else {"task": "none"}
    examples = random_examples(original, tmp_path / "data", 48, **task)
    weights = {"hidden_weight": 1.0} | (
        {"attention_weight": 1.0} if name in ("vit", "gpt", "unet", "mobilenet") else {}
    )
    outcome = imitate(
        student, examples, original, epochs=4, batch_size=16, learning_rate=2e-3, label_weight=0.0, keep_best=False,
        **weights,
    )  # fmt: skip
    assert outcome.facts["last_loss"] < outcome.facts["first_loss"]  # type: ignore[operator]
    assert outcome.facts["pairs"]


def test_capability_lists_the_layers(teacher: Program) -> None:
    capability = distill.inspect(teacher)
    assert capability.applicable
    assert set(capability.layers) == {"convs.0", "convs.1", "norms.0", "norms.1", "fc"}
