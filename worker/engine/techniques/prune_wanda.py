"""Zero, in every output row, the weights with the smallest |weight| * ||input activation|| (Sun et al. 2023)."""

from typing import cast

from torch import Tensor

from app.recipes.facts import Capability
from app.recipes.pruning import PruneWanda
from worker.engine.programs.program import Program
from worker.engine.pruning.masks import Weight, choose_weights, count_facts, tell_effect, warn
from worker.engine.pruning.patterns import keep_share_of_rows
from worker.engine.pruning.wanda import find_scored_weights, prune_in_order
from worker.engine.techniques.base import Context, Outcome
from worker.engine.training.calibration import calibration_batches
from worker.engine.training.examples import BoundExamples


def inspect(program: Program) -> Capability:
    """Name the linear layers and convolutions."""
    return find_scored_weights(program).capability("prune_wanda")


def run(program: Program, step: PruneWanda, context: Context) -> Outcome:
    """Zero the same number of weights in every output row, layer by layer, without training.

    Every layer is judged with the inputs that the layers before it, already pruned, make of the calibration examples.
    """
    found = find_scored_weights(program)
    weights = choose_weights(program, found, step.skip_layers)

    def choose(weight: Weight, scores: Tensor) -> Tensor:
        return keep_share_of_rows(scores.flatten(1), step.sparsity).reshape(weight.parameter.shape)

    examples = cast(BoundExamples, context.examples)
    batches = calibration_batches(examples, step.num_calibration_examples, context.seed)
    num_examples, errors = prune_in_order(program, weights, batches, choose, context.report)
    return Outcome(
        program=program,
        facts=count_facts(weights) | {"num_calibration_examples": num_examples},
        warnings=tuple(warn(weights, found.left)),
        sensitivity=tuple(tell_effect(program, each, errors[each.name], context.index) for each in weights),
    )
