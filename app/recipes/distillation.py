"""Distillation: training a model to behave like another."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from app.recipes.base import BaseStep, DataNeed, Items, Spec
from app.recipes.training import TrainingSettings


class LayerPair(Spec):
    """A layer of the student whose output shall resemble that of a layer of the teacher."""

    student: str = Field(min_length=1, max_length=500)
    """Name of the layer in the model of this job."""
    teacher: str = Field(min_length=1, max_length=500)
    """Name of the layer in the teacher."""


class Distill(TrainingSettings, BaseStep):
    """Train the model to give the teacher's outputs (and, if asked, its inner features); labels help."""

    kind: Literal["distill"]
    """The technique."""
    teacher_model_id: str | None = Field(None, pattern=r"^mdl_[a-z0-9]{26}$")
    """Another uploaded model with the same inputs and output; null: the original of this job (a repair)."""
    temperature: float = Field(4.0, gt=0, le=100)
    """Divides the logits of both before the softmax; the loss is scaled by its square (Hinton et al. 2015)."""
    soft_weight: float = Field(0.9, ge=0, le=1000)
    """Weight of the loss against the teacher's output."""
    label_weight: float = Field(0.1, ge=0, le=1000)
    """Weight of the task's own loss; without labels it is left out."""
    hidden_weight: float = Field(0.0, ge=0, le=1000)
    """Weight of the mean squared difference of hidden states, relative to the teacher's mean square, through a learned
    projection where widths differ."""
    attention_weight: float = Field(0.0, ge=0, le=1000)
    """Weight of the difference of attention: energy maps of convolutions, token relations of transformers."""
    pairs: Items[LayerPair] = Field((), max_length=256)
    """Layers whose outputs to match; empty: up to four norms (else weighted layers), evenly over the depth."""

    family: ClassVar[str] = "distillation"
    summary: ClassVar[str] = "Learns from a teacher's soft outputs and features; works without labels too."

    def data_need(self) -> DataNeed:
        return DataNeed.INPUTS

    @model_validator(mode="after")
    def _check_plan(self) -> Self:
        plan = self.parallel
        if plan is not None and plan.tensor * plan.pipeline > 1 and (self.hidden_weight or self.attention_weight):
            raise ValueError(
                f"hidden_weight and attention_weight look into layers, which {plan.describe()} spreads over ranks; "
                "use parallel.data alone"
            )
        return self

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        if self.soft_weight == self.hidden_weight == self.attention_weight == 0:
            raise ValueError(
                "soft_weight, hidden_weight and attention_weight are all 0, so nothing is learned from the teacher"
            )
        return self
