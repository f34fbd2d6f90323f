"""Binding columns to model inputs: arithmetic, splits, batches, and what is refused."""

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.recipes.data import Data
from app.recipes.facts import TensorFacts
from app.recipes.training import TrainingSettings
from worker.engine.errors import RecipeRefused
from worker.engine.programs.program import Signature
from worker.engine.training.binding import bind_input
from worker.engine.training.examples import BoundExamples, open_examples
from worker.engine.training.feeding import drops_last

ID = "dst_" + "a" * 26
OTHER_ID = "dst_" + "b" * 26


def facts(name: str, shape: list[int | str], dtype: str = "float32") -> TensorFacts:
    return TensorFacts(name=name, dtype=dtype, shape=shape)  # type: ignore[arg-type]


def signature(*inputs: TensorFacts, outputs: int = 3, batch: int | None = None, **ranges: Any) -> Signature:
    return Signature(inputs, (facts("logits", ["batch", outputs]),), batch, ranges)


def open_table(
    directory: Path,
    table: dict[str, np.ndarray],
    model: Signature,
    *,
    seed: int = 0,
    compressed: bool = False,
    **data: Any,
) -> BoundExamples:
    path = directory / "data.npz"
    (np.savez_compressed if compressed else np.savez)(path, **table)  # type: ignore[arg-type]
    spec = Data.model_validate({"dataset_id": ID, "inputs": {"x": {"column": "x"}}, **data})
    return open_examples(spec, {ID: (path, "npz")}, model, seed, directory)


@given(
    layout=st.sampled_from(["as_is", "nhwc_to_nchw", "nchw_to_nhwc"]),
    scale=st.floats(-2, 2).filter(lambda v: abs(v) > 1e-3),
    mean=st.sampled_from([(), (0.5,), (0.1, 0.2, 0.3)]),
    std=st.sampled_from([(), (2.0,), (0.5, 0.25, 4.0)]),
    dtype=st.sampled_from(["uint8", "float32", "int16"]),
)
@settings(max_examples=60, deadline=None)
def test_a_value_is_layout_then_scale_then_mean_then_std(
    layout: str, scale: float, mean: tuple[float, ...], std: tuple[float, ...], dtype: str
) -> None:
    column: Any = np.arange(2 * 3 * 3 * 3).reshape(2, 3, 3, 3).astype(dtype)
    spec = Data.model_validate(
        {"dataset_id": ID, "inputs": {"x": {"column": "x", "layout": layout, "scale": scale, "mean": mean, "std": std}}}
    ).inputs["x"]
    bound = bind_input(facts("x", ["batch", 3, 3, 3]), spec, column, {})
    actual = bound.read(np.array([1, 0]))
    for row, original in enumerate([1, 0]):
        for index in np.ndindex(3, 3, 3):
            i, j, k = index
            source = {"as_is": (i, j, k), "nhwc_to_nchw": (j, k, i), "nchw_to_nhwc": (k, i, j)}[layout]
            channel = i
            expected = float(column[(original, *source)]) * scale
            expected -= mean[channel if len(mean) > 1 else 0] if mean else 0
            expected /= std[channel if len(std) > 1 else 0] if std else 1
            assert actual[(row, *index)] == pytest.approx(expected, rel=1e-5, abs=1e-4)
    assert actual.dtype == np.float32


