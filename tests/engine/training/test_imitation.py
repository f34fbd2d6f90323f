"""The loss against a teacher's outputs: its formula, what the temperature does, and what does not count."""

from types import SimpleNamespace
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from worker.engine.errors import RecipeRefused
from worker.engine.training.examples import BoundExamples
from worker.engine.training.imitation import imitate, soft_class_loss
from worker.engine.training.losses import IGNORED_LABEL


def examples_of(task: str, *, output_is_named: bool = False) -> BoundExamples:
    """Return the three facts about examples that the loss asks for."""
    return cast(
        BoundExamples,
        SimpleNamespace(task=task, output_index=0, output_is_named=output_is_named, needs_check=lambda _: True),
    )


def random_scores(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator), torch.randn(*shape, generator=generator)


@given(seed=st.integers(0, 1000), temperature=st.floats(0.5, 20))
@settings(max_examples=30, deadline=None)
def test_it_is_the_squared_temperature_times_the_divergence_of_softened_scores(seed: int, temperature: float) -> None:
    mine, theirs = random_scores(seed, 5, 4)
    wanted, got = (torch.softmax(each.double() / temperature, 1) for each in (theirs, mine))
    divergence = (wanted * (wanted / got).log()).sum(1).mean()
    assert soft_class_loss(mine, theirs, temperature).item() == pytest.approx(
        float(temperature**2 * divergence), rel=1e-3, abs=1e-5
    )
    assert soft_class_loss(theirs, theirs, temperature).item() == pytest.approx(0.0, abs=1e-4)


def test_the_gradient_keeps_its_size_when_the_temperature_rises() -> None:
    """What the factor is for (Hinton et al. 2015): at high temperatures it is (s - t) / classes, centred."""
    mine, theirs = random_scores(0, 6, 5)
    mine.requires_grad_(True)
    (gradient,) = torch.autograd.grad(soft_class_loss(mine, theirs, 100.0), mine)
    difference = (mine - theirs).detach()
    torch.testing.assert_close(gradient, (difference - difference.mean(1, True)) / 5 / 6, rtol=0.05, atol=2e-3)


def test_one_score_is_the_logit_of_yes() -> None:
    mine, theirs = random_scores(1, 7, 1)
    pairs = [torch.cat([torch.zeros_like(each), each], 1) for each in (mine, theirs)]
    torch.testing.assert_close(soft_class_loss(mine, theirs, 3.0), soft_class_loss(pairs[0], pairs[1], 3.0))
    assert soft_class_loss(mine, theirs, 3.0) > 0


def test_padding_does_not_count_in_language_modeling() -> None:
    mine, theirs = random_scores(2, 3, 6, 8)
    tokens = torch.randint(0, 8, (3, 6))
    tokens[0, 3:], tokens[1, 1:] = IGNORED_LABEL, IGNORED_LABEL
    loss = imitate(examples_of("language_modeling"), (mine,), (theirs,), tokens, 2.0)
    # A position predicts the token after it: of row 0 the first two count, of row 1 none, of row 2 all but the last.
    counted = [(0, 0), (0, 1), *((2, position) for position in range(5))]
    rows, positions = zip(*counted, strict=True)
    torch.testing.assert_close(
        loss, soft_class_loss(mine[list(rows), list(positions)], theirs[list(rows), list(positions)], 2.0)
    )
    noisy = mine.clone()
    noisy[0, 2:], noisy[1], noisy[2, 5] = 50.0, torch.randn(6, 8) * 9, 7.0
    torch.testing.assert_close(imitate(examples_of("language_modeling"), (noisy,), (theirs,), tokens, 2.0), loss)


def test_ignored_labels_do_not_count_in_classification() -> None:
    mine, theirs = random_scores(3, 4, 5)
    labels = torch.tensor([0, IGNORED_LABEL, 4, IGNORED_LABEL])
    loss = imitate(examples_of("classification"), (mine,), (theirs,), labels, 4.0)
    torch.testing.assert_close(loss, soft_class_loss(mine[[0, 2]], theirs[[0, 2]], 4.0))
    assert imitate(examples_of("classification"), (mine,), (theirs,), torch.full((4,), IGNORED_LABEL), 4.0) == 0


def test_values_and_directions() -> None:
    mine, theirs = random_scores(4, 4, 5)
    assert imitate(examples_of("regression"), (mine,), (theirs,), None, 4.0).item() == pytest.approx(
        float((mine - theirs).square().mean()), rel=1e-5
    )
    assert imitate(examples_of("embedding"), (theirs,), (theirs,), None, 4.0).item() == pytest.approx(0, abs=1e-6)
    # Of the same direction, twice as long: only the relative error is left, |2t - t|^2 / |t|^2.
    assert imitate(examples_of("embedding"), (2 * theirs,), (theirs,), None, 4.0).item() == pytest.approx(1.0)


def test_without_a_task_every_output_counts_unless_one_is_named() -> None:
    mine, theirs = random_scores(5, 4, 5)
    maps = random_scores(6, 4, 2, 3)
    outputs, wanted = (mine, maps[0]), (theirs, maps[1])
    first = soft_class_loss(mine, theirs, 4.0)
    second = (maps[0] - maps[1]).square().mean() / maps[1].square().mean()
    torch.testing.assert_close(imitate(examples_of("none"), outputs, wanted, None, 4.0), (first + second) / 2)
    torch.testing.assert_close(imitate(examples_of("none", output_is_named=True), outputs, wanted, None, 4.0), first)
    with pytest.raises(RecipeRefused) as caught:
        imitate(examples_of("none"), (torch.ones(3, 2).long(),), (torch.ones(3, 2).long(),), None, 4.0)
    assert caught.value.code == "output_not_trainable"
