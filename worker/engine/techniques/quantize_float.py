"""Store weights as 16-bit or 8-bit floating point numbers."""

import torch

from app.recipes.facts import Capability
from app.recipes.metrics import LayerEffect
from app.recipes.quantization import QuantizeFloat
from worker.engine.packing.encodings import FLOAT_TYPES
from worker.engine.programs.program import Program
from worker.engine.quantization.precisions import count_bytes
from worker.engine.quantization.rounding import FLOAT_MAX, round_to_float
from worker.engine.quantization.weights import DECODED_AT_EVERY_CALL, find_weights, name_some, refuse_nothing
from worker.engine.techniques.base import Context, Outcome

STORAGE_ONLY = (
    "These formats are a storage gain: the files are smaller, and weights are turned back into 32-bit floats, "
    "embedding tables row by row and all else when the file is loaded. Arithmetic stays in 32 bits, as fast as before."
)


def inspect(program: Program) -> Capability:
    """Name the layers whose weights can stand in fewer bits."""
    layers = tuple(
        dict.fromkeys(name for each in find_weights(program, embeddings=True).chosen for name in each.layers)
    )
    missing = None if layers else "there are no linear, convolution, recurrent or embedding layers in 32-bit floats"
    return Capability(kind="quantize_float", applicable=bool(layers), layers=layers, missing=missing)


def run(program: Program, step: QuantizeFloat, context: Context) -> Outcome:
    """Round every weight matrix to the format; 8-bit rows are scaled so that their largest weight is the format's."""
    found = find_weights(program, step.skip_layers, embeddings=True)
    refuse_nothing(found, step.skip_layers)
    effects = []
    clipped, vanished = [], []
    total = num_bytes = 0
    worst = 0.0
    for number, weight in enumerate(found.chosen):
        before = weight.parameter.detach().clone()
        encoding = round_to_float(before, step.format)
        size = count_bytes(encoding)
        program.encode(weight.name, encoding)
        after = weight.parameter.detach()
        power = float(before.double().square().sum())
        error = float((after - before).double().square().sum()) / power if power else 0.0
        worst = max(worst, error)
        if encoding.scales is None and bool((before.abs() > FLOAT_MAX[step.format]).any()):
            clipped.append(weight.name)
        if bool(((after == 0) & (before.abs() > 0)).any()):
            vanished.append(weight.name)
        total, num_bytes = total + before.numel(), num_bytes + size
        effects.append(
            LayerEffect(
                step=context.index,
                layer=weight.layers[0],
                choice=step.format,
                metric="weight_error",
                effect=error,
                weight_bytes=size,
                chosen=True,
            )
        )
        context.report((number + 1) / len(found.chosen), f"coded {weight.name}")
    in_torch = context.target.runtime != "onnxruntime"
    warnings = [DECODED_AT_EVERY_CALL if in_torch else STORAGE_ONLY]
    if step.format.startswith("fp8") and not in_torch:
        warnings.append("ONNX operators lack 8-bit floats: model.onnx stores bytes and a table of all 256 values.")
    if found.coded_before:
        warnings.append(f"Left as an earlier step coded them: {name_some(found.coded_before)}.")
    if clipped:
        warnings.append(
            f"Weights above {FLOAT_MAX[step.format]:g}, the largest {step.format}, were set to it in: "
            f"{name_some(clipped)}."
        )
    facts: dict[str, float | int | str | bool | None] = {
        "format": step.format,
        "layers_coded": len({name for weight in found.chosen for name in weight.layers}),
        "weights_coded": total,
        "weight_bytes_before": 4 * total,
        "weight_bytes_after": num_bytes,
        "largest_weight_error": worst,
        "epsilon": torch.finfo(FLOAT_TYPES[step.format]).eps,
        "weights_with_underflow": len(vanished),
        "coded_before": len(found.coded_before),
    }
    return Outcome(program, facts, tuple(warnings), tuple(effects))
