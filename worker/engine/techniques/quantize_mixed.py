"""Measure what each layer suffers in each precision, then give every layer the precision that a budget allows it."""

from collections import Counter
from dataclasses import dataclass, field
from typing import cast

from app.recipes.facts import Capability
from app.recipes.metrics import LayerEffect
from app.recipes.quantization import QuantizeMixed
from worker.engine.errors import RecipeRefused, StepFailed
from worker.engine.measure.sensitivity import Sensitivity
from worker.engine.programs.placement import on_device
from worker.engine.programs.program import Program
from worker.engine.quantization.allocation import cost_of, uniform_choices
from worker.engine.quantization.latency_search import LatencyOf, find_fast
from worker.engine.quantization.mixed import Assignment, MixedSearch, sum_of_effects
from worker.engine.quantization.precisions import PRECISIONS, Rounder, find_codable
from worker.engine.quantization.quality_search import QualityOf, find_smallest
from worker.engine.quantization.weights import DECODED_AT_EVERY_CALL, find_weights
from worker.engine.techniques.base import Context, Outcome
from worker.engine.training.examples import BoundExamples

NUM_NAMED = 8
MUCH = 0.1
"""An error of the output that is worth a warning."""
Facts = dict[str, float | int | str | bool | None]


@dataclass
class _Chosen:
    assignment: Assignment
    facts: Facts = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def inspect(program: Program) -> Capability:
    """Name the layers with weight matrices."""
    layers = dict.fromkeys(name for each in find_weights(program, embeddings=True).chosen for name in each.layers)
    missing = None if layers else "there are no linear, convolution, embedding or recurrent layers"
    return Capability(kind="quantize_mixed", applicable=bool(layers), layers=tuple(layers), missing=missing)


def run(program: Program, step: QuantizeMixed, context: Context) -> Outcome:
    """Measure every layer in every precision alone, choose under the budget, and encode what was chosen."""
    layers, num_coded = find_codable(program, step.skip_layers)
    if step.budget == "latency" and context.target.runtime != "onnxruntime":
        raise RecipeRefused(
            f"budget is 'latency' and target.runtime {context.target.runtime!r}, which computes with weights of "
            "every precision in fp32: no choice could be faster",
            code="latency_cannot_change",
            fix="Set recipe.target.runtime to 'onnxruntime', or budget to 'size' or 'quality'.",
        )
    program.module.eval()
    examples = cast(BoundExamples, context.examples).set_apart()
    sensitivity = Sensitivity(
        program.module, examples, num_examples=step.num_calibration_examples, seed=context.seed, cache=context.effects
    )
    rounder = Rounder(program, group_size=step.group_size, method=step.method)
    precisions = sorted(set(step.precisions), key=PRECISIONS.index)
    choices = rounder.make_choices(layers, precisions, sensitivity.inputs)
    context.report(0.1, f"{len(layers)} layers in {len(precisions)} precisions")
    search = MixedSearch(program, layers, choices, sensitivity, rounder.key)
    with on_device(program):
        search.measure_effects(lambda done, message: context.report(0.1 + 0.5 * done, message))
    chosen = _CHOOSERS[step.budget](program, search, step, context, examples)
    facts = chosen.facts | _count(search, chosen.assignment, step)
    search.restore()
    for row, column in enumerate(chosen.assignment):
        for name, encoding in choices[row][column].encodings.items():
            program.encode(name, encoding)
    if num_coded:
        facts["weights_coded_before"] = num_coded
    return Outcome(
        program=program,
        facts=facts,
        warnings=(*chosen.warnings, *_explain(search, chosen.assignment), *_tell_runtime(program, context)),
        sensitivity=_list_effects(search, chosen.assignment, context.index),
    )


def _choose_by_size(
    program: Program, search: MixedSearch, step: QuantizeMixed, context: Context, _examples: BoundExamples
) -> _Chosen:
    full = _full_bytes(search)
    budget = int(step.max_size_ratio * full)
    with on_device(program):
        found = search.choose(budget, lambda done, message: context.report(0.6 + 0.4 * done, message))
    if found is None:
        options = search.options()
        smallest = sum(min(option.cost for option in each) for each in options)
        raise RecipeRefused(
            f"max_size_ratio {step.max_size_ratio} allows {budget} bytes, and the smallest of {list(step.precisions)} "
            f"take {smallest} with their scales, {smallest / full:.4f} of fp32",
            code="budget_too_small",
            fix=f"Raise max_size_ratio to {smallest / full + 0.001:.3f}, add a lower precision, or use larger groups.",
        )
    facts: Facts = {"max_size_ratio": step.max_size_ratio}
    options = search.options()
    uniforms = [each for each in uniform_choices(options) if cost_of(options, each) <= budget]
    if uniforms:
        best = min(uniforms, key=search.error)
        facts["best_uniform"] = search.choices[0][best[0]].precision
        facts["best_uniform_bytes"] = search.size(best)
        facts[f"best_uniform_{search.sensitivity.metric}"] = search.error(best)
    return _Chosen(found, facts)


