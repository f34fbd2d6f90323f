"""One option for each layer, so that the summed effect is smallest within a budget: a multiple-choice knapsack."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_STATES = 1 << 15
"""Partial choices kept per layer. As long as no more are undominated, the result is the exact optimum."""


@dataclass(frozen=True)
class Option:
    """What one choice for one layer costs and does."""

    cost: int
    """Bytes, or any other whole number that is limited in sum."""
    effect: float
    """What is to be small in sum."""


Layers = Sequence[Sequence[Option]]


def allocate(layers: Layers, max_cost: int, *, max_states: int = MAX_STATES) -> tuple[int, ...] | None:
    """Return the index of the option taken in each layer, or None where even the cheapest ones cost too much.

    Dynamic programming over undominated partial choices (Nemhauser and Ullmann 1969): exact while they are at most
    `max_states`; beyond that the best one of each interval of costs is kept. The result always fits the budget, and is
    never worse than taking one and the same option everywhere.
    """
    cheapest_rest = np.cumsum([0, *(min(each.cost for each in options) for options in reversed(layers))])[::-1]
    if cheapest_rest[0] > max_cost:
        return None
    costs, effects = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for number, options in enumerate(layers):
        option_costs = np.array([each.cost for each in options], np.int64)
        option_effects = np.array([each.effect for each in options])
        new_costs = (costs[:, None] + option_costs).ravel()
        new_effects = (effects[:, None] + option_effects).ravel()
        kept = _undominated(new_costs, new_effects, max_cost - int(cheapest_rest[number + 1]))
        if len(kept) > max_states:
            kept = _thin(kept, new_costs[kept], max_states)
        costs, effects = new_costs[kept], new_effects[kept]
        steps.append((kept // len(options), kept % len(options)))
    state = len(costs) - 1
    taken: list[int] = []
    for parents, options_taken in reversed(steps):
        taken.append(int(options_taken[state]))
        state = int(parents[state])
    best = tuple(reversed(taken))
    fitting = [each for each in uniform_choices(layers) if cost_of(layers, each) <= max_cost]
    return min([best, *fitting], key=lambda each: effect_of(layers, each))


def uniform_choices(layers: Layers) -> list[tuple[int, ...]]:
    """Return the choices that take the same option everywhere; the list is empty where layers differ in number."""
    sizes = {len(options) for options in layers}
    return [(index,) * len(layers) for index in range(sizes.pop())] if len(sizes) == 1 else []


def cost_of(layers: Layers, choice: Sequence[int]) -> int:
    """Return the summed cost."""
    return sum(options[index].cost for options, index in zip(layers, choice, strict=True))


def effect_of(layers: Layers, choice: Sequence[int]) -> float:
    """Return the summed effect."""
    return sum(options[index].effect for options, index in zip(layers, choice, strict=True))


def _undominated(costs: NDArray[np.int64], effects: NDArray[np.float64], max_cost: int) -> NDArray[np.int64]:
    """Return, by rising cost, the states that have a smaller effect than every cheaper one."""
    order = np.lexsort((effects, costs))
    order = order[costs[order] <= max_cost]
    sorted_effects = effects[order]
    best_before = np.concatenate([[np.inf], np.minimum.accumulate(sorted_effects)[:-1]])
    kept: NDArray[np.int64] = order[sorted_effects < best_before]
    return kept


def _thin(kept: NDArray[np.int64], costs: NDArray[np.int64], max_states: int) -> NDArray[np.int64]:
    """Keep the cheapest state, so that the rest stays affordable, and the last (best) of each interval of costs."""
    buckets = (costs - costs[0]) * (max_states - 1) // max(int(costs[-1] - costs[0]), 1)
    last = np.append(np.flatnonzero(np.diff(buckets)), len(kept) - 1)
    thinned: NDArray[np.int64] = kept[np.unique(np.append(last, 0))]
    return thinned