@given(rows=st.integers(2, 60), fraction=st.floats(0.01, 0.99), batch=st.integers(1, 13), seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_every_row_is_in_exactly_one_part_and_seen_once_an_epoch(
    tmp_path_factory: pytest.TempPathFactory, rows: int, fraction: float, batch: int, seed: int
) -> None:
    directory = tmp_path_factory.mktemp("split")
    table: dict[str, np.ndarray] = {"x": np.arange(rows, dtype=np.float32)[:, None], "y": np.arange(rows) % 3}
    model = signature(facts("x", ["batch", 1]))
    options: dict[str, Any] = {"evaluation_fraction": fraction, "task": "classification", "label_column": "y"}
    examples = open_table(directory, table, model, seed=seed, **options)

    training = [(i[0], t) for i, t in examples.training_batches(batch, seed=5)]
    held_out = [(i[0], t) for i, t in examples.evaluation_batches(batch)]
    seen = torch.cat([x for x, _ in training]).flatten().tolist()
    held = torch.cat([x for x, _ in held_out]).flatten().tolist()
    assert sorted(seen + held) == list(range(rows))
    assert (len(seen), len(held)) == (examples.num_training, examples.num_evaluation)
    assert len(training) == examples.num_training_batches(batch)
    assert held == sorted(held)
    for x, labels in training + held_out:
        assert labels is not None
        assert labels.dtype == torch.int64
        assert labels.tolist() == [int(v) % 3 for v in x.flatten()]

    again = open_table(directory, table, model, seed=seed, **options)
    assert torch.cat([i[0] for i, _ in again.training_batches(batch, seed=5)]).flatten().tolist() == seen


def read_rows(examples: BoundExamples) -> tuple[set[float], set[float]]:
    """Return the values of the only column in the training and in the held-out part."""
    training = [i[0] for i, _ in examples.training_batches(64, seed=0)]
    held_out = [i[0] for i, _ in examples.evaluation_batches(64)]
    return set(torch.cat(training).flatten().tolist()), set(torch.cat(held_out).flatten().tolist())


def test_rows_to_choose_by_are_neither_trained_on_nor_measured(tmp_path: Path) -> None:
    table: dict[str, np.ndarray] = {"x": np.arange(100, dtype=np.float32)[:, None], "y": np.arange(100) % 3}
    options: dict[str, Any] = {"task": "classification", "label_column": "y"}
    examples = open_table(tmp_path, table, signature(facts("x", ["batch", 1])), **options)
    training, measured = read_rows(examples)
    trained, chosen_by = read_rows(examples.set_apart())
    assert (len(trained), len(chosen_by)) == (72, 8)
    assert trained | chosen_by == training
    assert not chosen_by & (trained | measured)
    assert read_rows(examples.set_apart()) == (trained, chosen_by)  # the same rows in every step
    assert read_rows(examples) == (training, measured)


def test_seeds_change_the_order_and_the_split(tmp_path: Path) -> None:
    table: dict[str, np.ndarray] = {"x": np.arange(50, dtype=np.float32)[:, None]}
    model = signature(facts("x", ["batch", 1]))
    first, second = (open_table(tmp_path, table, model, seed=seed) for seed in (1, 2))

    def order(examples: BoundExamples, seed: int) -> list[float]:
        return torch.cat([i[0] for i, _ in examples.training_batches(8, seed=seed)]).flatten().tolist()

    assert order(first, 0) != order(first, 1)
    assert sorted(order(first, 0)) == sorted(order(first, 1))
    assert sorted(order(first, 0)) != sorted(order(second, 0))


def test_a_fixed_batch_is_always_full(tmp_path: Path) -> None:
    table: dict[str, np.ndarray] = {"x": np.arange(23, dtype=np.float32)[:, None], "y": np.arange(23) % 3}
    model = signature(facts("x", [4, 1]), batch=4)
    examples = open_table(tmp_path, table, model, task="classification", label_column="y", evaluation_fraction=0.25)
    assert (examples.num_training, examples.num_evaluation) == (17, 6)
    sizes = [len(i[0]) for i, _ in examples.training_batches(64, seed=0)]
    assert sizes == [4, 4, 4, 4]
    assert examples.num_training_batches(64) == 4
    padded = list(examples.padded_batches(64))
    assert [(len(i[0]), n) for i, _, n in padded] == [(4, 4), (4, 2)]
    assert [len(t) for _, t in examples.evaluation_batches(64) if t is not None] == [4, 2]
    last = padded[-1][0][0].flatten().tolist()
    assert last[1:] == [last[1]] * 3


def test_a_largest_batch_is_respected(tmp_path: Path) -> None:
    plain = signature(facts("x", ["batch", 1]))
    model = Signature(plain.inputs, plain.outputs, None, {"batch": (1, 5)})
    examples = open_table(tmp_path, {"x": np.zeros((30, 1), np.float32)}, model)
    assert max(len(i[0]) for i, _ in examples.training_batches(64, seed=0)) == 5
    assert drops_last(examples, TrainingSettings(batch_size=64)), "as with batches of 5"


def test_too_few_rows_for_a_fixed_batch(tmp_path: Path) -> None:
    examples = open_table(tmp_path, {"x": np.zeros((4, 1), np.float32)}, signature(facts("x", [4, 1]), batch=4))
    with pytest.raises(RecipeRefused, match=r"exactly 4 examples .* only 3"):
        next(iter(examples.training_batches(4, seed=0)))


def test_a_separate_evaluation_dataset_is_measured_on(tmp_path: Path) -> None:
    for name, rows, value in (("train.npz", 6, 1.0), ("eval.npz", 4, 2.0)):
        np.savez(tmp_path / name, x=np.full((rows, 1), value, np.float32))
    spec = Data.model_validate(
        {
            "dataset_id": ID,
            "evaluation_dataset_id": OTHER_ID,
            "inputs": {"x": {"column": "x"}},
            "max_evaluation_examples": 3,
        }
    )
    files = {ID: (tmp_path / "train.npz", "npz"), OTHER_ID: (tmp_path / "eval.npz", "npz")}
    examples = open_examples(spec, files, signature(facts("x", ["batch", 1])), 0, tmp_path)  # type: ignore[arg-type]
    assert (examples.num_training, examples.num_evaluation) == (6, 3)
    assert next(iter(examples.training_batches(9, seed=0)))[0][0].unique().tolist() == [1.0]
    assert next(iter(examples.evaluation_batches(9)))[0][0].unique().tolist() == [2.0]


def test_compressed_columns_are_unpacked_once_and_mapped(tmp_path: Path) -> None:
    table: dict[str, np.ndarray] = {
        "x": np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32),
        "unused": np.zeros(40),
    }
    model = signature(facts("x", ["batch", 3]))
    examples = open_table(tmp_path, table, model, compressed=True)
    unpacked = list(tmp_path.glob("*.bin"))
    assert len(unpacked) == 1
    before = unpacked[0].stat().st_mtime_ns
    open_table(tmp_path, table, model, compressed=True)
    assert unpacked[0].stat().st_mtime_ns == before
    read = torch.cat([i[0] for i, _ in examples.training_batches(7, seed=0)])
    assert len(read) == 32
    assert set(read[:, 0].tolist()) <= set(table["x"][:, 0].tolist())


