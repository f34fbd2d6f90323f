"""Techniques: what can stand in a recipe."""

from functools import cache
from typing import Any

from fastapi import APIRouter
from pydantic import Field

from app.api.views import View
from app.recipes.recipe import KINDS

router = APIRouter(prefix="/v1/techniques", tags=["techniques"])


class TechniqueView(View):
    """A kind of optimization."""

    kind: str
    """Its name in recipes."""
    family: str
    """What it is a kind of."""
    summary: str
    """What it does and what it honestly gains."""
    needs: str
    """What it needs of `recipe.data` with its default parameters: none, inputs or labels.

    Other parameters may need more, as their descriptions say; a dry run tells.
    """
    leaves: str
    """The form of the model after it: module (can be worked on), coded (only other layers can still be) or integer."""
    undone_by: dict[str, str]
    """Kinds that must not follow it, each with the reason."""
    schema_: dict[str, Any] = Field(alias="schema")
    """JSON schema of the step."""
    defaults: dict[str, Any]
    """Parameters that a recipe need not name, with their values."""


class TechniqueList(View):
    """Every technique."""

    items: list[TechniqueView]
    """In the order in which they are usually applied."""


@router.get("", operation_id="list_techniques")
def list_techniques() -> TechniqueList:
    """List every technique with the JSON schema of its parameters and their defaults."""
    return _describe()


@cache
def _describe() -> TechniqueList:
    items = []
    for kind, spec in KINDS.items():
        step = spec.model_validate({"kind": kind})
        items.append(
            TechniqueView(
                kind=kind,
                family=spec.family,
                summary=spec.summary,
                needs=step.data_need().value,
                leaves=spec.leaves.value,
                undone_by=spec.undone_by,
                schema=spec.model_json_schema(),
                defaults=step.model_dump(mode="json", exclude={"kind"}),
            )
        )
    return TechniqueList(items=items)
