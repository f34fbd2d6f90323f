"""One dataset as a recipe uses it: its columns as numbers, whatever they are made from, and which rows are for what."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np

from app.recipes.data import Data, InputBinding
from app.recipes.facts import TensorFacts
from app.recipes.plan import DatasetFormat
from worker.engine.errors import RecipeRefused
from worker.engine.training.binding import BoundInput, Ranges, bind_input
from worker.engine.training.columns import Column
from worker.engine.training.datasets import read_columns
from worker.engine.training.rows import Rows
from worker.engine.training.text import encode_texts


class Table:
    """The columns of a dataset file. What must be decoded or tokenized is so once, into files in `directory`."""

    def __init__(
        self, dataset_id: str, path: Path, format: DatasetFormat, directory: Path, tokenizer: bytes | None
    ) -> None:
        self._path, self._directory, self._tokenizer = path, directory, tokenizer
        self._columns = {column.name: column for column in read_columns(path, format)}
        self._dataset_id = dataset_id
        self.num_rows = next(iter(self._columns.values())).num_rows

    def require(self, names: Iterable[str]) -> None:
        """Refuse columns that are not there."""
        missing = sorted(set(names) - self._columns.keys())
        if missing:
            raise RecipeRefused(
                f"dataset {self._dataset_id} has no column {missing}; its columns are {sorted(self._columns)}",
                code="unknown_column",
            )

    def bind(self, tensor: TensorFacts, binding: InputBinding, ranges: Ranges) -> BoundInput:
        """Make a model input from the column that it is bound to."""
        column = self._columns[binding.column]
        where = f"recipe.data.inputs[{tensor.name!r}]"
        if column.dtype is None:
            return self._bind_text(tensor, binding, ranges, column)
        if binding.tokens is not None or binding.max_tokens is not None:
            raise RecipeRefused(
                f"{where}: tokens and max_tokens are for text; column {column.name!r} is {column.dtype.name}",
                code="dtype_mismatch",
            )
        if binding.resize is not None:
            resized = column.resized((binding.resize[0], binding.resize[1]))
            if resized is None:
                raise RecipeRefused(
                    f"{where}: resize is for images; column {column.name!r} is of another kind",
                    code="dtype_mismatch",
                    fix="Leave resize out, or upload the images as a zip (format=images).",
                )
            column = resized
        self._check_sizes(column, where)
        return bind_input(tensor, binding, column.open_rows(self._path, self._directory), ranges)

    def open_rows(self, name: str, where: str) -> Rows:
        """Return a column of numbers as it is."""
        column = self._columns[name]
        if column.dtype is None:
            raise RecipeRefused(
                f"{where}: column {name!r} is text",
                code="dtype_mismatch",
                fix="Store numbers, for example the number of the class.",
            )
        self._check_sizes(column, where)
        return column.open_rows(self._path, self._directory)

    def split(self, data: Data) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows for training and for measuring, as the split column says."""
        assert data.split_column is not None
        column = self._columns[data.split_column]
        if column.dtype is not None and (column.dtype.kind not in "iub" or len(column.shape) != 1):
            raise RecipeRefused(
                f"recipe.data.split_column: column {column.name!r} is {column.dtype.name} {list(column.shape)}",
                code="dtype_mismatch",
                fix="Name a column with one text or one integer per row.",
            )
        names = (data.training_split, data.evaluation_split)
        if column.dtype is None:
            texts = chain.from_iterable(column.read_texts(self._path))
            codes = np.fromiter((names.index(text) if text in names else 2 for text in texts), np.int8, self.num_rows)
            training, evaluation = np.flatnonzero(codes == 0), np.flatnonzero(codes == 1)
        else:
            numbers = column.open_rows(self._path, self._directory)[:].astype(np.int64)
            training, evaluation = (np.flatnonzero(numbers == _number(name)) for name in names)
        for field, rows in (("training_split", training), ("evaluation_split", evaluation)):
            if not len(rows):
                raise RecipeRefused(
                    f"recipe.data.{field}: no row has {getattr(data, field)!r} in column {column.name!r}",
                    code="empty_split",
                    fix=f"Set {field} to a value that the column holds.",
                )
        return training, evaluation

    def _bind_text(self, tensor: TensorFacts, binding: InputBinding, ranges: Ranges, column: Column) -> BoundInput:
        where = f"recipe.data.inputs[{tensor.name!r}]"
        if not tensor.dtype.startswith(("int", "uint")) or len(tensor.shape) != 2:
            raise RecipeRefused(
                f"{where}: column {column.name!r} is text, which becomes integers [rows, tokens]; the model takes "
                f"{tensor.dtype} {list(tensor.shape)}",
                code="dtype_mismatch",
                fix="Bind a column of numbers.",
            )
        if binding.resize is not None or binding.layout != "as_is":
            raise RecipeRefused(f"{where}: column {column.name!r} is text, not images", code="dtype_mismatch")
        size = tensor.shape[1]
        largest = ranges.get(size, (1, None))[1] if isinstance(size, str) else None
        arrays = encode_texts(self._path, column, self._tokenizer, binding.count_tokens(size, largest), self._directory)
        bound = bind_input(tensor, binding, arrays[binding.choose_tokens(tensor.name)], ranges)
        return replace(bound, text_mask=arrays["mask"])

    def _check_sizes(self, column: Column, where: str) -> None:
        if not all(isinstance(size, int) for size in column.shape):
            raise RecipeRefused(
                f"{where}: the images of column {column.name!r} differ in size",
                code="images_differ_in_size",
                fix='Set "resize": [height, width] in the binding.',
            )


def _number(value: str) -> int | None:
    try:
        return int(value)
    except ValueError:
        return None
