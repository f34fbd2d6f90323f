"""A recipe that does not fit is refused before it waits in a queue, with every problem at once and what is expected."""

from typing import Any, Protocol

import pytest

from app.jobs.validate import find_problems
from app.recipes.facts import Capability, ColumnFacts, DatasetFacts, TensorFacts
from app.recipes.recipe import Recipe
from tests.app.jobs.world import dataset_facts, model_facts

DATASET, OTHER = "dst_" + "a" * 26, "dst_" + "b" * 26


def recipe(*steps: dict[str, Any], **data: Any) -> Recipe:
    bound = {"dataset_id": DATASET, "inputs": {"x": {"column": "image"}}} | data
    return Recipe.model_validate({"steps": steps or ({"kind": "prune_magnitude"},), "data": bound})


def tensor(name: str, dtype: str, *shape: int | str) -> TensorFacts:
    return TensorFacts(name=name, dtype=dtype, shape=shape)


class Find(Protocol):
    """Finds problems of a recipe with the world's model and dataset, changed as told."""

    def __call__(
        self,
        recipe: Recipe,
        *,
        dataset: DatasetFacts | None = None,
        evaluation: DatasetFacts | None = None,
        **model: Any,
    ) -> dict[str, str]: ...


@pytest.fixture
def find() -> Find:
    def find(
        recipe: Recipe,
        *,
        dataset: DatasetFacts | None = None,
        evaluation: DatasetFacts | None = None,
        **model: Any,
    ) -> dict[str, str]:
        facts = model_facts(**model)
        problems = find_problems(recipe, facts, dataset or dataset_facts(), evaluation)
        return {problem.pointer: problem.detail for problem in problems}

    return find


LABELS = {"label_column": "label", "task": "classification"}


def test_fitting_recipes_have_no_problems(find: Find) -> None:
    assert find(recipe({"kind": "prune_structured"}, {"kind": "finetune"}, **LABELS)) == {}
    assert find(Recipe.model_validate({"steps": [{"kind": "prune_magnitude"}]})) == {}
    nhwc = dataset_facts(image=("uint8", (8, 8, 3)))
    statistics = {"mean": [0.5, 0.4, 0.3], "std": [0.2]}
    bound = {"x": {"column": "image", "layout": "nhwc_to_nchw", **statistics}}
    assert find(recipe(inputs=bound), dataset=nhwc) == {}
    assert find(recipe(task="embedding")) == {}


def test_all_problems_are_found_at_once(find: Find) -> None:
    problems = find(
        recipe(
            {"kind": "prune_magnitude", "skip_layers": ["konv"]},
            inputs={"y": {"column": "image"}},
            label_column="lable",
            task="classification",
        )
    )
    assert set(problems) == {
        "/recipe/steps/0/skip_layers/0",
        "/recipe/data/inputs",
        "/recipe/data/inputs/y",
        "/recipe/data/label_column",
    }
    assert problems["/recipe/steps/0/skip_layers/0"] == "the model has no layer 'konv'; did you mean 'conv'?"
    assert problems["/recipe/data/inputs"] == "model input 'x' (float32 ['batch', 3, 8, 8]) is not bound to a column"
    assert problems["/recipe/data/inputs/y"] == "the model has no input 'y'; there are 'x'"
    assert problems["/recipe/data/label_column"] == "the dataset has no column 'lable'; did you mean 'label'?"


