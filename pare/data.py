"""The user's examples: to a dataset file, and its columns bound to the inputs of a model by clear rules.

Rules for what is not said explicitly in `inputs`:
  1. the label column is no input;
  2. a model input takes the column with its name;
  3. if no input was named by the user or found by its name, inputs take the columns in order, when there are as many.
  4. a model that came with its tokenizer takes the only column of text in each of its integer inputs.
A column of text called "split" is no input. Anything else is an error that lists both sides.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pare.errors import DataUnusable, SetupMissing
from pare.records import Dataset, Model

LABEL_COLUMNS = ("y", "label", "labels")
"""Tried in this order when a task is given without a label column."""
TASKS_WITHOUT_LABEL_COLUMN = ("none", "language_modeling", "embedding")


def write_dataset(columns: Mapping[str, Any], path: Path) -> Path:
    """Write equally long arrays (or CPU tensors) to an uncompressed .npz file."""
    try:
        import numpy
    except ImportError as error:
        raise SetupMissing("uploading arrays", "numpy", "engine") from error
    arrays: dict[str, Any] = {}
    for name, values in columns.items():
        array = numpy.asarray(values.detach().cpu() if hasattr(values, "detach") else values)
        if array.dtype.kind not in "biuf":
            raise DataUnusable(
                f"column {name!r} has dtype {array.dtype}",
                fix="Columns hold booleans, integers or floating-point numbers.",
            )
        if array.ndim == 0:
            raise DataUnusable(f"column {name!r} is a single number", fix="Axis 0 of every column is the example.")
        arrays[name] = array
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) != 1:
        raise DataUnusable(f"columns differ in length: {lengths}", fix="Give every column one row per example.")
    numpy.savez(path, allow_pickle=False, **arrays)
    return path


def bind(
    model: Model,
    dataset: Dataset,
    *,
    task: str = "none",
    label_column: str | None = None,
    inputs: Mapping[str, str | dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Return `recipe.data` for a checked dataset and a checked model."""
    assert model.facts is not None, "bind needs a checked model"
    assert dataset.facts is not None, "bind needs a checked dataset"
    columns = [column.name for column in dataset.facts.columns]
    names = [tensor.name for tensor in model.facts.inputs]
    if label_column is None and task not in TASKS_WITHOUT_LABEL_COLUMN:
        label_column = _find_label_column(columns, task)
    if label_column is not None and label_column not in columns:
        raise DataUnusable(f"there is no column {label_column!r} in {columns}", fix="Name one with label_column=.")
    bindings = {name: _binding(value) for name, value in (inputs or {}).items()}
    unknown = [name for name in bindings if name not in names]
    if unknown:
        raise DataUnusable(f"the model has no input {unknown}, only {names}", fix="Correct the keys of inputs=.")
    texts = [column.name for column in dataset.facts.columns if column.dtype == "string" and column.name != "split"]
    numbers = [column.name for column in dataset.facts.columns if column.dtype != "string"]
    free = [column for column in columns if column != label_column and (column in numbers or column in texts)]
    open_names = [name for name in names if name not in bindings]
    by_name = {name: {"column": name} for name in open_names if name in free}
    if len(texts) == 1 and model.facts.tokenizer:
        whole = [tensor.name for tensor in model.facts.inputs if tensor.dtype.startswith(("int", "uint"))]
        by_name |= {name: {"column": texts[0]} for name in open_names if name in whole and name not in by_name}
    if open_names and not by_name and not bindings:
        by_name = _bind_in_order(names, free, task)
    bindings |= by_name
    missing = [name for name in names if name not in bindings]
    if missing:
        raise DataUnusable(
            f"no column for the model inputs {missing}; columns: {free}",
            fix='Say it: inputs={"' + missing[0] + '": "<column>"}.',
        )
    data: dict[str, Any] = {"dataset_id": dataset.id, "inputs": {name: bindings[name] for name in names}, "task": task}
    if label_column is not None:
        data["label_column"] = label_column
    return data


def _bind_in_order(names: list[str], free: list[str], task: str) -> dict[str, dict[str, Any]]:
    # Without a task, a column that is called like labels is not taken for an input when it is one too many.
    if task == "none" and len(free) == len(names) + 1:
        free = [column for column in free if column not in LABEL_COLUMNS]
    if len(free) != len(names):
        raise DataUnusable(
            f"{len(names)} model inputs {names}, but {len(free)} columns {free}: not bound by name nor by order",
            fix='Say which column feeds which input: inputs={"' + names[0] + '": "<column>", ...}.',
        )
    return {name: {"column": column} for name, column in zip(names, free, strict=True)}


def _find_label_column(columns: list[str], task: str) -> str:
    for name in LABEL_COLUMNS:
        if name in columns:
            return name
    raise DataUnusable(
        f"task {task!r} needs labels, and none of the columns {columns} is called {', '.join(LABEL_COLUMNS)}",
        fix="Name the column with label_column=.",
    )


def _binding(value: str | dict[str, Any]) -> dict[str, Any]:
    return {"column": value} if isinstance(value, str) else dict(value)
