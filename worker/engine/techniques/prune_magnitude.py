"""Set the smallest weights to zero and remember them as masks, so that training keeps them zero."""

from collections.abc import Callable
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
    tell_effect,
    warn,
)
from worker.engine.techniques.base import Context, Outcome
from worker.engine.training.examples import BoundExamples
from worker.engine.training.loop import Trained, train

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
    effects: list[LayerEffect] = []
    for index in range(1, num_rounds + 1):
        for group, start in zip(groups, starts, strict=True):
            errors = _prune(program, group, sparsity_after(step, index, num_rounds, start))
            # Of the last round alone: one that goes on from a checkpoint does not see what the earlier ones did.
            if index == num_rounds:
                told = zip(group, errors, strict=True)
                effects += [tell_effect(program, weight, error, context.index) for weight, error in told]
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
    return Outcome(program=program, facts=facts, warnings=tuple(warn(weights, found.left)), sensitivity=tuple(effects))


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