@pytest.mark.parametrize(
    ("binding", "columns", "field", "expected"),
    [
        ({"column": "pixels"}, {"image": ("uint8", (3, 8, 8))}, "column", "no column 'pixels'; there are 'image'"),
        (
            {},
            {"image": ("uint8", (8, 8, 3))},
            "column",
            """needs [3, 8, 8] per row; column 'image' has [8, 8, 3]; set "layout": "nhwc_to_nchw\"""",
        ),
        ({}, {"image": ("uint8", (3, 8))}, "column", "needs [3, 8, 8] per row; column 'image' has [3, 8]"),
        (
            {"layout": "nhwc_to_nchw"},
            {"image": ("uint8", (8, 4, 3))},
            "column",
            "column 'image' has [8, 4, 3], [3, 8, 4] after nhwc_to_nchw",
        ),
        (
            {"layout": "nchw_to_nhwc"},
            {"image": ("uint8", (3, 8, 8))},
            "column",
            "column 'image' has [3, 8, 8], [8, 8, 3] after nchw_to_nhwc",
        ),
        ({"layout": "nhwc_to_nchw"}, {"image": ("uint8", (64,))}, "layout", "needs rows of 3 axes"),
        ({"mean": [0.1, 0.2]}, {"image": ("uint8", (3, 8, 8))}, "mean", "2 values given; expected one, or 3"),
        ({"std": [1.0] * 8}, {"image": ("uint8", (3, 8, 8))}, "std", "8 values given; expected one, or 3"),
    ],
)
def test_column_must_fit_its_input(
    find: Find, binding: dict[str, Any], columns: dict[str, Any], field: str, expected: str
) -> None:
    problems = find(recipe(inputs={"x": {"column": "image"} | binding}), dataset=dataset_facts(**columns))
    assert list(problems) == [f"/recipe/data/inputs/x/{field}"]
    assert expected in problems[f"/recipe/data/inputs/x/{field}"]


def test_fractions_do_not_feed_integer_inputs(find: Find) -> None:
    problems = find(
        recipe(inputs={"ids": {"column": "ids"}}),
        inputs=[tensor("ids", "int64", "batch", "sequence")],
        dataset=dataset_facts(ids=("float32", (16,))),
    )
    assert "takes int64" in problems["/recipe/data/inputs/ids/column"]
    problems = find(
        recipe(inputs={"ids": {"column": "ids", "scale": 0.5, "mean": [1.0], "std": [2.0]}}),
        inputs=[tensor("ids", "int64", "batch", "sequence")],
        dataset=dataset_facts(ids=("int32", (16,))),
    )
    assert [pointer.rsplit("/", 1)[1] for pointer in problems] == ["scale", "mean", "std"]


def test_sizes_that_the_model_calls_the_same_are_the_same(find: Find) -> None:
    inputs = [tensor("ids", "int64", "batch", "sequence"), tensor("mask", "int64", "batch", "sequence")]
    bound = recipe(inputs={"ids": {"column": "ids"}, "mask": {"column": "mask"}})
    fitting = dataset_facts(ids=("int64", (16,)), mask=("int64", (16,)))
    assert find(bound, inputs=inputs, dataset=fitting) == {}
    problems = find(bound, inputs=inputs, dataset=dataset_facts(ids=("int64", (16,)), mask=("int64", (12,))))
    assert problems == {
        "/recipe/data/inputs/mask/column": "size 'sequence' is 12 here and 16 in input 'ids'; it must be equal"
    }


def test_pointers_are_escaped(find: Find) -> None:
    assert "/recipe/data/inputs/a~1b~0c" in find(recipe(inputs={"a/b~c": {"column": "image"}}))


@pytest.mark.parametrize(
    ("output", "column", "expected"),
    [
        (("batch", 10), ("int32", ()), None),
        (("batch", 10), ("uint8", (1,)), None),
        (("batch",), ("bool", ()), None),  # a binary score
        (("batch", 10), ("float32", ()), "labels of task 'classification' are integers"),
        (("batch", 10), ("int64", (10,)), "are one number per row; column 'label' has [10]"),
        (("batch", 10), ("uint8", (1, 1)), "are one number per row"),
        (("batch", 4, 8, 8), ("int64", (8, 8)), None),  # one class per pixel
        (("batch", "length", 4), ("int64", (7,)), None),  # one class per token
        (("batch", 4, 8, 8), ("int64", (8, 9)), "are [8, 8] or [4, 8] per row; column 'label' has [8, 9]"),
        (("batch", 4, 8, 8), ("int64", ()), "are [8, 8] or [4, 8] per row"),
    ],
)
def test_labels_are_one_class_number_per_vector_of_scores(
    find: Find, output: Any, column: Any, expected: str | None
) -> None:
    dataset = dataset_facts(image=("uint8", (3, 8, 8)), label=column)
    problems = find(recipe(**LABELS), dataset=dataset, outputs=[tensor("logits", "float32", *output)])
    assert list(problems) == (["/recipe/data/label_column"] if expected else [])
    assert (expected or "") in "".join(problems.values())


