"""How the columns of a dataset become the inputs and labels of a model."""

from typing import Literal, Self

from pydantic import Field, model_validator

from app.recipes.base import Items, Spec

Task = Literal["classification", "regression", "language_modeling", "embedding", "none"]


class InputBinding(Spec):
    """One model input, made from one column: value = (layout(column) * scale - mean) / std, in the input's dtype."""

    column: str = Field(min_length=1, max_length=200)
    """The dataset column."""
    layout: Literal["as_is", "nhwc_to_nchw", "nchw_to_nhwc"] = "as_is"
    """Axis order change of 4-d columns, done first."""
    scale: float = 1.0
    """Factor, for example 0.00392156862745098 for bytes."""
    mean: Items[float] = Field((), max_length=4096)
    """Subtracted after scaling: one number, or one per channel (axis 1 of the result)."""
    std: Items[float] = Field((), max_length=4096)
    """Divided by last: one number, or one per channel (axis 1 of the result)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(value == 0 for value in self.std):
            raise ValueError("std must not contain zero")
        if len(self.mean) > 1 and len(self.std) > 1 and len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} values and std {len(self.std)}; give one per channel to both")
        return self


class Data(Spec):
    """The examples of a recipe and how they are fed to the model."""

    dataset_id: str = Field(pattern=r"^dst_[a-z0-9]{26}$")
    """The uploaded dataset."""
    evaluation_dataset_id: str | None = Field(None, pattern=r"^dst_[a-z0-9]{26}$")
    """A separate dataset for measuring quality; else `evaluation_fraction` of the first is held out."""
    inputs: dict[str, InputBinding] = Field(min_length=1, max_length=64)
    """Model input name -> column binding. Every model input must be bound."""
    label_column: str | None = Field(None, min_length=1, max_length=200)
    """The column with the right answers; null for unlabelled data."""
    task: Task = "none"
    """What the labels mean, hence loss and quality metric. `none`: quality is agreement with the original model."""
    output: str | None = Field(None, min_length=1, max_length=200)
    """The model output that is compared with the labels; null means the first."""
    evaluation_fraction: float = Field(0.2, gt=0, lt=1)
    """Share of the rows held out for measuring (seeded shuffle) when there is no evaluation dataset."""
    max_evaluation_examples: int = Field(5000, ge=1, le=1_000_000)
    """Measure quality on at most this many held-out rows."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        labelled = self.task in ("classification", "regression", "embedding")
        if labelled and self.label_column is None and self.task != "embedding":
            raise ValueError(f"task {self.task!r} needs label_column")
        if self.task == "none" and self.label_column is not None:
            raise ValueError("label_column is set but task is 'none'; say what the labels mean, e.g. 'classification'")
        return self

    @property
    def has_labels(self) -> bool:
        """Whether a loss against right answers can be computed."""
        return self.label_column is not None or self.task == "language_modeling"