def _choose_by_quality(
    program: Program, search: MixedSearch, step: QuantizeMixed, context: Context, examples: BoundExamples
) -> _Chosen:
    search.restore()
    with on_device(program):
        quality = QualityOf(program, examples)
        best, finest = find_smallest(
            search, quality, step.max_quality_loss, lambda done, message: context.report(0.6 + 0.4 * done, message)
        )
    metric = best.quality.result.metric
    if best.loss > step.max_quality_loss:
        raise StepFailed(
            f"even {search.choices[0][0].precision} everywhere loses {finest.loss:.6g} of {metric} "
            f"({finest.quality.baseline.value:.6g} to {finest.quality.result.value:.6g}), "
            f"and max_quality_loss is {step.max_quality_loss:.6g}",
            code="quality_not_reached",
            fix="Add a higher precision, e.g. fp32, or raise max_quality_loss.",
        )
    facts: Facts = {
        "max_quality_loss": step.max_quality_loss,
        "quality_loss": best.loss,
        "quality_metric": metric,
        "quality_before": best.quality.baseline.value,
        "quality_after": best.quality.result.value,
        "quality_examples": best.quality.result.num_examples,
        "quality_measurements": quality.num_measured,
    }
    warnings = []
    error = best.quality.change_error
    if error is not None and 1.96 * error > step.max_quality_loss:
        warnings.append(
            f"The loss of {best.loss:.4g} in {metric} was measured on {best.quality.result.num_examples} examples with "
            f"a standard error of {error:.2g}: a limit of {step.max_quality_loss:.4g} cannot be told from noise there. "
            "More training examples give a surer choice."
        )
    return _Chosen(best.assignment, facts, warnings)


def _choose_by_latency(
    program: Program, search: MixedSearch, step: QuantizeMixed, context: Context, examples: BoundExamples
) -> _Chosen:
    search.restore()
    latency = LatencyOf(program.copy(), search, context.target, examples, context.directory, context.seed)
    found, within = find_fast(
        search, latency, step.max_latency_ratio, lambda done, message: context.report(0.6 + 0.4 * done, message)
    )
    facts: Facts = {"max_latency_ratio": step.max_latency_ratio, "latency_measurements": len(latency.timed)}
    ratios = {
        search.choices[0][column].precision: timed.ratio.value
        for timed in latency.timed
        for column in set(timed.assignment) - {0}
        if set(timed.assignment) <= {0, column}
    }
    facts |= {f"{precision}_everywhere_latency_ratio": ratio for precision, ratio in ratios.items()}
    if found is None:
        finest = (0,) * len(search.layers)
        each = ", ".join(f"{precision} x{ratio:.2f}" for precision, ratio in ratios.items())
        return _Chosen(
            finest,
            facts,
            [
                f"No precision was faster than the model as it is on this machine (everywhere: {each}), so every layer "
                f"keeps {search.choices[0][0].precision}."
            ],
        )
    facts["latency_ratio"] = found.ratio.value
    warnings = []
    if not within:
        warnings.append(
            f"max_latency_ratio {step.max_latency_ratio:.3g} was not reached: the fastest of {len(latency.timed)} "
            f"measured choices takes x{found.ratio.value:.3f} of the time."
        )
    return _Chosen(found.assignment, facts, warnings)


_CHOOSERS = {"size": _choose_by_size, "quality": _choose_by_quality, "latency": _choose_by_latency}


def _full_bytes(search: MixedSearch) -> int:
    return sum(4 * search.num_weights(row) for row in range(len(search.layers)))


def _count(search: MixedSearch, assignment: Assignment, step: QuantizeMixed) -> Facts:
    sensitivity = search.sensitivity
    full, size = _full_bytes(search), search.size(assignment)
    precisions = Counter(search.choices[row][column].precision for row, column in enumerate(assignment))
    return {
        "budget": step.budget,
        "weight_bytes_before": full,
        "weight_bytes_after": size,
        "size_ratio": size / full,
        sensitivity.metric: search.error(assignment),
        f"sum_of_single_{sensitivity.metric}s": sum_of_effects(search, assignment),
        **{f"layers_{precision}": precisions[precision] for precision in PRECISIONS if precision in step.precisions},
        "sensitivity_examples": sensitivity.num_examples,
        "effects_measured": sensitivity.num_measured,
        "effects_remembered": sensitivity.num_remembered,
        "passes_over_examples": round(sensitivity.forwards, 1),
    }


def _explain(search: MixedSearch, assignment: Assignment) -> list[str]:
    """Say which layers stay finer than most weights, and why."""
    weights: Counter[int] = Counter()
    for row, column in enumerate(assignment):
        weights[column] += search.num_weights(row)
    usual = weights.most_common(1)[0][0]
    metric = search.sensitivity.metric
    finer = [(search.effects[row][usual], row) for row, column in enumerate(assignment) if column < usual]
    sentences = []
    if finer:
        finer.sort(key=lambda each: (-each[0], each[1]))
        named = ", ".join(
            f"{search.layers[row].name} ({search.choices[row][assignment[row]].precision}; {effect:.2g})"
            for effect, row in finer[:NUM_NAMED]
        )
        more = f" and {len(finer) - NUM_NAMED} more" if len(finer) > NUM_NAMED else ""
        sentences.append(
            f"Kept finer than {search.choices[0][usual].precision}, with the {metric} that alone would cost: "
            f"{named}{more}."
        )
    error = search.error(assignment)
    if error > MUCH:
        sentences.append(
            f"The chosen precisions change the output much: {metric} {error:.3g} on "
            f"{search.sensitivity.num_examples} examples. Allow a larger budget, or finetune before this step."
        )
    return sentences


def _tell_runtime(program: Program, context: Context) -> tuple[str, ...]:
    return (DECODED_AT_EVERY_CALL,) if context.target.runtime != "onnxruntime" and program.encodings else ()


def _list_effects(search: MixedSearch, assignment: Assignment, step: int) -> tuple[LayerEffect, ...]:
    return tuple(
        LayerEffect(
            step=step,
            layer=layer.name,
            choice=choice.precision,
            metric=search.sensitivity.metric,
            effect=effect,
            weight_bytes=choice.num_bytes,
            chosen=column == taken,
        )
        for layer, choices, effects, taken in zip(
            search.layers, search.choices, search.effects, assignment, strict=True
        )
        for column, (choice, effect) in enumerate(zip(choices, effects, strict=True))
    )
