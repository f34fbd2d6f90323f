"""Do the labels of a dataset fit an output of a model, for the task that the recipe names?"""

from collections.abc import Iterator, Sequence

from app.errors import Problem
from app.jobs.bindings import DATA, TEXT, find_column, is_float, point, suggest
from app.recipes.data import Data
from app.recipes.facts import ColumnFacts, DatasetFacts, ModelFacts, TensorFacts

Shape = Sequence[int | str]
LABEL_COLUMN = point(DATA, "label_column")


def find_label_problems(data: Data, model: ModelFacts, dataset: DatasetFacts) -> Iterator[Problem]:
    """Yield what is wrong with `recipe.data.label_column`, `task` and `output`."""
    outputs = {output.name: output for output in model.outputs}
    if data.output is not None and data.output not in outputs:
        expected = suggest(data.output, outputs)
        yield Problem(point(DATA, "output"), f"the model has no output {data.output!r}; {expected}")
        return
    output = outputs[data.output] if data.output else model.outputs[0]
    if data.task == "language_modeling":
        yield from _check_tokens(data, model, output)
    if data.label_column is None:
        return
    column = find_column(dataset, data.label_column)
    if column is None:
        expected = suggest(data.label_column, [known.name for known in dataset.columns])
        yield Problem(LABEL_COLUMN, f"the dataset has no column {data.label_column!r}; {expected}")
    elif column.dtype == TEXT:
        yield Problem(
            LABEL_COLUMN,
            f"labels are numbers, and column {column.name!r} is text; store the number of each class, or leave "
            "label_column out to predict the tokens of the text"
            if data.task == "language_modeling"
            else f"labels are numbers, and column {column.name!r} is text; store the number of each class",
        )
    elif data.task in ("classification", "language_modeling"):
        yield from _check_classes(data, column, output)
    elif not _same_numbers(column.shape, output.shape[1:]):
        yield Problem(
            LABEL_COLUMN,
            f"task {data.task!r} needs labels like output {output.name!r}, {list(output.shape[1:])} per row; "
            f"column {column.name!r} has {list(column.shape)}",
        )


def _check_tokens(data: Data, model: ModelFacts, output: TensorFacts) -> Iterator[Problem]:
    if len(output.shape) != 3:
        yield Problem(
            point(DATA, "task"),
            "language_modeling needs an output of [batch, sequence, vocabulary]; "
            f"{output.name!r} is {list(output.shape)}",
        )
    if data.label_column is None and not any(
        len(tensor.shape) == 2 and not is_float(tensor.dtype) for tensor in model.inputs
    ):
        yield Problem(
            LABEL_COLUMN, "no input of the model takes integers [batch, sequence]; name the column to predict"
        )


def _check_classes(data: Data, column: ColumnFacts, output: TensorFacts) -> Iterator[Problem]:
    if is_float(column.dtype):
        yield Problem(
            LABEL_COLUMN,
            f"labels of task {data.task!r} are integers, the class numbers; column {column.name!r} is {column.dtype}",
        )
    row: Shape = output.shape[1:] or (1,)  # an output of one number per row is a binary score
    labels = () if column.shape == (1,) else column.shape
    # One class number per vector of scores; the classes are the first or the last axis of a row.
    if not (_fits(labels, row[1:]) or _fits(labels, row[:-1])):
        expected = "one number per row" if len(row) == 1 else f"{list(row[1:])} or {list(row[:-1])} per row"
        yield Problem(
            LABEL_COLUMN,
            f"labels for output {output.name!r} of {list(output.shape)} are {expected}; "
            f"column {column.name!r} has {list(column.shape)} per row",
        )


def _fits(have: Shape, want: Shape) -> bool:
    return len(have) == len(want) and all(isinstance(w, str) or h == w for h, w in zip(have, want, strict=True))


def _same_numbers(have: Shape, want: Shape) -> bool:
    return _fits([size for size in have if size != 1], [size for size in want if size != 1])
