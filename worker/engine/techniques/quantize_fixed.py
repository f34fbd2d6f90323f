"""Store weights as fixed-point numbers: integers times a power of two (Qm.n)."""

from app.recipes.facts import Capability
from app.recipes.metrics import LayerEffect
from app.recipes.quantization import QuantizeFixed
from worker.engine.programs.program import Program
from worker.engine.quantization.precisions import count_bytes
from worker.engine.quantization.rounding import round_to_fixed
from worker.engine.quantization.weights import DECODED_AT_EVERY_CALL, find_weights, name_some, refuse_nothing
from worker.engine.techniques.base import Context, Outcome

PURPOSE = "Fixed-point weights are for targets without floating point."
STORAGE_ONLY = (
    "Here they are a storage gain: files hold the integers, and weights are turned back into 32-bit floats, embedding "
    "tables row by row and all else when the file is loaded. Biases, norms and activations stay in floating point."
)
LARGE_ERROR = 0.01
"""Share of a weight's squared numbers whose loss is worth a warning."""


def inspect(program: Program) -> Capability:
    """Name the layers whose weights can be fixed-point numbers."""
    layers = tuple(
        dict.fromkeys(name for each in find_weights(program, embeddings=True).chosen for name in each.layers)
    )
    missing = None if layers else "there are no linear, convolution, recurrent or embedding layers in 32-bit floats"
    return Capability(kind="quantize_fixed", applicable=bool(layers), layers=layers, missing=missing)


def run(program: Program, step: QuantizeFixed, context: Context) -> Outcome:
    """Round every weight matrix to its grid; what lies beyond the grid's ends is set to them."""
    found = find_weights(program, step.skip_layers, embeddings=True)
    refuse_nothing(found, step.skip_layers)
    effects, saturated, points = [], [], []
    num_saturated = total = num_bytes = 0
    for number, weight in enumerate(found.chosen):
        before = weight.parameter.detach().clone()
        encoding = round_to_fixed(before, step.bits, step.fraction_bits)
        size = count_bytes(encoding)
        unit = 2.0**-encoding.fraction_bits
        lowest, highest = -(2.0 ** (step.bits - 1)) * unit, (2.0 ** (step.bits - 1) - 1) * unit
        beyond = int(((before > highest + unit / 2) | (before < lowest - unit / 2)).sum())
        program.encode(weight.name, encoding)
        power = float(before.double().square().sum())
        error = float((weight.parameter.detach() - before).double().square().sum()) / power if power else 0.0
        if beyond:
            saturated.append(f"{weight.name} ({beyond})")
        points.append(encoding.fraction_bits)
        num_saturated, total, num_bytes = num_saturated + beyond, total + before.numel(), num_bytes + size
        effects.append(
            LayerEffect(
                step=context.index,
                layer=weight.layers[0],
                metric="weight_error",
                effect=error,
                choice=f"Q{step.bits - 1 - encoding.fraction_bits}.{encoding.fraction_bits}",
                weight_bytes=size,
                chosen=True,
            )
        )
        context.report((number + 1) / len(found.chosen), f"coded {weight.name}")
    in_torch = context.target.runtime != "onnxruntime"
    warnings = [f"{PURPOSE} {DECODED_AT_EVERY_CALL if in_torch else STORAGE_ONLY}"]
    if in_torch and 8 < step.bits < 16:
        warnings.append("model.pt2 stores each number in 16 bits, because more than 8 bits are not packed there.")
    if not in_torch and step.bits not in (2, 4, 8, 16):
        stored = next(each for each in (4, 8, 16) if each > step.bits)
        warnings.append(f"model.onnx stores each number in {stored} bits, because it has no {step.bits}-bit type.")
    if found.coded_before:
        warnings.append(f"Left as an earlier step coded them: {name_some(found.coded_before)}.")
    if saturated:
        warnings.append(f"Weights beyond the range were set to its ends in: {name_some(saturated)}.")
    lossy = [f"{each.layer} ({each.effect:.0%})" for each in effects if each.effect > LARGE_ERROR]
    if lossy:
        warnings.append(f"Rounding loses more than {LARGE_ERROR:.0%} of the squared weights in: {name_some(lossy)}.")
    facts: dict[str, float | int | str | bool | None] = {
        "bits": step.bits,
        "fraction_bits_least": min(points),
        "fraction_bits_most": max(points),
        "layers_coded": len({name for weight in found.chosen for name in weight.layers}),
        "weights_coded": total,
        "weights_saturated": num_saturated,
        "weight_bytes_before": 4 * total,
        "weight_bytes_after": num_bytes,
        "largest_weight_error": max(each.effect for each in effects),
        "coded_before": len(found.coded_before),
    }
    return Outcome(program, facts, tuple(warnings), tuple(effects))
