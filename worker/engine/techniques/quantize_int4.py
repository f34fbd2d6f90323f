"""Store weights in 4, 3 or 2 bits with a scale for each group of neighbours; activations stay in floating point."""

from itertools import islice
from typing import cast

from torch import Tensor, nn

from app.recipes.facts import Capability
from app.recipes.metrics import LayerEffect
from app.recipes.quantization import QuantizeInt4
from worker.engine.measure.activations import can_collect
from worker.engine.programs.lowering.integers import find_integer_layers
from worker.engine.programs.program import Program
from worker.engine.quantization.group_weights import Coder, Result
from worker.engine.quantization.precisions import count_bytes
from worker.engine.quantization.weights import (
    DECODED_AT_EVERY_CALL,
    Weight,
    Weights,
    find_weights,
    name_some,
    refuse_nothing,
)
from worker.engine.techniques.base import Context, Outcome
from worker.engine.training.examples import BoundExamples

CALIBRATION_BATCH = 8
LARGE_ERROR = 0.1
"""Share of a layer's squared output, or of its squared weights, that is worth a warning when rounding loses it."""


def inspect(program: Program) -> Capability:
    """Name the layers whose weights can stand in few bits."""
    found = find_weights(program, embeddings=True)
    layers = tuple(dict.fromkeys(layer for weight in found.chosen for layer in weight.layers))
    kinds = dict(program.module.named_modules())
    floating = [name for name in layers if not isinstance(kinds[name], (nn.Linear, nn.Embedding))]
    missing = None
    if not layers:
        missing = "there are no linear, convolution, recurrent or embedding layers in 32-bit floats"
    elif floating:
        missing = f"stored in few bits but computed in floating point: {name_some(floating)}"
    return Capability(kind="quantize_int4", applicable=bool(layers), layers=layers, missing=missing)


def run(program: Program, step: QuantizeInt4, context: Context) -> Outcome:
    """Code every weight; GPTQ and AWQ feed each layer with the outputs of the already coded ones before it."""
    found = find_weights(program, step.skip_layers, embeddings=step.quantize_embeddings)
    refuse_nothing(found, step.skip_layers)
    coder = Coder(program, step)
    seen, plain = _split(program, step, found.chosen)
    for number, weight in enumerate(plain):
        coder.code_plain(weight)
        context.report((number + 1) / len(found.chosen), f"coded {weight.name}")
    num_examples = 0
    if seen:
        batches = _calibrate(step, context)
        num_examples = sum(len(inputs[0]) for inputs in batches)
        share = len(plain) / len(found.chosen)
        coder.code_with_data(seen, batches, lambda done, text: context.report(share + (1 - share) * done, text))
    return _conclude(program, step, context, found, coder.result, num_examples)


def _split(program: Program, step: QuantizeInt4, weights: list[Weight]) -> tuple[list[Weight], list[Weight]]:
    """Return the weights that are rounded with data, and those that are not."""
    if step.method not in ("gptq", "awq"):
        return [], weights
    layers = dict(program.module.named_modules())
    # A table that is also an output layer feeds everything: it is rounded first, as a table.
    seen = [each for each in weights if all(can_collect(layers[name]) for name in each.layers)]
    return seen, [each for each in weights if each not in seen]


