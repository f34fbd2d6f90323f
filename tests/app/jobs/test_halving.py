"""Successive halving: sizes fall, epochs rise, the budget is what the method promises, and failures never survive."""

from hypothesis import given
from hypothesis import strategies as some

from app.jobs.halving import Rung, choose_survivors, plan_rungs

NUMBERS = some.integers(1, 300)


def test_nine_trials_of_nine_epochs() -> None:
    # 9 trials at 9 / 3^2 = 1 epoch, the 3 best at 3; the best of them trains in full.
    assert plan_rungs(9, 3, 9) == (Rung(9, 1), Rung(3, 3))


def test_rungs_of_equally_many_epochs_would_repeat_results() -> None:
    # 27 trials: 3 / 27, 3 / 9, 3 / 3 epochs, all rounded up to 1, would be the same run three times.
    assert plan_rungs(27, 3, 3) == (Rung(27, 1),)
    assert plan_rungs(4, 2, 1) == (Rung(4, 1),)


def test_one_trial_needs_no_round() -> None:
    assert plan_rungs(1, 3, 9) == ()


@given(NUMBERS, some.integers(2, 16), some.integers(1, 1000))
def test_fewer_train_longer_on_each_rung(num_trials: int, reduction: int, epochs: int) -> None:
    rungs = plan_rungs(num_trials, reduction, epochs)
    sizes, lengths = [rung.num_trials for rung in rungs], [rung.epochs for rung in rungs]
    assert sizes == sorted(set(sizes), reverse=True)
    assert lengths == sorted(set(lengths))
    assert all(1 <= length <= epochs for length in lengths)
    assert num_trials == 1 or sizes[0] == num_trials
    # Beside the least of one epoch each, a rung costs no more than the full run of `reduction` candidates.
    for rung in rungs:
        assert rung.epochs == 1 or rung.num_trials * rung.epochs <= (epochs + rung.num_trials) * reduction


@given(some.dictionaries(NUMBERS, some.none() | some.floats(-1, 1), max_size=30), NUMBERS)
def test_survivors_are_the_best_that_finished(objectives: dict[int, float | None], num_kept: int) -> None:
    survivors = choose_survivors(objectives, num_kept)
    finished = {number: value for number, value in objectives.items() if value is not None}
    assert len(survivors) == len(set(survivors)) == min(num_kept, len(finished))
    kept = [finished[number] for number in survivors]
    assert kept == sorted(kept, reverse=True)
    assert all(value <= kept[-1] for number, value in finished.items() if kept and number not in survivors)


def test_of_equals_the_lower_number_wins() -> None:
    assert choose_survivors({3: 0.5, 1: 0.5, 2: None, 0: 0.1}, 2) == (1, 3)