@pytest.mark.parametrize(
    ("task", "output", "fits"),
    [
        ("regression", ("batch", 1), True),
        ("regression", ("batch",), True),
        ("regression", ("batch", 2), False),
        ("embedding", ("batch", 2), False),
    ],
)
def test_values_have_the_shape_of_the_output(find: Find, task: str, output: Any, fits: bool) -> None:
    problems = find(recipe(task=task, label_column="label"), outputs=[tensor("logits", "float32", *output)])
    assert list(problems) == ([] if fits else ["/recipe/data/label_column"])


def test_language_modeling_predicts_tokens(find: Find) -> None:
    bound = recipe(inputs={"ids": {"column": "ids"}}, task="language_modeling")
    model: dict[str, Any] = {"inputs": [tensor("ids", "int64", "batch", "sequence")]}
    dataset = dataset_facts(ids=("int64", (16,)))
    scores = [tensor("scores", "float32", "batch", "sequence", 1000)]
    assert find(bound, dataset=dataset, outputs=scores, **model) == {}
    assert list(find(bound, dataset=dataset, **model)) == ["/recipe/data/task"]
    assert list(find(recipe(task="language_modeling"), outputs=scores)) == ["/recipe/data/label_column"]


def test_regression_labels_have_the_shape_of_the_named_output(find: Find) -> None:
    outputs = [tensor("a", "float32", "batch", 3), tensor("b", "float32", "batch", 4, "width")]
    dataset = dataset_facts(image=("uint8", (3, 8, 8)), label=("float32", (4, 9)))
    data = {"label_column": "label", "task": "regression"}
    assert find(recipe(output="b", **data), outputs=outputs, dataset=dataset) == {}
    assert (
        "[3] per row" in find(recipe(output="a", **data), outputs=outputs, dataset=dataset)["/recipe/data/label_column"]
    )
    problems = find(recipe(output="c", **data), outputs=outputs, dataset=dataset)
    assert problems == {"/recipe/data/output": "the model has no output 'c'; there are 'a', 'b'"}


@pytest.mark.parametrize(
    ("num_rows", "batch_size", "expected"),
    [
        (100, 80, None),
        (100, 81, "80 of 100 rows are for training, too few: the model was exported with a fixed batch of 81"),
        (40, 50, "32 of 40 rows"),
        (2, None, None),  # one is always held out, one is always left
        (1, None, "has 1 rows; one to train on and one to measure on"),
        (0, None, "has 0 rows"),
    ],
)
def test_rows_must_suffice(find: Find, num_rows: int, batch_size: int | None, expected: str | None) -> None:
    problems = find(recipe(), dataset=dataset_facts(num_rows), batch_size=batch_size, dynamic_batch=not batch_size)
    assert list(problems) == (["/recipe/data/dataset_id"] if expected else [])
    assert (expected or "") in "".join(problems.values())


def test_evaluation_dataset_is_like_the_first(find: Find) -> None:
    bound = recipe(evaluation_dataset_id=OTHER, **LABELS)
    assert find(bound, evaluation=dataset_facts(1)) == {}
    assert find(bound, dataset=dataset_facts(1), evaluation=dataset_facts(1)) == {}
    assert list(find(bound, evaluation=dataset_facts(0))) == ["/recipe/data/evaluation_dataset_id"]
    assert list(find(bound, dataset=dataset_facts(0), evaluation=dataset_facts(1))) == ["/recipe/data/dataset_id"]
    other = DatasetFacts(num_rows=9, columns=(ColumnFacts(name="image", dtype="float32", shape=(3, 8, 8)),))
    problems = [problem.detail for problem in find_problems(bound, model_facts(), dataset_facts(), other)]
    assert len(problems) == 2
    assert "column 'image' is float32 [3, 8, 8] here and uint8" in problems[0]
    assert "no column 'label'" in problems[1]


def test_what_was_learned_is_not_measured_on_the_same_rows(find: Find) -> None:
    same = recipe({"kind": "finetune"}, **LABELS)
    assert same.data is not None
    again = {"evaluation_dataset_id": same.data.dataset_id}
    problems = find(recipe({"kind": "finetune"}, **LABELS, **again), evaluation=dataset_facts(10))
    assert list(problems) == ["/recipe/data/evaluation_dataset_id"]
    assert "too good" in problems["/recipe/data/evaluation_dataset_id"]
    assert find(recipe({"kind": "prune_magnitude"}, **LABELS, **again), evaluation=dataset_facts(10)) == {}


