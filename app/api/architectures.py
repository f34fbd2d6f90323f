"""Architectures: the programs that a plain state dict can be uploaded for."""

from functools import cache
from typing import Literal

from fastapi import APIRouter

from app.api.views import View
from app.recipes.architectures import ARCHITECTURES

router = APIRouter(prefix="/v1/architectures", tags=["models"])


class ArchitectureParameterView(View):
    """One parameter of an architecture."""

    name: str
    """Its name in `architecture=name:parameter=number`."""
    type: Literal["integer", "number"]
    """What its value is."""
    default: int | float | None
    """Its value where none is given; null: read from the weights."""
    minimum: float
    """The smallest allowed value."""
    maximum: float
    """The largest allowed value."""
    description: str
    """What it says."""


class ArchitectureView(View):
    """A program of the catalogue."""

    name: str
    """Its name in `architecture`."""
    summary: str
    """What it is."""
    weights: str
    """Whose names the tensors of the state dict must have."""
    parameters: list[ArchitectureParameterView]
    """What can be said about it beside its name."""


class ArchitectureList(View):
    """Every program of the catalogue."""

    items: list[ArchitectureView]
    """By kind."""


@router.get("", operation_id="list_architectures")
def list_architectures() -> ArchitectureList:
    """List the architectures that POST /v1/models?format=safetensors takes."""
    return _describe()


@cache
def _describe() -> ArchitectureList:
    return ArchitectureList(
        items=[
            ArchitectureView(
                name=each.name,
                summary=each.summary,
                weights=each.names,
                parameters=[
                    ArchitectureParameterView(
                        name=name,
                        type="number" if parameter.kind == "number" else "integer",
                        default=parameter.default,
                        minimum=parameter.low,
                        maximum=parameter.high,
                        description=parameter.description,
                    )
                    for name, parameter in each.parameters.items()
                ],
            )
            for each in ARCHITECTURES.values()
        ]
    )
