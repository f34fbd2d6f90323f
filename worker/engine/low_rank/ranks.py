"""Choosing ranks: for each layer by its own measure, or for all together under one budget of weights."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from app.recipes.low_rank import FactorizeLowRank
from worker.engine.errors import StepFailed
from worker.engine.low_rank.factors import Factors, Option


def choose_ranks(step: FactorizeLowRank, factors: Mapping[str, Factors]) -> dict[str, tuple[int, ...] | None]:
    """Return each layer's ranks, None for those that would not get smaller and stay whole."""
    if step.rank_by == "budget":
        return choose_within_budget(factors, step.budget)
    chosen: dict[str, tuple[int, ...] | None] = {}
    for name, each in factors.items():
        if step.rank_by == "ratio":
            fitting = [option for option in each.options if option.num_weights <= step.ratio * each.num_weights]
            # The options of a layer get better with their size.
            ranks = fitting[-1].ranks if fitting else None
        else:
            ranks = each.limit(step.rank) if step.rank_by == "rank" else each.reach(step.energy)
            if each.count(ranks) >= each.num_weights:
                ranks = None
        chosen[name] = ranks
    return chosen


def choose_within_budget(factors: Mapping[str, Factors], budget: float) -> dict[str, tuple[int, ...] | None]:
    """Spread `budget` times all weights over the layers: the smallest sum of their relative squared errors."""
    names = list(factors)
    total = sum(each.num_weights for each in factors.values())
    curves = [[*factors[name].options, Option((), factors[name].num_weights, 0.0)] for name in names]
    picked = spread_budget(curves, int(budget * total))
    return {name: curve[index].ranks or None for name, curve, index in zip(names, curves, picked, strict=True)}


def spread_budget(curves: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """Return the index of one option per curve, of at most `budget` weights together, with a small sum of errors.

    Steps along the lower convex hulls in order of error saved per weight (the optimum but for the last step), then
    whatever single exchange still fits and saves most.
    """
    hulls = [_lower_hull(curve) for curve in curves]
    picked = [hull[0] for hull in hulls]
    left = budget - sum(curve[index].num_weights for curve, index in zip(curves, picked, strict=True))
    if left < 0:
        raise StepFailed(
            f"the smallest factors of all layers have {budget - left} weights together, the budget allows {budget}",
            code="budget_too_small",
            fix="Raise budget, or leave small layers out with skip_layers.",
        )
    steps = sorted(
        (
            (curve[a].error - curve[b].error) / (curve[b].num_weights - curve[a].num_weights),
            number,
            a,
            b,
        )
        for number, (curve, hull) in enumerate(zip(curves, hulls, strict=True))
        for a, b in pairwise(hull)
    )
    for _, number, a, b in reversed(steps):
        cost = curves[number][b].num_weights - curves[number][a].num_weights
        if picked[number] == a and cost <= left:
            picked[number] = b
            left -= cost
    while True:
        best, gain, cost = None, 0.0, 0
        for number, curve in enumerate(curves):
            now = curve[picked[number]]
            for index, option in enumerate(curve):
                extra = option.num_weights - now.num_weights
                if extra <= left and now.error - option.error > gain:
                    best, gain, cost = (number, index), now.error - option.error, extra
        if best is None:
            return picked
        picked[best[0]] = best[1]
        left -= cost


def _lower_hull(curve: Sequence[Option]) -> list[int]:
    hull: list[int] = []
    for index, option in enumerate(curve):
        while len(hull) > 1:
            a, b = curve[hull[-2]], curve[hull[-1]]
            if (b.error - a.error) * (option.num_weights - a.num_weights) < (option.error - a.error) * (
                b.num_weights - a.num_weights
            ):
                break
            hull.pop()
        hull.append(index)
    return hull
