"""Keep the n largest of every m neighbouring weights and zero the others: the pattern of sparse tensor cores."""

from typing import cast

from torch import Tensor

from app.recipes.facts import Capability
from app.recipes.pruning import PruneNM
from worker.engine.errors import StepFailed
from worker.engine.programs.program import Program
from worker.engine.pruning.masks import (
    Found,
    Weight,
    choose_weights,
    count_facts,
    explain,
    find_weights,
    name_some,
    score_magnitude,
    set_mask,
    tell_effect,
    warn,
)
from worker.engine.pruning.patterns import from_rows, keep_n_of_m, row_width, to_rows
from worker.engine.pruning.wanda import find_scored_weights, prune_in_order
from worker.engine.techniques.base import Context, Outcome
from worker.engine.training.calibration import calibration_batches
from worker.engine.training.examples import BoundExamples


def inspect(program: Program) -> Capability:
    """Name the layers whose rows along the input axis have at least two weights."""
    return _find(program, PruneNM(kind="prune_n_m", n=1, m=2)).capability("prune_n_m")


def run(program: Program, step: PruneNM, context: Context) -> Outcome:
    """Zero all but the n best of every m neighbours in every row of every layer that has rows of m or more.

    Weights that an earlier step pruned count as the smallest, and stay pruned.
    """
    found = _find(program, step)
    if not found.weights:
        raise StepFailed(f"no layer has rows of {step.m} weights: {explain(found.left)}", code="nothing_to_prune")
    weights = choose_weights(program, found, step.skip_layers)

    def choose(weight: Weight, scores: Tensor) -> Tensor:
        kept = keep_n_of_m(to_rows(weight.layer, scores, step.axis), step.n, step.m)
        return from_rows(weight.layer, kept, weight.parameter.shape, step.axis)

    facts: dict[str, float | int | str | bool | None] = {}
    if step.criterion == "wanda":
        batches = calibration_batches(
            cast(BoundExamples, context.examples), step.num_calibration_examples, context.seed
        )
        facts["num_calibration_examples"], errors = prune_in_order(program, weights, batches, choose, context.report)
    else:
        errors = {}
        for index, weight in enumerate(weights, start=1):
            errors[weight.name] = set_mask(program, weight, choose(weight, score_magnitude(program, weight)))
            context.report(index / len(weights), f"{index} of {len(weights)} weights masked")
    ragged = [each.name for each in weights if row_width(each.layer, each.parameter, step.axis) % step.m]
    facts |= {"pattern": f"{step.n}:{step.m}", "axis": step.axis, "weights_with_short_blocks": len(ragged)}
    return Outcome(
        program=program,
        facts=count_facts(weights) | facts,
        warnings=tuple(_warn(step, weights, ragged, found.left)),
        sensitivity=tuple(tell_effect(program, each, errors[each.name], context.index) for each in weights),
    )


def _find(program: Program, step: PruneNM) -> Found:
    """Return the weights whose rows fill a block; the others stay dense."""
    found = find_scored_weights(program) if step.criterion == "wanda" else find_weights(program)
    weights, left = [], dict(found.left)
    for weight in found.weights:
        width = row_width(weight.layer, weight.parameter, step.axis)
        if width >= step.m:
            weights.append(weight)
        else:
            left[weight.layer_name] = f"rows of {width} along the {step.axis} axis do not fill a block of {step.m}"
    return Found(tuple(weights), left, found.kinds)


def _warn(step: PruneNM, weights: tuple[Weight, ...], ragged: list[str], left: dict[str, str]) -> list[str]:
    warnings = warn(weights, left)
    pattern = f"{step.n}:{step.m}"
    if step.axis == "output":
        hardware = "along the output axis, which no hardware that we know of executes"
    elif (step.n, step.m) == (2, 4):
        hardware = "as NVIDIA's sparse tensor cores execute it for fp16, bf16 and int8 weights (1:2 for fp32)"
    elif (step.n, step.m) == (1, 2):
        hardware = "as NVIDIA's sparse tensor cores execute it for fp32 weights (2:4 for fp16, bf16 and int8)"
    else:
        hardware = "in blocks, a pattern other than the 2:4 and 1:2 of NVIDIA's sparse tensor cores"
    warnings.append(
        f"The weights follow {pattern} {hardware}. Nothing on a CPU runs faster for it: Pare's targets multiply by the "
        "zeros. A GPU is faster only through a library that compresses the weights, such as cuSPARSELt."
    )
    if ragged:
        warnings.append(
            f"Rows not divisible by {step.m} in {name_some(ragged)}: their last, shorter block keeps up to {step.n} "
            "weights, as if filled up with zeros; a library must pad them."
        )
    return warnings
