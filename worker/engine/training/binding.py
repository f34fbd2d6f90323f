"""One dataset column as one model input, or as labels: layout, scale, mean, std, dtype."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from app.recipes.data import Data, InputBinding
from app.recipes.facts import TensorFacts
from worker.engine.errors import RecipeRefused
from worker.engine.training.losses import IGNORED_LABEL
from worker.engine.training.rows import Rows

Ranges = Mapping[str, tuple[int, int | None]]
"""Variable size -> smallest and largest allowed value (None: unbounded)."""
AXES = {"as_is": None, "nhwc_to_nchw": (0, 3, 1, 2), "nchw_to_nhwc": (0, 2, 3, 1)}


@dataclass(frozen=True)
class BoundInput:
    """A model input and the column it is made from."""

    name: str
    binding: InputBinding
    column: Rows
    dtype: np.dtype
    text_mask: Rows | None = None
    """Made from text: ones where there are tokens, zeros where there is padding."""

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Return the values of some rows, as the model takes them."""
        binding = self.binding
        values = read_rows(self.column, rows, binding.column)
        axes = AXES[binding.layout]
        if axes is not None:
            values = values.transpose(axes)
        if binding.scale != 1.0 or binding.mean or binding.std:
            precise = np.float64 if self.dtype == np.float64 else np.float32
            values = values.astype(precise)
            if binding.scale != 1.0:
                values *= precise(binding.scale)
            if binding.mean:
                values -= _per_channel(binding.mean, values.ndim, precise)
            if binding.std:
                values /= _per_channel(binding.std, values.ndim, precise)
        return np.ascontiguousarray(values.astype(self.dtype, copy=False))


@dataclass(frozen=True)
class BoundLabels:
    """The column with the right answers, or the tokens that follow each other."""

    column_name: str
    column: Rows
    dtype: np.dtype
    attention_mask: Rows | None = None
    """Where zero, there is padding that must not be predicted."""

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Return the labels of some rows."""
        values = np.ascontiguousarray(read_rows(self.column, rows, self.column_name).astype(self.dtype))
        if self.attention_mask is not None:
            values[self.attention_mask[rows] == 0] = IGNORED_LABEL
        return values


def read_rows(column: Rows, rows: np.ndarray, name: str) -> np.ndarray:
    """Return a copy of some rows of a column, refusing NaN and infinity."""
    values = column[rows]
    if values.dtype.kind == "f":
        finite = np.isfinite(values).reshape(len(rows), -1).all(axis=1)
        if not finite.all():
            row = int(rows[int(np.argmin(finite))])
            raise RecipeRefused(
                f"column {name!r} holds NaN or infinity, first seen in row {row}",
                code="data_not_finite",
                fix="Remove or repair these rows and upload the dataset again.",
            )
    return values


def bind_input(tensor: TensorFacts, binding: InputBinding, column: Rows, ranges: Ranges) -> BoundInput:
    """Check that a column can become a model input."""
    dtype = np.dtype(tensor.dtype)
    shape = column.shape
    axes = AXES[binding.layout]
    where = f"recipe.data.inputs[{tensor.name!r}]"
    if axes is not None:
        if column.ndim != 4:
            raise RecipeRefused(
                f"{where}: layout {binding.layout!r} is for 4-d columns, {binding.column!r} has shape {shape}",
                code="shape_mismatch",
            )
        shape = tuple(shape[axis] for axis in axes)
    if len(shape) != len(tensor.shape) or not all(
        _fits(size, want, ranges) for size, want in zip(shape[1:], tensor.shape[1:], strict=True)
    ):
        raise RecipeRefused(
            f"{where}: column {binding.column!r} gives shape {list(shape)}, the model takes {list(tensor.shape)}",
            code="shape_mismatch",
            fix="Bind another column, set layout, or reshape the column and upload the dataset again.",
        )
    changes = binding.scale != 1.0 or bool(binding.mean) or bool(binding.std)
    if dtype.kind != "f" and (column.dtype.kind == "f" or changes):
        raise RecipeRefused(
            f"{where}: the model takes {dtype.name}, but column {binding.column!r} is {column.dtype.name}"
            + (" and scale, mean or std is set" if changes else ""),
            code="dtype_mismatch",
            fix="Bind an integer column without scale, mean and std.",
        )
    for field, values in (("mean", binding.mean), ("std", binding.std)):
        if len(values) > 1 and (len(shape) < 2 or len(values) != shape[1]):
            raise RecipeRefused(
                f"{where}.{field} has {len(values)} values, axis 1 of {list(shape)} does not",
                code="shape_mismatch",
                fix="Give one number, or one per channel.",
            )
    return BoundInput(tensor.name, binding, column, dtype)


def bind_labels(data: Data, column: Rows | None, inputs: list[BoundInput]) -> BoundLabels:
    """Find the labels of a task and check their kind. `column` is the label column, if one is named."""
    if data.label_column is None or column is None:
        # Language modeling without a label column: the tokens themselves, except where an attention mask says padding.
        tokens = next((item for item in inputs if item.dtype.kind in "iu" and item.column.ndim == 2), None)
        if tokens is None:
            raise RecipeRefused(
                "task 'language_modeling' finds no integer input (rows, tokens) to predict",
                code="labels_do_not_fit",
                fix="Set recipe.data.label_column.",
            )
        mask = next((item.column for item in inputs if item.name == "attention_mask"), tokens.text_mask)
        return BoundLabels(tokens.binding.column, tokens.column, np.dtype(np.int64), mask)
    if data.task in ("classification", "language_modeling"):
        if column.dtype.kind not in "iub":
            raise RecipeRefused(
                f"label column {data.label_column!r} is {column.dtype.name}; task {data.task!r} needs integers",
                code="dtype_mismatch",
                fix="Store the class numbers as int64, or set another task.",
            )
        return BoundLabels(data.label_column, column, np.dtype(np.int64))
    return BoundLabels(data.label_column, column, np.dtype(np.float32))


def _fits(size: int, want: int | str, ranges: Ranges) -> bool:
    if isinstance(want, int):
        return size == want
    low, high = ranges.get(want, (1, None))
    return size >= low and (high is None or size <= high)


def _per_channel(values: tuple[float, ...], ndim: int, dtype: type[np.floating]) -> np.ndarray:
    array = np.asarray(values, dtype=dtype)
    return array if len(values) == 1 else array.reshape(1, -1, *([1] * (ndim - 2)))