def test_step_that_cannot_work_on_the_model_is_refused_with_the_reason(find: Find) -> None:
    missing = "no layer has channels to remove"
    capability = Capability(kind="prune_structured", applicable=False, layers=(), missing=missing)
    steps = Recipe.model_validate({"steps": [{"kind": "prune_structured"}, {"kind": "prune_magnitude"}]})
    assert find(steps, capabilities=[capability]) == {
        "/recipe/steps/0/kind": f"prune_structured cannot work on this model: {missing}"
    }


def test_step_needs_a_layer_to_work_on(find: Find) -> None:
    steps = {"steps": [{"kind": "prune_structured", "skip_layers": ["conv", "head"]}]}
    problems = find(Recipe.model_validate(steps))
    assert problems == {"/recipe/steps/0/skip_layers": "all 1 layers that prune_structured works on are left out"}
    assert find(Recipe.model_validate({"steps": [{"kind": "prune_structured", "skip_layers": ["head"]}]})) == {}


@pytest.mark.parametrize(
    ("layers", "step", "fits"),
    [
        (("conv",), {"mode": "dynamic"}, False),
        (("conv",), {"mode": "static"}, True),
        (("conv", "head"), {"mode": "dynamic"}, True),
        (("conv", "head"), {"mode": "dynamic", "skip_layers": ["head"]}, False),
    ],
)
def test_dynamic_integers_need_more_than_convolutions(
    find: Find, layers: tuple[str, ...], step: dict[str, Any], fits: bool
) -> None:
    capability = Capability(kind="quantize_int8", applicable=True, layers=layers, missing=None)
    found = find(recipe({"kind": "quantize_int8", **step}), capabilities=(capability,))
    assert (found == {}) is fits
    assert fits or "use mode 'static'" in found["/recipe/steps/0"]


TEXT: dict[str, Any] = {"dataset": dataset_facts(text=("string", ()), label=("int64", ()))}
TOKENS: dict[str, Any] = {"inputs": [tensor("ids", "int64", "batch", "sequence")]}


def test_text_feeds_integer_inputs_of_a_model_with_its_tokenizer(find: Find) -> None:
    bound = recipe(inputs={"ids": {"column": "text"}})
    assert find(bound, **TEXT, **TOKENS, tokenizer=True) == {}
    problems = find(bound, **TEXT, **TOKENS)
    assert list(problems) == ["/recipe/data/inputs/ids/column"]
    assert "without a tokenizer" in problems["/recipe/data/inputs/ids/column"]
    assert "format=hf" in problems["/recipe/data/inputs/ids/column"]


@pytest.mark.parametrize(
    ("shape", "dtype", "binding", "field", "expected"),
    [
        (("batch", 4), "float32", {}, "column", "is text, which becomes integers"),
        (("batch", 4, 4), "int64", {}, "column", "is text, which becomes integers"),
        (("batch", 4), "int64", {"max_tokens": 5}, "column", "needs [4] per row; column 'text' has [5]"),
        (("batch", 4), "int64", {"scale": 2.0}, "scale", "would make fractions"),
        (("batch", 4), "int64", {"resize": [2, 2]}, "resize", "not images"),
    ],
)
def test_text_must_fit_its_input(
    find: Find, shape: Any, dtype: str, binding: dict[str, Any], field: str, expected: str
) -> None:
    bound = recipe(inputs={"ids": {"column": "text", **binding}})
    problems = find(bound, **TEXT, inputs=[tensor("ids", dtype, *shape)], tokenizer=True)
    assert list(problems) == [f"/recipe/data/inputs/ids/{field}"]
    assert expected in problems[f"/recipe/data/inputs/ids/{field}"]


def test_texts_of_one_model_are_equally_long(find: Find) -> None:
    names = ("ids", "mask")
    inputs = [tensor(name, "int64", "batch", "sequence") for name in names]
    bound = recipe(inputs={"ids": {"column": "text"}, "mask": {"column": "text", "max_tokens": 5}})
    problems = find(bound, **TEXT, inputs=inputs, tokenizer=True)
    assert problems == {
        "/recipe/data/inputs/mask/column": "size 'sequence' is 5 here and 128 in input 'ids'; it must be equal"
    }


