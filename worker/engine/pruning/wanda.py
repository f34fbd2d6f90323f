"""Scores of weights together with the activations they meet: |weight| * ||input feature|| (Sun et al. 2023, Wanda)."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from worker.engine.errors import StepFailed
from worker.engine.measure.activations import LAYERS, FeatureNorms
from worker.engine.measure.walk import Walk
from worker.engine.programs.program import Program
from worker.engine.pruning.masks import TRANSPOSED, Found, Weight, find_weights, mark_pruned, set_mask


def find_scored_weights(program: Program) -> Found:
    """Return the weights whose inputs can be seen, and the layers left dense with the reason."""
    found = find_weights(program, LAYERS)
    called = {str(node.target) for node in program.module.graph.nodes if node.op == "call_module"}
    left = {
        name: "it is a transposed convolution, whose inputs are not seen"
        for name, layer in program.module.named_modules()
        if isinstance(layer, TRANSPOSED)
    }
    left |= {
        weight.layer_name: "it is not called as a layer, so that its inputs are not seen"
        for weight in found.weights
        if weight.layer_name not in called
    }
    weights = tuple(weight for weight in found.weights if weight.layer_name in called)
    return Found(weights, {**found.left, **left}, "linear or convolution")


def prune_in_order(
    program: Program,
    weights: Sequence[Weight],
    batches: Iterable[tuple[Tensor, ...]],
    choose: Callable[[Weight, Tensor], Tensor],
    report: Callable[..., None],
) -> tuple[int, dict[str, float]]:
    """Prune layer by layer in the order in which they run, each with the inputs that the pruned ones before it make.

    `choose(weight, scores)` returns the mask of what is kept; both are of the weight's shape. Returns the number of
    examples seen, and the relative squared error of every weight by its name.
    """
    by_name = {weight.layer_name: weight for weight in weights}
    held = list(batches)
    errors: dict[str, float] = {}

    def visit(found: dict[str, FeatureNorms]) -> None:
        for layer_name, norms in found.items():
            weight = by_name[layer_name]
            errors[weight.name] = set_mask(program, weight, choose(weight, score(program, weight, norms)))

    Walk(program, held, list(by_name), FeatureNorms).run(visit, report)
    never = [weight.name for weight in weights if weight.name not in errors]
    assert not never, f"never called: {never}"
    return sum(len(inputs[0]) for inputs in held), errors


def score(program: Program, weight: Weight, norms: FeatureNorms) -> Tensor:
    """Return |w| * ||x||, of the weight's shape; PRUNED where an earlier step pruned.

    ||x|| is the L2 norm of the input feature over all calibration rows: of a linear layer's column, or of a
    convolution's input channel as seen from one kernel position.
    """
    magnitudes = weight.parameter.detach().abs().double()
    features = norms.squares.sqrt()
    if not bool(torch.isfinite(features).all()):
        raise StepFailed(
            f"the activations that go into {weight.layer_name} are not finite",
            code="activations_not_finite",
            fix="Check the model on this data, or leave the layer out with skip_layers.",
        )
    groups = features.shape[0]
    scores = magnitudes.reshape(groups, -1, features.shape[1]) * features[:, None, :]
    return mark_pruned(program, weight, scores.reshape(magnitudes.shape))
