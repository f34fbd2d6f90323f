"""Batches in more parts than the recipe says: every step that trains, and nothing else, is changed."""

from typing import Any

from app.recipes.recipe import Recipe
from worker.engine.training.accumulation import split_batches

DATA = {
    "dataset_id": "dst_" + "a" * 26,
    "inputs": {"x": {"column": "x"}},
    "label_column": "y",
    "task": "classification",
}


def recipe_of(*steps: dict[str, Any]) -> Recipe:
    return Recipe.model_validate({"steps": list(steps), "data": DATA})


def test_every_training_takes_its_batches_in_twice_as_many_parts() -> None:
    gradual = {"kind": "prune_magnitude", "schedule": "cubic", "training": {"accumulate": 4}}
    recipe = recipe_of(gradual, {"kind": "finetune", "accumulate": 3}, {"kind": "quantize_float"})

    split = split_batches(recipe, 2)

    assert split.steps[0].training.accumulate == 8  # type: ignore[union-attr]
    assert split.steps[1].accumulate == 6  # type: ignore[union-attr]
    assert split.steps[2] == recipe.steps[2]
    assert split.model_copy(update={"steps": recipe.steps}) == recipe


def test_a_part_holds_one_example_at_least() -> None:
    recipe = recipe_of({"kind": "finetune", "batch_size": 4, "accumulate": 3})

    assert split_batches(recipe, 2).steps[0].accumulate == 4  # type: ignore[union-attr]
