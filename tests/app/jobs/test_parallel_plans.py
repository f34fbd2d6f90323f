"""Plans and students that the facts of a model rule out are refused before anything waits or trains."""

from typing import Any

import pytest

from app.jobs.validate import find_problems
from app.recipes.facts import LayerFacts
from app.recipes.recipe import Recipe
from tests.app.jobs.world import dataset_facts, model_facts

NORM = LayerFacts(name="bn1", type="BatchNorm2d", shape=(8,), parameters=16, macs=None)
DATA = {
    "dataset_id": "dst_" + "a" * 26, "inputs": {"x": {"column": "image"}}, "label_column": "label",
    "task": "classification",
}  # fmt: skip


def find(*steps: dict[str, Any], **model: Any) -> dict[str, str]:
    """Return place -> problem of these steps with the world's data."""
    recipe = Recipe.model_validate({"steps": steps, "data": DATA})
    return {each.pointer: each.detail for each in find_problems(recipe, model_facts(**model), dataset_facts(), None)}


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        ({"data": 2}, None),
        ({"pipeline": 2, "num_microbatches": 1}, None),
        ({"pipeline": 2}, "has batch norms (bn1 is the first of 1), which would see one of 4 micro-batches"),
        ({"pipeline": 4, "num_microbatches": 1}, "3 layers with weights cannot make 4 pipeline stages"),
        ({"tensor": 2}, "between two linear layers, and the model has 1"),
    ],
    ids=["data", "whole-batches", "micro-batches", "stages", "tensor"],
)
def test_a_plan_that_cannot_train_the_model_is_refused(plan: dict[str, Any], expected: str | None) -> None:
    layers = (*model_facts().layers, NORM)
    problems = find({"kind": "finetune", "parallel": plan}, layers=layers)
    assert list(problems) == ([] if expected is None else ["/recipe/steps/0/parallel"])
    assert expected is None or expected in problems["/recipe/steps/0/parallel"]
    student = {"kind": "take_student", "student": "resnet20"}
    assert find(student, {"kind": "distill", "parallel": plan}, layers=layers) == {}, "another model is trained"


@pytest.mark.parametrize(
    ("student", "expected"),
    [
        ("resnet20", None),
        ("vit:patch=4,width=64,depth=2", None),
        ("vit:depth=2", "to read its patch, width from; write vit:depth=2,patch=N,width=N"),
        ("vit:patch=3,width=64,depth=2", "image_size 8 is no multiple of patch 3"),
        ("resnet20:num_classes=100", "resnet20:num_classes=100, and the model's is 10"),
    ],
    ids=["all-read", "all-given", "missing", "patches", "classes"],
)
def test_an_architecture_that_cannot_take_the_models_place_is_refused(student: str, expected: str | None) -> None:
    problems = find({"kind": "take_student", "student": student}, {"kind": "distill"})
    assert list(problems) == ([] if expected is None else ["/recipe/steps/0/student"])
    assert expected is None or expected in problems["/recipe/steps/0/student"]