def _calibrate(step: QuantizeInt4, context: Context) -> list[tuple[Tensor, ...]]:
    examples = cast(BoundExamples, context.examples)
    size = min(CALIBRATION_BATCH, step.num_calibration_examples)
    wanted = -(-step.num_calibration_examples // (examples.fixed_batch or size))
    return [inputs for inputs, _ in islice(examples.training_batches(size, seed=context.seed), wanted)]


def _conclude(
    program: Program, step: QuantizeInt4, context: Context, found: Weights, result: Result, num_examples: int
) -> Outcome:
    coded = [weight for weight in found.chosen if weight.name in result.coded]
    layers = list(dict.fromkeys(layer for weight in coded for layer in weight.layers))
    total = sum(weight.parameter.numel() for weight in coded)
    num_bytes = sum(count_bytes(each) for each in result.coded.values())
    in_torch = context.target.runtime != "onnxruntime"
    integer = [] if in_torch else [name for name in find_integer_layers(program) if name in layers]
    facts: dict[str, float | int | str | bool | None] = {
        "method": step.method,
        "bits": step.bits,
        "group_size": step.group_size,
        "layers_coded": len(layers),
        "layers_in_integers": len(integer),
        "layers_storage_only": 0 if in_torch else len(layers) - len(integer),
        "layers_decoded_at_every_call": len(layers) if in_torch else 0,
        "weights_coded": total,
        "weight_bytes_before": 4 * total,
        "weight_bytes_after": num_bytes,
        "bits_per_weight": 8 * num_bytes / total if total else None,
        "coded_before": len(found.coded_before),
    }
    if step.method in ("gptq", "awq"):
        facts["calibration_examples"] = num_examples
        facts["output_error_vs_rtn"] = result.error / result.rtn_error if result.rtn_error else None
    if step.method == "awq":
        facts["layers_scaled"] = len(result.scaled)
        facts["layers_clipped_only"] = len(result.clipped_only)
    effects = tuple(
        LayerEffect(
            step=context.index, layer=weight.layers[0], choice=f"int{step.bits}",
            metric=result.effects[weight.name][0], effect=result.effects[weight.name][1],
            weight_bytes=count_bytes(result.coded[weight.name]), chosen=True,
        )
        for weight in coded
    )  # fmt: skip
    warnings = [DECODED_AT_EVERY_CALL] if in_torch else _tell_onnx(program, step, layers, integer)
    warnings += _warn(step, found, result)
    return Outcome(program, facts, tuple(warnings), effects)


def _tell_onnx(program: Program, step: QuantizeInt4, layers: list[str], integer: list[str]) -> list[str]:
    kinds = dict(program.module.named_modules())
    floating = [name for name in layers if name not in integer and not isinstance(kinds[name], nn.Embedding)]
    warnings = []
    if floating:
        warnings.append(
            "These layers only take fewer bytes in the file; they are computed in floating point after loading, as "
            f"fast as before: {name_some(floating)}."
        )
    if integer:
        wider = step.bits == 3 or (step.bits == 2 and step.group_size == 16)
        stored = f" and stored in 4 bits, because its operator has no {step.bits} bits in such groups" if wider else ""
        warnings.append(
            f"In model.onnx {len(integer)} linear layers are computed from integers{stored}, with activations rounded "
            "to 8 bits on the way: faster for few rows at a time, about as fast or slower for many. In other files "
            "they are computed in floating point."
        )
    return warnings


def _warn(step: QuantizeInt4, found: Weights, result: Result) -> list[str]:
    warnings = []
    for names, reason in (
        (found.coded_before, "Left as an earlier step coded them"),
        (found.embeddings + found.shared, "Left in floating point (quantize_embeddings is false)"),
        (result.too_small, "Left in floating point because scales would take more than the codes save"),
        (result.unseen, f"Rounded to nearest because {step.method} cannot see what goes into the layer"),
    ):
        if names:
            warnings.append(f"{reason}: {name_some(names)}.")
    if step.method == "awq" and result.clipped_only:
        warnings.append(
            "AWQ could not scale the inputs of these layers without changing others, or gained nothing by it, and only "
            f"clipped their groups: {name_some(result.clipped_only)}."
        )
    lossy = sorted(((error, name) for name, (_, error) in result.effects.items() if error > LARGE_ERROR), reverse=True)
    if lossy:
        named = name_some(f"{name} ({error:.0%})" for error, name in lossy)
        warnings.append(f"Rounding loses more than {LARGE_ERROR:.0%} of the squared signal in: {named}.")
    return warnings
