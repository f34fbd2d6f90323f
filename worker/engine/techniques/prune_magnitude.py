"""Set the smallest weights to zero and remember them as masks, so that training keeps them zero."""

from collections.abc import Callable, Iterable
from typing import Any, cast

import numpy as np
import torch

from app.recipes.facts import Capability
from app.recipes.metrics import LayerEffect
from app.recipes.pruning import PruneMagnitude
from worker.engine.programs.program import Program
from worker.engine.pruning.masks import (
    Weight,
    choose_weights,
    count_facts,
    find_weights,
    keep_largest,
    score_magnitude,
    set_mask,
    share_masked,
    warn,
)
from worker.engine.techniques.base import Context, Outcome
from worker.engine.training.examples import BoundExamples
from worker.engine.training.loop import Trained, train

MAX_EFFECTS = 2000
"""Told of one step: rounds times weights. A table of more helps nobody."""
SEED_STRIDE = 10_007
"""Between the seeds of two rounds: more than the epochs of one, each of which takes the next seed."""


def inspect(program: Program) -> Capability:
    """Name the layers with prunable weights."""
    return find_weights(program).capability("prune_magnitude")


def run(program: Program, step: PruneMagnitude, context: Context) -> Outcome:
    """Zero exactly the asked share of the prunable weights: those smallest in magnitude, the earlier one on a tie.

    A gradual schedule gets there in rounds, each followed by training (the last one not). Masks only ever grow.
    """
    found = find_weights(program)
    weights = choose_weights(program, found, step.skip_layers)
    groups = [weights] if step.scope == "global" else [(weight,) for weight in weights]
    starts = [_share_pruned(program, group) for group in groups]
    num_rounds = 1 if step.schedule == "one_shot" else step.num_iterations
    trained: list[Trained] = []
    effects = _Effects(program, context, choose_rounds(num_rounds, len(weights)))
    for index in range(1, num_rounds + 1):
        for group, start in zip(groups, starts, strict=True):
            effects.note(index, group, _prune(program, group, sparsity_after(step, index, num_rounds, start)))
        sparsity = count_facts(weights)["sparsity"]
        context.report((index - 1) / num_rounds, f"round {index} of {num_rounds}: sparsity {sparsity:.4g}")
        if step.training is not None and index < num_rounds:
            trained.append(
                train(
                    program, cast(BoundExamples, context.examples), step.training,
                    seed=context.seed + index * SEED_STRIDE, report=_within(context, index, num_rounds),
                    checkpoints=context.checkpoints,
                )
            )  # fmt: skip
    context.report(1.0, f"{len(weights)} weights masked")
    facts = count_facts(weights)
    if trained:
        facts |= {
            "rounds": num_rounds,
            "epochs_run": sum(each.epochs_run for each in trained),
            "steps_run": sum(each.steps_run for each in trained),
            "metric": trained[-1].quality_after.metric,
            "first_round_quality": trained[0].quality_after.value,
            "last_round_quality": trained[-1].quality_after.value,
        }
    return Outcome(
        program=program, facts=facts, warnings=tuple(warn(weights, found.left)), sensitivity=effects.tell(weights)
    )


def choose_rounds(num_rounds: int, num_weights: int) -> tuple[int, ...]:
    """Return the rounds (from 1) whose effects are told: the last, and as many others, evenly spread, as may be."""
    most = min(num_rounds, max(1, MAX_EFFECTS // num_weights))
    return tuple(num_rounds - place * num_rounds // most for place in reversed(range(most)))


class _Effects:
    """What each round did to each weight.

    Kept with what a checkpoint holds: an attempt that goes on from one walks through the rounds before it again, on
    weights that were not trained between them, and would measure other numbers.
    """

    def __init__(self, program: Program, context: Context, rounds: tuple[int, ...]) -> None:
        self._program, self._step, self._rounds, self._known = program, context.index, rounds, context.effects

    def note(self, index: int, weights: Iterable[Weight], errors: Iterable[float]) -> None:
        """Keep a round's errors, and the sparsity that it reached in each weight."""
        if index not in self._rounds:
            return
        for weight, error in zip(weights, errors, strict=True):
            self._known.setdefault(self._key(index, weight, "error"), error)
            self._known.setdefault(self._key(index, weight, "sparsity"), share_masked(self._program, weight))

    def tell(self, weights: Iterable[Weight]) -> tuple[LayerEffect, ...]:
        """Return them, weight by weight, and forget them."""
        last = self._rounds[-1]
        return tuple(
            LayerEffect(
                step=self._step,
                layer=weight.layer_name,
                choice=f"{f'round {index}, ' if last > 1 else ''}sparsity "
                f"{self._known.pop(self._key(index, weight, 'sparsity')):.4g}",
                metric="weight_error",
                effect=self._known.pop(self._key(index, weight, "error")),
                chosen=index == last,
            )
            for weight in weights
            for index in self._rounds
        )

    def _key(self, index: int, weight: Weight, what: str) -> str:
        return f"step {self._step}, round {index}, {weight.name}: {what}"


def sparsity_after(step: PruneMagnitude, index: int, num_rounds: int, start: float) -> float:
    """Return the sparsity after round `index` (from 1), from `start` before the first to the asked one after the last.

    cubic: s + (s0 - s) * (1 - t / n) ** 3, equation 1 of Zhu and Gupta (2017); linear: the same without the power.
    """
    if index == num_rounds:
        return step.sparsity
    left = (1 - index / num_rounds) ** (3 if step.schedule == "cubic" else 1)
    return step.sparsity + (min(start, step.sparsity) - step.sparsity) * left


def _share_pruned(program: Program, weights: tuple[Weight, ...]) -> float:
    pruned = sum(int((~program.masks[each.name]).sum()) for each in weights if each.name in program.masks)
    return pruned / sum(weight.parameter.numel() for weight in weights)


def _prune(program: Program, weights: tuple[Weight, ...], sparsity: float) -> list[float]:
    scores = [score_magnitude(program, weight).flatten().cpu().numpy() for weight in weights]
    kept = keep_largest(np.concatenate(scores), sparsity)
    bounds = np.cumsum([score.size for score in scores])[:-1]
    parts = zip(weights, np.split(kept, bounds), strict=True)
    return [set_mask(program, weight, torch.from_numpy(part)) for weight, part in parts]


def _within(context: Context, index: int, num_rounds: int) -> Callable[..., None]:
    def report(fraction: float, message: str = "", **metrics: Any) -> None:
        context.report((index - 1 + fraction) / num_rounds, f"round {index} of {num_rounds}: {message}", **metrics)

    return report
