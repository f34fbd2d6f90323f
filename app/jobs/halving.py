"""Successive halving (Jamieson and Talwalkar 2016) as pure arithmetic: many train a little, few train long.

A candidate that goes on starts again with more epochs instead of continuing: see docs/decisions.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Rung:
    """One round: so many candidates train for so many epochs each."""

    num_trials: int
    epochs: int


def plan_rungs(num_trials: int, reduction: int, epochs: int) -> tuple[Rung, ...]:
    """Return the rounds before the best candidate trains in full, for `epochs`.

    Of n candidates n // reduction go on, at least one, each with `reduction` times the epochs. Rounds of equally many
    epochs would repeat each other's results, so only the first of them stays.
    """
    assert num_trials >= 1
    assert reduction >= 2
    sizes = [num_trials]
    while sizes[-1] > 1:
        sizes.append(max(1, sizes[-1] // reduction))
    rungs: list[Rung] = []
    for index, size in enumerate(sizes[:-1]):
        share = max(1, round(epochs / reduction ** (len(sizes) - 1 - index)))
        if not rungs or share > rungs[-1].epochs:
            rungs.append(Rung(size, share))
    return tuple(rungs)


def choose_survivors(objectives: Mapping[int, float | None], num_kept: int) -> tuple[int, ...]:
    """Return the numbers of the best candidates, best first; of equals the lower number. Failed ones (None) never."""
    finished = [(-value, number) for number, value in objectives.items() if value is not None]
    return tuple(number for _, number in sorted(finished)[:num_kept])
