"""How the columns of a dataset become the inputs and labels of a model."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from app.recipes.base import Items, Spec

Task = Literal["classification", "regression", "language_modeling", "embedding", "none"]
Tokens = Literal["ids", "mask", "types"]
DEFAULT_MAX_TOKENS = 128
EVALUATION_FRACTION = 0.2


class InputBinding(Spec):
    """One model input, made from one column: value = (layout(column) * scale - mean) / std, in the input's dtype.

    A column of text is made into integers by the model's own tokenizer instead: bind every input to the same column.
    """

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
    resize: Items[Annotated[int, Field(ge=1, le=4096)]] | None = Field(None, min_length=2, max_length=2)
    """Images only: [height, width]. Every image is scaled, keeping its proportions, until it just covers this size,
    and the middle is cut out. Needed where the images differ in size; done before everything else."""
    tokens: Tokens | None = None
    """Text only: the numbers of the tokens, ones where there is a token and zeros where there is padding, or to which
    of two texts a token belongs. Null: as the input's name says ("mask", "type", "segment"), else the numbers."""
    max_tokens: int | None = Field(None, ge=1, le=32768)
    """Text only: longer texts are cut, shorter ones padded on the right. Null: the model's own length if it is fixed,
    else 128."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(value == 0 for value in self.std):
            raise ValueError("std must not contain zero")
        if len(self.mean) > 1 and len(self.std) > 1 and len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} values and std {len(self.std)}; give one per channel to both")
        return self

    def choose_tokens(self, input_name: str) -> Tokens:
        """Return what a column of text becomes for this input."""
        if self.tokens is not None:
            return self.tokens
        name = input_name.lower()
        if "mask" in name:
            return "mask"
        return "types" if "type" in name or "segment" in name else "ids"

    def count_tokens(self, wanted: int | str, largest: int | None = None) -> int:
        """Return how many tokens of a text are kept, for an axis of this size (a word: it may vary up to `largest`)."""
        if self.max_tokens is not None:
            return self.max_tokens
        if isinstance(wanted, int):
            return wanted
        return DEFAULT_MAX_TOKENS if largest is None else min(DEFAULT_MAX_TOKENS, largest)


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
    evaluation_fraction: float = Field(EVALUATION_FRACTION, gt=0, lt=1)
    """Share of the rows held out for measuring (seeded shuffle) when nothing else says what to measure on."""
    split_column: str | None = Field(None, min_length=1, max_length=200)
    """A column that says for each row what it is for; instead of `evaluation_dataset_id` and `evaluation_fraction`."""
    training_split: str = Field("train", min_length=1, max_length=200)
    """With split_column: train on the rows with this value (a number is written as text, e.g. "0")."""
    evaluation_split: str = Field("test", min_length=1, max_length=200)
    """With split_column: measure quality on the rows with this value. Rows with other values are left out."""
    max_evaluation_examples: int = Field(5000, ge=1, le=1_000_000)
    """Measure quality on at most this many held-out rows."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        labelled = self.task in ("classification", "regression", "embedding")
        if labelled and self.label_column is None and self.task != "embedding":
            raise ValueError(f"task {self.task!r} needs label_column")
        if self.split_column is not None and self.evaluation_dataset_id is not None:
            raise ValueError("split_column and evaluation_dataset_id both say what to measure on; give one of them")
        if self.split_column is not None and self.evaluation_fraction != EVALUATION_FRACTION:
            raise ValueError("split_column and evaluation_fraction both say what to measure on; give one of them")
        if self.training_split == self.evaluation_split:
            raise ValueError(f"training_split and evaluation_split are both {self.training_split!r}")
        if self.task == "none" and self.label_column is not None:
            raise ValueError("label_column is set but task is 'none'; say what the labels mean, e.g. 'classification'")
        return self

    @property
    def has_labels(self) -> bool:
        """Whether a loss against right answers can be computed."""
        return self.label_column is not None or self.task == "language_modeling"
