"""What every part of the request language shares: strict, frozen, JSON-only models, and the base of all steps."""

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

T = TypeVar("T")
Runtime = Literal["onnxruntime", "torch", "aotinductor"]
Items = Annotated[tuple[T, ...], Field(strict=False)]
"""An immutable sequence that a JSON array, hence a Python list, may fill; its items stay strict."""


class Spec(BaseModel):
    """A piece of a request. Unknown fields are refused, types are not coerced, values never change after validation."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _read_whole_numbers(cls, data: object) -> object:
        """Let 2.0 be an integer, as it is to JSON Schema (2020-12, core, 4.2.3); a field for fractions takes it too."""
        if not isinstance(data, dict):
            return data
        return {
            name: [_read_whole(each) for each in value] if isinstance(value, list) else _read_whole(value)
            for name, value in data.items()
        }


def _read_whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


class DataNeed(StrEnum):
    """How much data a step needs from the recipe, from nothing to labelled examples."""

    NONE = "none"
    INPUTS = "inputs"
    LABELS = "labels"


class Form(StrEnum):
    """What a step works on and leaves behind."""

    MODULE = "module"
    """A trainable torch module."""
    CODED = "coded"
    """A module whose weights stand in few bits: training would undo that, coding other layers would not."""
    INTEGER = "integer"
    """A program that computes in integers: final, it can only be measured and downloaded."""


class BaseStep(Spec):
    """One technique with its parameters. Subclasses add `kind`, their fields and the facts below."""

    family: ClassVar[str]
    """The row of the technique table: pruning, quantization, training, ..."""
    summary: ClassVar[str]
    """One sentence: what it does and what it honestly gains."""
    takes: ClassVar[frozenset[Form]] = frozenset({Form.MODULE})
    """The forms this step can work on."""
    leaves: ClassVar[Form] = Form.MODULE
    """The form of the program after this step."""
    fills_zeros: ClassVar[bool] = False
    """Whether it leaves zeros that only a packed file does not store."""
    undone_by: ClassVar[dict[str, str]] = {}
    """Kinds that must not come later in the recipe, each with the reason."""
    comes_first: ClassVar[bool] = False
    """Whether it forgets what earlier steps did, so that it may only be the first."""

    def data_need(self) -> DataNeed:
        """Return what this step, with these parameters, needs from `recipe.data`."""
        return DataNeed.NONE

    def refuse_runtime(self, runtime: Runtime) -> str | None:
        """Return why what this step leaves, when it is the last, cannot run there; None where it can."""
        if self.leaves is Form.INTEGER and runtime != "onnxruntime":
            return "it makes an ONNX model"
        return None

    def changed(self, *names: str) -> list[str]:
        """Return those of these fields that differ from their defaults.

        To refuse a field without effect: being given does not tell, for a recipe read back from the database gives all.
        """
        fields = type(self).model_fields
        return sorted(name for name in names if getattr(self, name) != fields[name].default)

    def refuse(self, layer_types: Sequence[str]) -> str | None:  # noqa: ARG002 - most steps take every layer they list
        """Return why these parameters cannot work on layers of these types, None where they can.

        `layer_types` are those of the layers that the model's capabilities list for this kind, without `skip_layers`.
        """
        return None