def test_padding_is_not_predicted(tmp_path: Path) -> None:
    table: dict[str, np.ndarray] = {"ids": np.array([[1, 2, 3]] * 4), "mask": np.array([[1, 1, 0]] * 4)}
    inputs = {"tokens": {"column": "ids"}, "attention_mask": {"column": "mask"}}
    model = signature(facts("tokens", ["batch", 3], "int64"), facts("attention_mask", ["batch", 3], "int64"))
    examples = open_table(tmp_path, table, model, inputs=inputs, task="language_modeling")
    _, labels = next(iter(examples.training_batches(1, seed=0)))
    assert labels is not None
    assert labels.tolist() == [[1, 2, -100]]


F = np.float32
REFUSED: dict[str, tuple[dict[str, np.ndarray], Signature, dict[str, Any], str, str]] = {
    "input not bound": (
        {"x": np.zeros((4, 1), F)}, signature(facts("x", ["batch", 1]), facts("z", ["batch", 1])), {},
        "inputs_not_bound", "z",
    ),
    "unknown input": (
        {"x": np.zeros((4, 1), F)}, signature(facts("other", ["batch", 1])), {}, "inputs_not_bound", "other",
    ),
    "unknown column": ({"y": np.zeros((4, 1), F)}, signature(facts("x", ["batch", 1])), {}, "unknown_column", "'x'"),
    "unknown output": (
        {"x": np.zeros((4, 1), F)}, signature(facts("x", ["batch", 1])), {"output": "nope"}, "unknown_output", "logits",
    ),
    "wrong size": ({"x": np.zeros((4, 2), F)}, signature(facts("x", ["batch", 1])), {}, "shape_mismatch", r"\[4, 2\]"),
    "wrong rank": ({"x": np.zeros(4, F)}, signature(facts("x", ["batch", 1])), {}, "shape_mismatch", r"\[4\]"),
    "outside the dynamic range": (
        {"x": np.zeros((4, 9), F)}, signature(facts("x", ["batch", "width"]), width=(2, 8)), {},
        "shape_mismatch", "width",
    ),
    "floats for tokens": (
        {"x": np.zeros((4, 1), F)}, signature(facts("x", ["batch", 1], "int64")), {}, "dtype_mismatch", "float32",
    ),
    "scaled tokens": (
        {"x": np.zeros((4, 1), int)}, signature(facts("x", ["batch", 1], "int64")),
        {"inputs": {"x": {"column": "x", "scale": 2.0}}}, "dtype_mismatch", "scale",
    ),
    "layout of a 2-d column": (
        {"x": np.zeros((4, 1), F)}, signature(facts("x", ["batch", 1])),
        {"inputs": {"x": {"column": "x", "layout": "nhwc_to_nchw"}}}, "shape_mismatch", "4-d",
    ),
    "three means for two channels": (
        {"x": np.zeros((4, 2), F)}, signature(facts("x", ["batch", 2])),
        {"inputs": {"x": {"column": "x", "mean": [1.0, 2.0, 3.0]}}}, "shape_mismatch", "3 values",
    ),
    "float classes": (
        {"x": np.zeros((4, 1), F), "y": np.zeros(4, F)}, signature(facts("x", ["batch", 1])),
        {"task": "classification", "label_column": "y"}, "dtype_mismatch", "'y'",
    ),
    "no tokens to model": (
        {"x": np.zeros((4, 1), F)}, signature(facts("x", ["batch", 1])), {"task": "language_modeling"},
        "labels_do_not_fit", "tokens",
    ),
    "one row": ({"x": np.zeros((1, 1), F)}, signature(facts("x", ["batch", 1])), {}, "too_few_examples", "1 row"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_data_that_does_not_fit_is_refused_with_the_values(name: str, tmp_path: Path) -> None:
    table, model, data, code, words = REFUSED[name]
    with pytest.raises(RecipeRefused, match=words) as caught:
        open_table(tmp_path, table, model, **data)
    assert caught.value.code == code


def test_nan_is_refused_with_column_and_row(tmp_path: Path) -> None:
    column = np.zeros((10, 2), F)
    column[7, 1] = np.nan
    examples = open_table(tmp_path, {"x": column}, signature(facts("x", ["batch", 2])))
    with pytest.raises(RecipeRefused, match=r"column 'x' .* row 7") as caught:
        list(chain(examples.training_batches(4, seed=0), examples.evaluation_batches(4)))
    assert caught.value.code == "data_not_finite"
