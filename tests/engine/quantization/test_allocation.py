"""The knapsack over layers: equal to trying everything, within the budget, never worse than one option everywhere."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.engine.quantization.allocation import Option, allocate, cost_of, effect_of, uniform_choices

OPTION = st.builds(Option, cost=st.integers(0, 30), effect=st.floats(0, 10, allow_nan=False))
TINY = st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=5)


@given(layers=TINY, budget=st.integers(0, 100))
@settings(max_examples=150, deadline=None)
def test_it_equals_brute_force(layers: list[list[Option]], budget: int) -> None:
    possible = [
        effect_of(layers, choice)
        for choice in itertools.product(*(range(len(each)) for each in layers))
        if cost_of(layers, choice) <= budget
    ]
    found = allocate(layers, budget)
    if not possible:
        assert found is None
        return
    assert found is not None
    assert cost_of(layers, found) <= budget
    assert effect_of(layers, found) == pytest.approx(min(possible), abs=1e-9)


@given(
    layers=st.integers(2, 4).flatmap(
        lambda size: st.lists(st.lists(OPTION, min_size=size, max_size=size), min_size=2, max_size=30)
    ),
    share=st.floats(0, 1),
    max_states=st.integers(2, 40),
)
@settings(max_examples=100, deadline=None)
def test_with_few_states_it_still_fits_and_beats_uniform(
    layers: list[list[Option]], share: float, max_states: int
) -> None:
    budget = round(share * sum(max(option.cost for option in each) for each in layers))
    found = allocate(layers, budget, max_states=max_states)
    cheapest = sum(min(option.cost for option in each) for each in layers)
    assert (found is None) == (cheapest > budget)
    if found is None:
        return
    assert cost_of(layers, found) <= budget
    for uniform in uniform_choices(layers):
        if cost_of(layers, uniform) <= budget:
            assert effect_of(layers, found) <= effect_of(layers, uniform)


def test_one_option_everywhere_wins_where_too_few_states_are_kept_to_find_it() -> None:
    # A drawn case in which the two states that may be kept lose the uniform choice, which exactly fills the budget.
    draw = random.Random(248)
    rows, columns = draw.randint(3, 12), draw.randint(2, 4)
    costs = [sorted(draw.randint(0, 30) for _ in range(columns)) for _ in range(rows)]
    effects = [[draw.random() * 10 for _ in range(columns)] for _ in range(rows)]
    taken = draw.randrange(columns)
    layers = [
        [Option(cost, effect * (0.05 if i == taken else 1)) for i, (cost, effect) in enumerate(zip(*each, strict=True))]
        for each in zip(costs, effects, strict=True)
    ]
    uniform = (taken,) * rows
    found = allocate(layers, cost_of(layers, uniform), max_states=2)
    assert found is not None
    assert effect_of(layers, found) <= effect_of(layers, uniform)


def test_a_large_problem_is_near_the_optimum_of_the_relaxation() -> None:
    # 200 layers whose error falls by 4 per bit: the fractional optimum is known by a greedy over slopes.
    layers = [
        [Option(bits * (row + 1), (1 + row * 7 % 13) * 4.0**-bits) for bits in (2, 3, 4, 8, 16)] for row in range(200)
    ]
    budget = 4 * sum(row + 1 for row in range(200))
    found = allocate(layers, budget)
    assert found is not None
    assert cost_of(layers, found) <= budget
    steps = sorted(
        ((high.cost - low.cost) / (low.effect - high.effect), high.cost - low.cost, low.effect - high.effect)
        for each in layers
        for low, high in itertools.pairwise(each)
    )
    spent = float(sum(each[0].cost for each in layers))
    bound = sum(each[0].effect for each in layers)
    for _, cost, gain in steps:
        share = min(1.0, (budget - spent) / cost)
        spent, bound = spent + share * cost, bound - share * gain
        if share < 1:
            break
    assert bound <= effect_of(layers, found) <= 1.001 * bound
