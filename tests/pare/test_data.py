"""Arrays to a dataset file, and columns bound to inputs: by what the user says, by name, by order, or not at all."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from pare.data import bind, write_dataset
from pare.errors import DataUnusable, UsageError
from pare.records import Column, Dataset, DatasetFacts, Model, ModelFacts, Tensor
from pare.resources import dataset_format

DATASET_ID = "dst_" + "a" * 26


def _model(*names: str) -> Model:
    inputs = tuple(Tensor(name, "float32", ("batch", 3)) for name in names)
    facts = ModelFacts(inputs, (), True, None, "eval", 1, 4)
    return Model("mdl_x", "m", "pt2", "ready", 1, "", "", facts)


def _dataset(*names: str) -> Dataset:
    facts = DatasetFacts(10, tuple(Column(name, "float32", (3,)) for name in names))
    return Dataset(DATASET_ID, "d", "npz", "ready", 1, "", "", facts)


def test_columns_feed_inputs_of_their_name_whatever_their_order() -> None:
    data = bind(_model("a", "b"), _dataset("b", "a", "y"), task="classification")

    assert data == {
        "dataset_id": DATASET_ID,
        "inputs": {"a": {"column": "a"}, "b": {"column": "b"}},
        "task": "classification",
        "label_column": "y",
    }


def test_without_a_common_name_columns_feed_inputs_in_order() -> None:
    data = bind(_model("input", "mask"), _dataset("x1", "labels", "x2"), task="regression")

    assert data["inputs"] == {"input": {"column": "x1"}, "mask": {"column": "x2"}}
    assert data["label_column"] == "labels"


@pytest.mark.parametrize("name", ["y", "label", "labels"])
def test_label_column_has_a_default_when_there_is_a_task(name: str) -> None:
    assert bind(_model("x"), _dataset("x", name), task="classification")["label_column"] == name


def test_without_a_task_there_are_no_labels_and_a_column_y_is_left_alone() -> None:
    data = bind(_model("input"), _dataset("x", "y"))

    assert "label_column" not in data
    assert data["inputs"] == {"input": {"column": "x"}}


def test_what_the_user_says_wins_and_the_rest_goes_by_name() -> None:
    image = {"column": "pixels", "scale": 0.5, "layout": "nhwc_to_nchw"}
    data = bind(_model("image", "mask"), _dataset("image", "pixels", "mask"), inputs={"image": image})

    assert data["inputs"] == {"image": image, "mask": {"column": "mask"}}


@pytest.mark.parametrize(
    ("inputs", "columns", "options", "words"),
    [
        (("a", "b"), ("a",), {}, ["no column", "'b'", "['a']"]),
        (("a", "b"), ("p", "q", "r"), {}, ["2 model inputs", "3 columns"]),
        (("a",), ("a",), {"task": "classification"}, ["needs labels", "y, label, labels"]),
        (("a",), ("a",), {"task": "classification", "label_column": "z"}, ["'z'"]),
        (("a",), ("a",), {"inputs": {"typo": "a"}}, ["typo", "['a']"]),
    ],
)
def test_what_cannot_be_bound_is_an_error_that_lists_both_sides(
    inputs: tuple[str, ...], columns: tuple[str, ...], options: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(DataUnusable) as caught:
        bind(_model(*inputs), _dataset(*columns), **options)

    assert caught.value.fix
    for word in words:
        assert word in caught.value.detail


def test_arrays_and_tensors_are_written_as_they_are(tmp_path: Path) -> None:
    x = numpy.arange(6, dtype=numpy.uint8).reshape(3, 2)
    path = write_dataset({"x": x, "y": torch.tensor([1.0, 2.0, 3.0], requires_grad=True)}, tmp_path / "d.npz")

    with numpy.load(path, allow_pickle=False) as stored:
        assert stored["x"].dtype == numpy.uint8
        assert (stored["x"] == x).all()
        assert stored["y"].tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("columns", "word"),
    [
        ({"x": numpy.array(["a", "b"])}, "dtype"),
        ({"x": numpy.array([object()])}, "dtype"),
        ({"x": numpy.zeros(3), "y": numpy.zeros(2)}, "{'x': 3, 'y': 2}"),
        ({"x": numpy.float32(1)}, "single number"),
    ],
)
def test_columns_that_no_model_could_read_are_refused(tmp_path: Path, columns: dict[str, Any], word: str) -> None:
    with pytest.raises(DataUnusable) as caught:
        write_dataset(columns, tmp_path / "d.npz")
    assert word in caught.value.detail
    assert not (tmp_path / "d.npz").exists()


@pytest.mark.parametrize(
    ("name", "format"),
    [("x.npz", "npz"), ("x.safetensors", "safetensors"), ("x.parquet", "parquet"), ("x.ZIP", "images")],
)
def test_suffix_of_a_dataset_says_its_format(name: str, format: str) -> None:
    assert dataset_format(Path(name)) == format


def test_other_suffixes_are_refused() -> None:
    with pytest.raises(UsageError, match=r"x\.csv is neither"):
        dataset_format(Path("x.csv"))


def test_text_feeds_the_integer_inputs_of_a_model_with_its_tokenizer() -> None:
    inputs = tuple(Tensor(name, "int64", ("batch", "sequence")) for name in ("input_ids", "attention_mask"))
    columns = tuple(
        Column(name, dtype, ()) for name, dtype in (("text", "string"), ("y", "int64"), ("split", "string"))
    )
    dataset = Dataset(DATASET_ID, "d", "parquet", "ready", 1, "", "", DatasetFacts(10, columns))
    facts = ModelFacts(inputs, (), True, None, "eval", 1, 4, tokenizer=True)
    model = Model("mdl_x", "m", "hf", "ready", 1, "", "", facts)

    data = bind(model, dataset, task="classification")

    assert data["inputs"] == {"input_ids": {"column": "text"}, "attention_mask": {"column": "text"}}
    assert data["label_column"] == "y"
