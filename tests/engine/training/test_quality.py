"""Quality on held-out examples: the number, its standard error, and the comparison with the original."""

from math import exp, log, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.recipes.data import Data
from app.recipes.facts import TensorFacts
from worker.engine.programs.program import Signature
from worker.engine.training.examples import BoundExamples, open_examples
from worker.engine.training.quality import evaluate, evaluate_pair

ID = "dst_" + "a" * 26
Arrays = tuple[np.ndarray, ...]


def examples_of(
    directory: Path, x: np.ndarray, y: np.ndarray | None, batch: int | None = None, **data: Any
) -> BoundExamples:
    columns = {"x": x} if y is None else {"x": x, "y": y}
    np.savez(directory / "data.npz", **columns)  # type: ignore[arg-type]
    first_rows = {name: column[:1] for name, column in columns.items()}
    np.savez(directory / "train.npz", **first_rows)  # type: ignore[arg-type]
    labels = {} if y is None or "task" not in data or data["task"] == "language_modeling" else {"label_column": "y"}
    spec = Data.model_validate(
        {
            "dataset_id": "dst_" + "b" * 26,
            "evaluation_dataset_id": ID,
            "inputs": {"x": {"column": "x"}},
            **labels,
            **data,
        }
    )
    kind = "int64" if x.dtype.kind == "i" else "float32"
    first: int | str = batch or "batch"
    model = Signature(
        (TensorFacts(name="x", dtype=kind, shape=(first, *x.shape[1:])),),
        (TensorFacts(name="out", dtype="float32", shape=(first,)),),
        batch,
    )
    files = {ID: (directory / "data.npz", "npz"), "dst_" + "b" * 26: (directory / "train.npz", "npz")}
    return open_examples(spec, files, model, 0, directory)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [None, 4])
def test_accuracy_and_its_standard_error(tmp_path: Path, batch: int | None) -> None:
    x = np.eye(10, dtype=np.float32)
    y = np.arange(10)
    y[:3] += 1  # 7 of 10 are right
    quality = evaluate(lambda i: (i[0],), examples_of(tmp_path, x, y, batch, task="classification"), batch_size=3)
    assert (quality.metric, quality.num_examples, quality.higher_is_better) == ("accuracy", 10, True)
    assert quality.value == pytest.approx(0.7)
    assert quality.standard_error == pytest.approx(sqrt(0.7 * 0.3 / 9))


def test_mean_squared_error(tmp_path: Path) -> None:
    x = np.array([[1.0], [2.0], [4.0]], np.float32)
    quality = evaluate(lambda i: (i[0],), examples_of(tmp_path, x, np.zeros(3, np.float32), task="regression"))
    assert quality.value == pytest.approx(7.0)
    assert quality.standard_error == pytest.approx(np.std([1, 4, 16], ddof=1) / sqrt(3))
    assert not quality.higher_is_better


def test_perplexity_of_knowing_nothing_is_the_vocabulary(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 7, (5, 6))
    examples = examples_of(tmp_path, tokens, None, task="language_modeling")
    quality = evaluate(lambda i: (np.zeros((*i[0].shape, 7), np.float32),), examples)
    assert quality.metric == "perplexity"
    assert quality.value == pytest.approx(7.0)
    assert quality.standard_error == pytest.approx(0.0, abs=1e-6)
    assert exp(log(7)) == pytest.approx(quality.value)


def test_without_labels_the_original_is_the_measure(tmp_path: Path) -> None:
    x = np.eye(8, dtype=np.float32)
    examples = examples_of(tmp_path, x, None)

    def swapped(inputs: Arrays) -> Arrays:
        out = inputs[0].copy()
        out[:, :2] = out[:, 1::-1]
        return (out,)

    original = evaluate(lambda i: (i[0],), examples)
    result = evaluate(swapped, examples, baseline=lambda i: (i[0],))
    assert (original.metric, original.value) == ("agreement", 1.0)
    assert (result.metric, result.value) == ("agreement", 0.75)


def test_outputs_that_are_no_scores_are_compared_by_direction(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(4, 3, 2)).astype(np.float32)
    quality = evaluate(lambda i: (-i[0],), examples_of(tmp_path, x, None), baseline=lambda i: (2 * i[0],))
    assert quality.metric == "cosine"
    assert quality.value == pytest.approx(-1.0)


@pytest.mark.parametrize("batch", [None, 4])
def test_the_paired_difference_has_a_smaller_error_than_two_separate_ones(tmp_path: Path, batch: int | None) -> None:
    x = np.eye(10, dtype=np.float32)
    y = np.arange(10)
    y[:3] += 1

    def one_more_wrong(inputs: Arrays) -> Arrays:
        out = inputs[0].copy()
        out[out[:, 9] == 1] = 0
        return (out,)

    examples = examples_of(tmp_path, x, y, batch, task="classification")
    pair = evaluate_pair(lambda i: (i[0],), one_more_wrong, examples, batch_size=3)
    assert pair.baseline == evaluate(lambda i: (i[0],), examples, batch_size=3)
    assert pair.result.value == pytest.approx(0.6)
    differences = [0.0] * 9 + [-1.0]
    assert pair.change_error == pytest.approx(np.std(differences, ddof=1) / sqrt(10))
    assert pair.baseline.standard_error is not None
    assert pair.change_error is not None
    assert pair.change_error < pair.baseline.standard_error
