"""Taking batches in smaller parts than a recipe says, where memory ran out."""

from typing import Any

from app.recipes.recipe import Recipe
from app.recipes.training import TrainingSettings


def split_batches(recipe: Recipe, factor: int) -> Recipe:
    """Return the recipe with `factor` times as many parts per batch in everything that trains, one example at least."""
    if factor == 1:
        return recipe
    steps: list[Any] = []
    for step in recipe.steps:
        training = getattr(step, "training", None)
        if isinstance(step, TrainingSettings):
            steps.append(_split(step, factor))
        elif training is not None:
            steps.append(step.model_copy(update={"training": _split(training, factor)}))
        else:
            steps.append(step)
    return recipe.model_copy(update={"steps": tuple(steps)})


def _split(settings: TrainingSettings, factor: int) -> TrainingSettings:
    return settings.model_copy(update={"accumulate": min(settings.accumulate * factor, settings.batch_size)})
