"""Short ways to write a recipe, completed to the full form that the service takes."""

from collections.abc import Mapping, Sequence
from typing import Any

from pare.errors import UsageError

RecipeLike = Mapping[str, Any] | Sequence[Any]
"""A whole recipe, or only its steps: each an object, or its kind alone where the defaults will do."""


def complete_recipe(recipe: RecipeLike, *, data: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the recipe as a JSON object, with `data` put in where it names none."""
    if isinstance(recipe, str):
        recipe = [recipe]
    whole: dict[str, Any] = dict(recipe) if isinstance(recipe, Mapping) else {"steps": recipe}
    steps = whole.get("steps")
    if not isinstance(steps, Sequence) or isinstance(steps, str):
        raise UsageError(
            f"recipe has no list of steps: {recipe!r:.200}",
            fix='Give {"steps": [{"kind": "finetune"}], ...} or the list of steps alone.',
        )
    whole["steps"] = [{"kind": step} if isinstance(step, str) else dict(step) for step in steps]
    if data is not None:
        # What the recipe says about the data (evaluation_fraction, ...) stays; the binding completes it.
        whole["data"] = {**data, **(whole.get("data") or {})}
    return whole
