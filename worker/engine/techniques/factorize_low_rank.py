"""Replace layers by chains of thinner ones: SVD of matrices, Tucker-2 or separable kernels of convolutions."""

from collections.abc import Iterator
from typing import cast

from torch import Tensor, nn

from app.recipes.facts import Capability
from app.recipes.low_rank import FactorizeLowRank
from app.recipes.metrics import LayerEffect
from worker.engine.errors import StepFailed
from worker.engine.low_rank.effects import measure_effects
from worker.engine.low_rank.factors import Factors
from worker.engine.low_rank.ranks import choose_ranks
from worker.engine.low_rank.replacement import Candidates, find_candidates, make_layers, put_layers
from worker.engine.measure.activations import Gram, collect, row_shape
from worker.engine.measure.macs import count_macs
from worker.engine.programs.program import Program
from worker.engine.pruning.masks import check_skipped, explain
from worker.engine.techniques.base import Context, Outcome
from worker.engine.training.calibration import calibration_batches
from worker.engine.training.examples import BoundExamples

MAX_FEATURES = 8192
"""Inputs of one output of a layer beyond which its Gram matrix, half a GiB in double precision, is not made."""
MAX_GRAM_BYTES = 2**29
"""Of the Gram matrices that are summed in one pass over the examples."""


def inspect(program: Program) -> Capability:
    """Name the layers that can be factorized."""
    found = find_candidates(program)
    missing = explain(found.left)
    if not found.kinds:
        missing = missing or "there are no linear layers or convolutions"
    return Capability(
        kind="factorize_low_rank", applicable=bool(found.kinds), layers=tuple(found.kinds), missing=missing or None
    )


def run(program: Program, step: FactorizeLowRank, context: Context) -> Outcome:
    """Factorize every layer that gets smaller by it, in place; the others stay whole and are named with the reason."""
    check_skipped(program, step.skip_layers)
    found = find_candidates(program, step.convolutions)
    for name in step.skip_layers:
        found.kinds.pop(name, None)
    before, macs_before = _count_parameters(program), count_macs(program).total
    factors = dict(_decompose(program, found, step, context))
    chosen = choose_ranks(step, factors)
    effects: list[LayerEffect] = []
    errors: list[float] = []
    for index, (name, ranks) in enumerate(chosen.items(), start=1):
        layer = program.module.get_submodule(name)
        message, error = f"{name} stays whole", 0.0
        if ranks is None:
            found.left[name] = f"its factors would not be smaller, or better whole, by {step.rank_by}"
        else:
            weights, error = factors[name].factorize(ranks)
            put_layers(program, name, make_layers(layer, found.kinds[name], weights))
            errors.append(error)
            message = f"{name}: rank {'x'.join(map(str, ranks))}, error {error:.3g}"
        element_bytes = layer.weight.element_size()  # type: ignore[operator]
        effects += measure_effects(name, factors[name], ranks, error, step=context.index, element_bytes=element_bytes)
        context.report(0.7 + 0.3 * index / len(chosen), message)
    if not errors:
        raise StepFailed(
            f"no layer gets smaller: {explain(found.left)}",
            code="nothing_to_factorize",
            fix=f"Lower {step.rank_by}, or leave factorize_low_rank out for this model.",
        )
    macs_after = count_macs(program).total
    warnings = []
    if macs_after >= macs_before:
        warnings.append(
            f"MACs went from {macs_before} to {macs_after}: thin layers run where the whole one skipped positions."
        )
    if found.left:
        warnings.append(f"Left whole: {explain(found.left)}.")
    return Outcome(
        program=program,
        facts={
            "layers_factorized": len(errors),
            "layers_left_whole": len(found.left),
            "parameters_before": before,
            "parameters_after": _count_parameters(program),
            "macs_before": macs_before,
            "macs_after": macs_after,
            "mean_layer_error": sum(errors) / len(errors),
            "largest_layer_error": max(errors),
        },
        warnings=tuple(warnings),
        sensitivity=tuple(effects),
    )


def _decompose(
    program: Program, found: Candidates, step: FactorizeLowRank, context: Context
) -> Iterator[tuple[str, Factors]]:
    layers = {name: program.module.get_submodule(name) for name in found.kinds}
    grams: dict[str, Tensor | None] = dict.fromkeys(layers)
    done = 0
    for names in _split(layers) if step.whiten else [list(layers)]:
        if step.whiten:
            seen = [name for name in names if row_shape(layers[name])[1] <= MAX_FEATURES]
            batches = calibration_batches(
                cast(BoundExamples, context.examples), step.num_calibration_examples, context.seed
            )
            grams |= {name: gram.matrix[0].cpu() for name, gram in collect(program, seen, batches, Gram).items()}
        for name in names:
            yield name, Factors(layers[name], found.kinds[name], grams.pop(name))
            done += 1
            context.report(0.7 * done / len(layers), f"{name} decomposed")


def _split(layers: dict[str, nn.Module]) -> Iterator[list[str]]:
    """Yield names of layers whose Gram matrices fit into memory together."""
    part: list[str] = []
    size = 0
    for name, layer in layers.items():
        needed = 4 * row_shape(layer)[1] ** 2
        if part and size + needed > MAX_GRAM_BYTES:
            yield part
            part, size = [], 0
        part.append(name)
        size += needed
    if part:
        yield part


def _count_parameters(program: Program) -> int:
    return sum(parameter.numel() for parameter in program.module.parameters())
