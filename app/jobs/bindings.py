"""Do the columns of a dataset fit the inputs of a model, bound as the recipe says?"""

import difflib
from collections.abc import Collection, Iterator

from app.errors import Problem
from app.recipes.data import Data, InputBinding
from app.recipes.facts import ColumnFacts, DatasetFacts, ModelFacts, TensorFacts

DATA = "/recipe/data"
INPUTS = DATA + "/inputs"
ORDERS = {"nhwc_to_nchw": (2, 0, 1), "nchw_to_nhwc": (1, 2, 0)}
"""Layout -> order of the axes of one row."""
TEXT = "string"
"""The dtype of columns of text."""


def find_binding_problems(data: Data, model: ModelFacts, dataset: DatasetFacts) -> Iterator[Problem]:
    """Yield what is wrong with `recipe.data.inputs`."""
    inputs = {tensor.name: tensor for tensor in model.inputs}
    for name, tensor in inputs.items():
        if name not in data.inputs:
            yield Problem(
                INPUTS, f"model input {name!r} ({tensor.dtype} {list(tensor.shape)}) is not bound to a column"
            )
    sizes: dict[str, tuple[int, str]] = {}
    for name, binding in data.inputs.items():
        if name not in inputs:
            yield Problem(point(INPUTS, name), f"the model has no input {name!r}; {suggest(name, inputs)}")
            continue
        column = find_column(dataset, binding.column)
        if column is None:
            columns = [known.name for known in dataset.columns]
            yield Problem(
                point(INPUTS, name, "column"),
                f"the dataset has no column {binding.column!r}; {suggest(binding.column, columns)}",
            )
            continue
        if column.dtype == TEXT:
            problem = _check_text(inputs[name], binding, column, model)
            if problem is not None:
                yield problem
                continue
            tokens = binding.count_tokens(inputs[name].shape[1])
            column = ColumnFacts(name=column.name, dtype="int64", shape=(tokens,))
        else:
            yield from _check_kind(inputs[name], binding, column, dataset)
        yield from _check_column(inputs[name], binding, column, sizes)


def _check_text(tensor: TensorFacts, binding: InputBinding, column: ColumnFacts, model: ModelFacts) -> Problem | None:
    if not tensor.dtype.startswith(("int", "uint")) or len(tensor.shape) != 2:
        return Problem(
            point(INPUTS, tensor.name, "column"),
            f"column {column.name!r} is text, which becomes integers [rows, tokens]; "
            f"input {tensor.name!r} takes {tensor.dtype} {list(tensor.shape)}",
        )
    if not model.tokenizer:
        return Problem(
            point(INPUTS, tensor.name, "column"),
            f"column {column.name!r} is text, and the model was uploaded without a tokenizer that Pare can use; upload "
            "the zip of its Hugging Face folder with tokenizer.json (format=hf), or tokenize the text and upload "
            "the numbers",
        )
    if binding.resize is not None:
        return Problem(point(INPUTS, tensor.name, "resize"), f"column {column.name!r} is text, not images")
    return None


def _check_kind(
    tensor: TensorFacts, binding: InputBinding, column: ColumnFacts, dataset: DatasetFacts
) -> Iterator[Problem]:
    for field in ("tokens", "max_tokens"):
        if getattr(binding, field) is not None:
            yield Problem(
                point(INPUTS, tensor.name, field),
                f"{field} is for text; column {column.name!r} holds {column.dtype}, leave it out",
            )
    if binding.resize is not None and not _holds_images(column, dataset):
        yield Problem(
            point(INPUTS, tensor.name, "resize"),
            f"resize is for the images of a dataset uploaded as format=images; column {column.name!r} is of another "
            "kind",
        )