@pytest.mark.parametrize(("field", "value"), [("tokens", "mask"), ("max_tokens", 5), ("resize", [8, 8])])
def test_what_is_for_text_or_images_is_not_for_numbers(find: Find, field: str, value: Any) -> None:
    problems = find(recipe(inputs={"x": {"column": "image", field: value}}))
    assert f"/recipe/data/inputs/x/{field}" in problems


def images(*row: int | str, classes: tuple[str, ...] = ("cat", "dog")) -> DatasetFacts:
    image = ColumnFacts(name="image", dtype="uint8", shape=row)
    label, split = (
        ColumnFacts(name=name, dtype=dtype, shape=()) for name, dtype in (("label", "int64"), ("split", "string"))
    )
    return DatasetFacts(num_rows=100, columns=(image, label, split), classes=classes)


def test_images_that_differ_in_size_are_resized(find: Find) -> None:
    bound: dict[str, Any] = {"column": "image", "layout": "nhwc_to_nchw"}
    various = images("height", "width", 3)
    problems = find(recipe(inputs={"x": bound}), dataset=various)
    assert list(problems) == ["/recipe/data/inputs/x/resize"]
    assert "differ in size" in problems["/recipe/data/inputs/x/resize"]
    assert find(recipe(inputs={"x": bound | {"resize": [8, 8]}}), dataset=various) == {}
    assert find(recipe(inputs={"x": bound | {"resize": [8, 8]}}), dataset=images(32, 32, 3)) == {}
    assert "column" in next(iter(find(recipe(inputs={"x": bound | {"resize": [8, 9]}}), dataset=various)))


def test_classes_mean_the_same_in_both_datasets(find: Find) -> None:
    bound: dict[str, Any] = {"column": "image", "layout": "nhwc_to_nchw", "resize": [8, 8]}
    spec = recipe(inputs={"x": bound}, evaluation_dataset_id=OTHER, **LABELS)
    assert find(spec, dataset=images(8, 8, 3), evaluation=images("height", "width", 3)) == {}
    problems = find(spec, dataset=images(8, 8, 3), evaluation=images(8, 8, 3, classes=("cat", "cow")))
    assert list(problems) == ["/recipe/data/evaluation_dataset_id"]
    assert "'cow'" in problems["/recipe/data/evaluation_dataset_id"]


def test_split_column_says_one_thing_per_row(find: Find) -> None:
    dataset = images(3, 8, 8)
    assert find(recipe(split_column="split", **LABELS), dataset=dataset) == {}
    assert find(recipe(split_column="label"), dataset=dataset) == {}
    assert list(find(recipe(split_column="image"), dataset=dataset)) == ["/recipe/data/split_column"]
    assert "did you mean 'split'" in find(recipe(split_column="splt"), dataset=dataset)["/recipe/data/split_column"]


@pytest.mark.parametrize(
    "other",
    [
        {"evaluation_dataset_id": OTHER},
        {"evaluation_fraction": 0.3},
        {"training_split": "a", "evaluation_split": "a"},
    ],
)
def test_one_thing_says_what_to_measure_on(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"give one of them|are both"):
        recipe(split_column="split", **other)


def test_text_is_no_label(find: Find) -> None:
    dataset = images(3, 8, 8)
    problems = find(recipe(label_column="split", task="classification"), dataset=dataset)
    assert list(problems) == ["/recipe/data/label_column"]
    assert "is text" in problems["/recipe/data/label_column"]


@pytest.mark.parametrize(("batch_size", "refused"), [(None, False), (8, True)])
def test_a_fixed_batch_cannot_be_divided_among_replicas(find: Find, batch_size: int | None, refused: bool) -> None:
    parallel = {"kind": "finetune", "parallel": {"data": 2}}
    problems = find(recipe(parallel, **LABELS), batch_size=batch_size)
    assert ("/recipe/steps/0/parallel" in problems) is refused
    assert not refused or "takes exactly 8 examples" in problems["/recipe/steps/0/parallel"]
