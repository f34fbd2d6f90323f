"""Students: the smaller model that a recipe goes on with in place of its own, so that `distill` can teach it."""

import re
from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from app.recipes.architectures import MAX_TEXT, parse_architecture
from app.recipes.base import BaseStep

MODEL_ID = re.compile(r"mdl_[a-z0-9]{26}")


class DeriveStudent(BaseStep):
    """Make a narrower and shallower model out of this one; it begins with what is left of this one's weights."""

    kind: Literal["derive_student"]
    """The technique."""
    width: float = Field(0.5, gt=0, le=1)
    """Share of the channels, hidden units, heads and stream width that every layer keeps (before rounding)."""
    depth: float = Field(1.0, gt=0, le=1)
    """Share of the residual blocks that every stage keeps; dropped are those between, evenly (Sanh et al. 2019).
    Blocks that change the shape of what flows through them stay."""
    criterion: Literal["magnitude", "group_norm", "batch_norm_scale"] = "group_norm"
    """Which channels stay: those with the largest L2 norm of their own filter, of all weights that depend on them, or
    the largest scale of the following batch norm."""
    round_to: int = Field(4, ge=1, le=256)
    """Keep counts of channels a multiple of this."""

    family: ClassVar[str] = "distillation"
    summary: ClassVar[str] = "Makes a student from the model's own layers: narrower, shallower, and no longer trained."

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width == self.depth == 1:
            raise ValueError("width and depth are both 1, so the student would be the model itself; lower one of them")
        return self


class TakeStudent(BaseStep):
    """Go on with another model in place of this one: of the catalogue with new random weights, or an uploaded one."""

    kind: Literal["take_student"]
    """The technique."""
    student: str = Field("resnet20", min_length=1, max_length=MAX_TEXT)
    """An architecture, `name` or `name:parameter=number,...` (GET /v1/architectures), or the id of an uploaded model.
    Number of classes and image size are taken from this job's model, whose inputs and output the student must have."""

    family: ClassVar[str] = "distillation"
    summary: ClassVar[str] = "Replaces the model by a student, of the catalogue or uploaded, for distill to teach."
    comes_first: ClassVar[bool] = True

    @field_validator("student")
    @classmethod
    def _check_student(cls, value: str) -> str:
        if not MODEL_ID.fullmatch(value):
            parse_architecture(value)
        return value

    @property
    def model_id(self) -> str | None:
        """The uploaded model, None where the catalogue's architecture is meant."""
        return self.student if MODEL_ID.fullmatch(self.student) else None