def _check_column(
    tensor: TensorFacts, binding: InputBinding, column: ColumnFacts, sizes: dict[str, tuple[int, str]]
) -> Iterator[Problem]:
    place = point(INPUTS, tensor.name, "column")
    if not is_float(tensor.dtype):
        if is_float(column.dtype):
            yield Problem(
                place,
                f"input {tensor.name!r} takes {tensor.dtype}; column {column.name!r} holds fractions, {column.dtype}",
            )
        for field, unset in (("scale", 1.0), ("mean", ()), ("std", ())):
            if getattr(binding, field) != unset:
                yield Problem(
                    point(INPUTS, tensor.name, field),
                    f"input {tensor.name!r} takes {tensor.dtype}; {field} would make fractions, leave it out",
                )
    row = list(column.shape)
    if binding.resize is not None and len(row) == 3:
        row = [*binding.resize, row[2]]
    if any(isinstance(size, str) for size in row):
        yield Problem(
            point(INPUTS, tensor.name, "resize"),
            f'the images of column {column.name!r} differ in size; set "resize": [height, width]',
        )
        return
    if binding.layout != "as_is":
        if len(row) != 3:
            yield Problem(
                point(INPUTS, tensor.name, "layout"),
                f"{binding.layout} needs rows of 3 axes; column {column.name!r} has {row} per row",
            )
            return
        row = [row[axis] for axis in ORDERS[binding.layout]]
    expected = list(tensor.shape[1:])
    if not _fits(row, expected):
        resized = "" if binding.resize is None else " after resize"
        arranged = resized if binding.layout == "as_is" else f", {row} after {binding.layout}"
        yield Problem(
            place,
            f"input {tensor.name!r} needs {expected} per row; "
            f"column {column.name!r} has {list(column.shape)}{arranged}{_suggest_layout(binding, row, expected)}",
        )
        return
    for want, have in zip(expected, row, strict=True):
        if isinstance(want, str):
            assert isinstance(have, int)
            size, other = sizes.setdefault(want, (have, tensor.name))
            if size != have:
                yield Problem(
                    place,
                    f"size {want!r} is {have} here and {size} in input {other!r}; it must be equal",
                )
    yield from _check_channels(tensor, binding, row)


def _fits(row: list[int | str], expected: list[int | str]) -> bool:
    return len(row) == len(expected) and all(
        isinstance(want, str) or want == have for want, have in zip(expected, row, strict=True)
    )


def _suggest_layout(binding: InputBinding, row: list[int | str], expected: list[int | str]) -> str:
    """Return what to do where only the order of the axes is wrong, which images that come channels last have."""
    if binding.layout != "as_is" or len(row) != 3:
        return ""
    fitting = [name for name, order in ORDERS.items() if _fits([row[axis] for axis in order], expected)]
    return f'; set "layout": "{fitting[0]}"' if fitting else ""


def _check_channels(tensor: TensorFacts, binding: InputBinding, row: list[int | str]) -> Iterator[Problem]:
    for field, values in (("mean", binding.mean), ("std", binding.std)):
        if len(values) > 1 and (not row or len(values) != row[0]):
            expected = f"one, or {row[0]}, one per channel (axis 1)" if row else "one"
            yield Problem(point(INPUTS, tensor.name, field), f"{len(values)} values given; expected {expected}")


def find_split_problems(data: Data, dataset: DatasetFacts) -> Iterator[Problem]:
    """Yield what is wrong with `recipe.data.split_column`."""
    if data.split_column is None:
        return
    place = point(DATA, "split_column")
    column = find_column(dataset, data.split_column)
    if column is None:
        known = [each.name for each in dataset.columns]
        yield Problem(place, f"the dataset has no column {data.split_column!r}; {suggest(data.split_column, known)}")
    elif is_float(column.dtype) or column.shape:
        yield Problem(
            place,
            f"one text or one integer per row says what it is for; column {column.name!r} is {column.dtype} "
            f"{list(column.shape)}",
        )


def _holds_images(column: ColumnFacts, dataset: DatasetFacts) -> bool:
    return bool(dataset.classes) and len(column.shape) == 3


def is_float(dtype: str) -> bool:
    """Whether numbers of this type have fractions."""
    return dtype.startswith(("float", "bfloat"))


def point(*parts: str | int) -> str:
    """Return a JSON pointer: the first part as it is, the others escaped."""
    return str(parts[0]) + "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts[1:])


def find_column(dataset: DatasetFacts, name: str) -> ColumnFacts | None:
    """Return the column with this name."""
    return next((column for column in dataset.columns if column.name == name), None)


def suggest(name: str, known: Collection[str]) -> str:
    """Return words that help whoever wrote a wrong name."""
    close = difflib.get_close_matches(name, sorted(known), n=3)
    if close:
        return "did you mean " + " or ".join(repr(match) for match in close) + "?"
    listed = sorted(known)
    return "there are " + ", ".join(map(repr, listed[:20])) + (", ..." if len(listed) > 20 else "")
