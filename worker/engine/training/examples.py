"""A recipe's data bound to a model: batches of model inputs and labels, read from disk as they are needed."""

import copy
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from app.recipes.data import Data, Task
from app.recipes.plan import DatasetFormat
from worker.engine.errors import RecipeRefused
from worker.engine.programs.program import Signature
from worker.engine.training.binding import BoundInput, BoundLabels, bind_labels
from worker.engine.training.losses import check_range, compute_loss, count_classes
from worker.engine.training.table import Table

Batch = tuple[tuple[Tensor, ...], Tensor | None]

CHOOSING_FRACTION = 0.1
MAX_CHOOSING_EXAMPLES = 2000


class BoundExamples:
    """Training and held-out rows of a recipe's data. Rows are split and shuffled by the seed, never by chance."""

    def __init__(
        self,
        data: Data,
        signature: Signature,
        training: tuple[list[BoundInput], BoundLabels | None],
        evaluation: tuple[list[BoundInput], BoundLabels | None],
        training_rows: np.ndarray,
        evaluation_rows: np.ndarray,
    ) -> None:
        self.task: Task = data.task
        self.has_labels = data.has_labels
        self.num_training = len(training_rows)
        self.num_evaluation = len(evaluation_rows)
        names = [output.name for output in signature.outputs]
        if data.output is not None and data.output not in names:
            raise RecipeRefused(
                f"recipe.data.output is {data.output!r}; the model's outputs are {names}", code="unknown_output"
            )
        self.output_index = names.index(data.output) if data.output is not None else 0
        self.output_is_named = data.output is not None
        self._output_shape = signature.outputs[self.output_index].shape
        self.fixed_batch = signature.batch_size
        """The only batch size the model takes, or None."""
        self._largest_batch = signature.dynamic_ranges.get("batch", (1, None))[1]
        self._training, self._evaluation = training, evaluation
        self._training_rows, self._evaluation_rows = training_rows, evaluation_rows

    def training_batches(
        self, batch_size: int, *, seed: int, drop_last: bool = False, start: int = 0
    ) -> Iterator[Batch]:
        """Yield (inputs, labels) over the shuffled training part, once, from batch number `start` on.

        A model with a fixed batch gets exactly that batch, and an incomplete last one is dropped.
        """
        size = self.limit_batch(batch_size)
        rows = np.random.default_rng(seed).permutation(self._training_rows)
        if self.fixed_batch is not None and len(rows) < size:
            raise RecipeRefused(
                f"the model takes exactly {size} examples at a time, but only {len(rows)} are there for training",
                code="too_few_examples",
                fix="Upload more rows, or export the model with a dynamic batch.",
            )
        for place in range(start * size, len(rows), size):
            chosen = rows[place : place + size]
            if len(chosen) < size and (drop_last or self.fixed_batch is not None):
                return
            yield _batch(self._training, chosen)

    def num_training_batches(self, batch_size: int, *, drop_last: bool = False) -> int:
        """Return how many batches `training_batches` yields."""
        size = self.limit_batch(batch_size)
        whole, rest = divmod(self.num_training, size)
        return whole + (1 if rest and not drop_last and self.fixed_batch is None else 0)

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        """Yield (inputs, labels) over the held-out part, in order.

        For a model with a fixed batch the last inputs are filled up by repeating a row; the labels are not.
        """
        for inputs, labels, num_rows in self.padded_batches(batch_size):
            yield inputs, None if labels is None else labels[:num_rows]

    def padded_batches(self, batch_size: int) -> Iterator[tuple[tuple[Tensor, ...], Tensor | None, int]]:
        """Yield (inputs, labels, number of real rows) over the held-out part, in order."""
        size = self.limit_batch(batch_size)
        for start in range(0, self.num_evaluation, size):
            chosen = self._evaluation_rows[start : start + size]
            num_rows = len(chosen)
            if self.fixed_batch is not None and num_rows < size:
                chosen = np.concatenate([chosen, np.repeat(chosen[-1:], size - num_rows)])
            inputs, labels = _batch(self._evaluation, chosen)
            yield inputs, labels, num_rows

    def set_apart(self) -> "BoundExamples":
        """Return examples whose held-out part is a tenth of the training rows, for choosing among results.

        Whoever chooses by the rows that are measured in the end reports a number that is too good. With too few rows
        for two parts, all training rows serve both ends.
        """
        num_choosing = min(round(self.num_training * CHOOSING_FRACTION), MAX_CHOOSING_EXAMPLES)
        if num_choosing == 0 or self.num_training - num_choosing < (self.fixed_batch or 1):
            return self._with_rows(self._training_rows, self._training_rows)
        # No seed of the step: every step of a recipe must set the same rows apart, or a later one chooses by rows that
        # an earlier one trained on.
        shuffled = np.random.default_rng(0).permutation(self._training_rows)
        choosing, rest = np.sort(shuffled[:num_choosing]), np.sort(shuffled[num_choosing:])
        return self._with_rows(rest, choosing)

    def _with_rows(self, training_rows: np.ndarray, choosing_rows: np.ndarray) -> "BoundExamples":
        part = copy.copy(self)
        part.num_training, part.num_evaluation = len(training_rows), len(choosing_rows)
        part._training_rows, part._evaluation_rows = training_rows, choosing_rows
        part._evaluation = self._training
        return part

    def limit_batch(self, asked: int) -> int:
        """Return how many examples the model takes at a time where so many are asked for."""
        if self.fixed_batch is not None:
            return self.fixed_batch
        return asked if self._largest_batch is None else min(asked, self._largest_batch)

    def check_labels(self, labels: Tensor) -> None:
        """Refuse labels of a batch for which the output has no class, while they are on the host."""
        num_classes = count_classes(self.task, self._output_shape, labels.shape)
        if num_classes is not None:
            check_range(self.task, labels, num_classes)

    def needs_check(self, labels: Tensor) -> bool:
        """Whether `check_labels` could not tell for labels of this shape: the loss must look at them itself."""
        return count_classes(self.task, self._output_shape, labels.shape) is None

    def loss(self, outputs: tuple[Tensor, ...], labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
        """Return the task's mean loss of one batch (differentiable), whose labels have passed `check_labels`."""
        return compute_loss(
            self.task,
            outputs[self.output_index],
            labels,
            label_smoothing=label_smoothing,
            check=self.needs_check(labels),
        )


def open_examples(
    data: Data,
    files: Mapping[str, tuple[Path, DatasetFormat]],
    signature: Signature,
    seed: int,
    directory: Path | None = None,
    tokenizer: bytes | None = None,
) -> BoundExamples:
    """Bind the recipe's data to a model's inputs. Compressed columns are unpacked once into `directory`.

    `tokenizer` is the model's own (tokenizer.json), for columns of text.
    """
    directory = directory or Path(tempfile.mkdtemp(prefix="examples-"))
    table = Table(data.dataset_id, *files[data.dataset_id], directory, tokenizer)
    training, num_rows = _bind(data, table, signature), table.num_rows
    rng = np.random.default_rng(seed)
    if data.evaluation_dataset_id is not None:
        other = Table(data.evaluation_dataset_id, *files[data.evaluation_dataset_id], directory, tokenizer)
        evaluation = _bind(data, other, signature)
        training_rows = np.arange(num_rows)
        evaluation_rows = np.arange(other.num_rows)
    elif data.split_column is not None:
        evaluation = training
        training_rows, evaluation_rows = table.split(data)
    else:
        if num_rows < 2:
            raise RecipeRefused(
                "the dataset has 1 row; none is left for measuring", code="too_few_examples", fix="Upload more rows."
            )
        evaluation = training
        num_held_out = min(max(round(num_rows * data.evaluation_fraction), 1), num_rows - 1)
        shuffled = rng.permutation(num_rows)
        training_rows, evaluation_rows = np.sort(shuffled[num_held_out:]), np.sort(shuffled[:num_held_out])
    if len(evaluation_rows) > data.max_evaluation_examples:
        evaluation_rows = np.sort(rng.choice(evaluation_rows, data.max_evaluation_examples, replace=False))
    return BoundExamples(data, signature, training, evaluation, training_rows, evaluation_rows)


def _bind(data: Data, table: Table, signature: Signature) -> tuple[list[BoundInput], BoundLabels | None]:
    expected = {tensor.name for tensor in signature.inputs}
    if set(data.inputs) != expected:
        raise RecipeRefused(
            f"recipe.data.inputs binds {sorted(data.inputs)}, the model's inputs are {sorted(expected)}",
            code="inputs_not_bound",
        )
    table.require(binding.column for binding in data.inputs.values())
    table.require(name for name in (data.label_column, data.split_column) if name is not None)
    inputs = [table.bind(tensor, data.inputs[tensor.name], signature.dynamic_ranges) for tensor in signature.inputs]
    label = None if data.label_column is None else table.open_rows(data.label_column, "recipe.data.label_column")
    return inputs, bind_labels(data, label, inputs) if data.has_labels else None


def _batch(bound: tuple[list[BoundInput], BoundLabels | None], rows: np.ndarray) -> Batch:
    inputs, labels = bound
    return tuple(torch.from_numpy(item.read(rows)) for item in inputs), (
        None if labels is None else torch.from_numpy(labels.read(rows))
    )
