"""Losses and quality metrics against their definitions."""

from math import exp, log

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.engine.errors import RecipeRefused
from worker.engine.training.losses import compute_loss


def test_classification_is_cross_entropy_over_the_class_axis() -> None:
    scores = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    expected = -(log(exp(2) / (exp(2) + 1)) + log(1 / (1 + exp(1)))) / 2
    assert compute_loss("classification", scores, torch.tensor([0, 0])).item() == pytest.approx(expected, rel=1e-6)


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_the_class_axis_may_be_the_second_or_the_last(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, 5, 3, 4, generator=generator)
    labels = torch.randint(0, 5, (2, 3, 4), generator=generator)
    second = compute_loss("classification", scores, labels)
    last = compute_loss("classification", scores.movedim(1, -1), labels)
    assert second.item() == pytest.approx(torch.nn.functional.cross_entropy(scores, labels).item(), rel=1e-5)
    assert last.item() == pytest.approx(second.item(), rel=1e-5)


def test_one_score_is_a_binary_classifier() -> None:
    scores = torch.tensor([[0.0], [3.0]])
    expected = (log(2) + log(1 + exp(-3))) / 2
    assert compute_loss("classification", scores, torch.tensor([0, 1])).item() == pytest.approx(expected, rel=1e-6)


def test_language_modeling_predicts_the_next_token_and_not_the_padding() -> None:
    scores = torch.zeros(1, 4, 3)
    scores[0, 0, 1] = 50.0
    scores[0, 1, 2] = 50.0
    tokens = torch.tensor([[0, 1, 2, -100]])
    assert compute_loss("language_modeling", scores, tokens).item() == pytest.approx(0.0, abs=1e-6)
    assert compute_loss("language_modeling", scores, torch.tensor([[0, 1, 2, 0]])).item() == pytest.approx(log(3) / 3)


def test_regression_takes_n_and_n_by_1_alike() -> None:
    assert compute_loss("regression", torch.tensor([[1.0], [3.0]]), torch.tensor([0.0, 0.0])).item() == 5.0


def test_embedding_is_one_minus_cosine() -> None:
    labels = torch.tensor([[2.0, 0.0], [0.0, -1.0]])
    assert compute_loss("embedding", torch.eye(2), labels).item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("task", "output", "labels", "code"),
    [
        ("classification", torch.zeros(2, 3), torch.tensor([0, 3]), "label_out_of_range"),
        ("classification", torch.zeros(2, 3), torch.tensor([-1, 0]), "label_out_of_range"),
        ("classification", torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64), "labels_do_not_fit"),
        ("language_modeling", torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64), "labels_do_not_fit"),
        ("language_modeling", torch.zeros(1, 2, 3), torch.tensor([[0, 7]]), "label_out_of_range"),
        ("language_modeling", torch.zeros(1, 2, 3), torch.tensor([[0, -1]]), "label_out_of_range"),
        ("regression", torch.zeros(2, 3), torch.zeros(2, 4), "labels_do_not_fit"),
        ("none", torch.zeros(2, 3), torch.zeros(2), "no_loss"),
    ],
)
def test_labels_that_do_not_fit_are_refused(task: str, output: torch.Tensor, labels: torch.Tensor, code: str) -> None:
    with pytest.raises(RecipeRefused) as caught:
        compute_loss(task, output, labels)  # type: ignore[arg-type]
    assert caught.value.code == code


def test_random_scores_lose_the_logarithm_of_the_number_of_classes() -> None:
    labels = torch.from_numpy(np.arange(10))
    assert compute_loss("classification", torch.zeros(10, 10), labels).item() == pytest.approx(log(10))
