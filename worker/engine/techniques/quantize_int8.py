"""Store weights as 8-bit integers and compute with them in ONNX Runtime, on the CPU.

Dynamic: linear (and LSTM) layers; activation ranges are found at run time, row by row. Convolutions stay in floating
point, because ONNX Runtime's ConvInteger is slower than its float convolution. Static: ranges are calibrated on
training examples, and convolutions are quantized too.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import torch
from onnx import ModelProto, numpy_helper
from onnxruntime.quantization import (
    QuantType,
    quant_pre_process,
    quantize_dynamic,
)
from torch import Tensor, nn

from app.recipes.facts import Capability
from app.recipes.quantization import QuantizeInt8
from worker.engine.errors import RecipeRefused, StepFailed
from worker.engine.programs.capture import evaluating
from worker.engine.programs.export_onnx import export_onnx
from worker.engine.programs.program import OnnxProgram, Program
from worker.engine.quantization.calibration import CALIBRATION_BATCH, has_exact_integer_products
from worker.engine.quantization.dynamic_linear import find_linear_nodes, join_gelu, quantize_linear_layers
from worker.engine.quantization.embedding_tables import quantize_tables
from worker.engine.quantization.fidelity import compare_files
from worker.engine.quantization.int8_effects import Activations, measure_int8_effects
from worker.engine.quantization.int8_gptq import round_linear_layers
from worker.engine.quantization.int8_grid import Floats, round_to_int8
from worker.engine.quantization.layers import find_layers, find_quantized
from worker.engine.quantization.onnx_attention import join_attention
from worker.engine.quantization.preparation import (
    correct_biases,
    equalize,
    fold_batch_norms,
    measure_largest_inputs,
    smooth,
)
from worker.engine.quantization.static_int8 import calibration_batches, quantize_statically, quiet
from worker.engine.quantization.weight_only import store_weights
from worker.engine.techniques.base import Context, Outcome
from worker.engine.training.examples import BoundExamples

LINEAR = (nn.Linear,)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NUM_LAYERS_NAMED = 20
LOW_COSINE = 0.99
NUM_COMPARED_BATCHES = 8
Preparation = Callable[[Program, dict[str, Floats]], int]
"""Changes a program in place, puts scales of weights that are on their grids into the dict, returns how many layers."""


def inspect(program: Program) -> Capability:
    """Name the layers with integer arithmetic in either mode."""
    linear = [n for n, layer in program.module.named_modules() if isinstance(layer, (*LINEAR, nn.LSTM))]
    convolutions = [n for n, layer in program.module.named_modules() if isinstance(layer, CONVOLUTIONS)]
    embeddings = [n for n, layer in program.module.named_modules() if isinstance(layer, nn.Embedding)]
    notes = []
    if convolutions:
        notes.append(
            f"mode 'dynamic' leaves the {len(convolutions)} convolutions in floating point; mode 'static' does not"
        )
    if embeddings and (linear or convolutions):
        notes.append(f"embeddings are stored in 8 bits and looked up: {', '.join(embeddings[:NUM_LAYERS_NAMED])}")
    if not linear and not convolutions:
        notes.append(
            "there are no linear, LSTM or convolution layers"
            + ("; quantize_mixed and quantize_float work on embeddings alone" if embeddings else "")
        )
    return Capability(
        kind="quantize_int8",
        applicable=bool(linear or convolutions),
        layers=(*linear, *convolutions),
        missing="; ".join(notes) or None,
    )


def run(program: Program, step: QuantizeInt8, context: Context) -> Outcome:
    """Prepare a copy of the module, export it, quantize the file and compare its outputs with the float file's."""
    names = {name for name, _ in program.module.named_modules()}
    unknown = sorted(set(step.skip_layers) - names)
    if unknown:
        raise RecipeRefused(f"skip_layers names layers that the model does not have: {unknown}", code="unknown_layer")
    bits = 8 if step.mode == "weight_only" or has_exact_integer_products() else 7
    exported = context.directory / "float.onnx"
    export_onnx(program, exported)
    context.report(0.1, "exported to ONNX")
    best = _build(program, step, context, bits, "plain", {}, exported)
    facts: dict[str, float | int | str | bool | None] = {}
    warnings = []
    preparations = _choose_preparations(step, context, bits)
    error = _measure_error(program, context, exported, best.path) if preparations else 0.0
    for word, prepare in preparations:
        candidate = best.source.copy()
        scales: dict[str, Floats] = {}
        num_layers = prepare(candidate, scales)
        facts[f"layers_{word}"] = num_layers
        if not num_layers:
            warnings.append(f"No layers could be {word.replace('_', ' ')}.")
            continue
        plain = best.plain if word == "rounded_by_gptq" else None
        built = _build(candidate, step, context, bits, word, scales, plain=plain)
        now = _measure_error(program, context, exported, built.path)
        facts[f"output_error_before_{word}"], facts[f"output_error_after_{word}"] = error, now
        if now > error:
            warnings.append(
                f"The layers were not {word.replace('_', ' ')}: the squared error of the outputs, relative to "
                f"their size, would have gone from {error:.3g} to {now:.3g} on calibration examples."
            )
            facts[f"layers_{word}"] = 0
            continue
        best, error = built, now
    context.report(0.9, "quantized")
    outcome = _conclude(program, step, context, exported, best, bits)
    outcome.facts.update(facts)
    outcome.warnings = (*outcome.warnings, *warnings)
    return outcome


@dataclass(frozen=True)
class _Built:
    source: Program
    plain: Program
    """The source before GPTQ rounded its weights."""
    scales: dict[str, Floats]
    path: Path
    quantized: ModelProto
    exported: ModelProto
    layers: dict[str, str]


def _choose_preparations(step: QuantizeInt8, context: Context, bits: int) -> list[tuple[str, Preparation]]:
    """Return what the step asks for, in the order in which it is done, with the word for what it does to layers."""

    def batches() -> Iterator[tuple[Tensor, ...]]:
        return calibration_batches(step, cast(BoundExamples, context.examples), context.seed)

    def apply_smoothing(program: Program, _: dict[str, Floats]) -> int:
        with evaluating(program):
            largest = measure_largest_inputs(program.module, batches())
        return sum(smooth(program.module, largest, cast(float, step.smoothing), step.skip_layers))

    def apply_equalization(program: Program, _: dict[str, Floats]) -> int:
        with evaluating(program):
            fold_batch_norms(program.module)
        return equalize(program.module, step.skip_layers)

    def apply_gptq(program: Program, scales: dict[str, Floats]) -> int:
        scales.update(
            round_linear_layers(program, list(batches()), step.skip_layers, bits, per_channel=step.per_channel)
        )
        return len(scales)

    def apply_correction(program: Program, _: dict[str, Floats]) -> int:
        with evaluating(program):
            fold_batch_norms(program.module)
            rounded = {}
            for name, layer in program.module.named_modules():
                if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) and name not in step.skip_layers:
                    codes, scales = round_to_int8(layer.weight.detach().numpy(), 0 if step.per_channel else None, bits)
                    rounded[name] = torch.from_numpy(codes * scales)
            return correct_biases(program.module, rounded, batches())

    found: list[tuple[str, Preparation]] = []
    if step.equalize:
        found.append(("equalized", apply_equalization))
    if step.smoothing is not None:
        found.append(("smoothed", apply_smoothing))
    if step.correct_bias:
        found.append(("corrected", apply_correction))
    if step.rounding == "gptq":
        found.append(("rounded_by_gptq", apply_gptq))
    return found


def _build(
    program: Program,
    step: QuantizeInt8,
    context: Context,
    bits: int,
    word: str,
    scales: dict[str, Floats],
    float_file: Path | None = None,
    plain: Program | None = None,
) -> _Built:
    """Quantize the module's file (`float_file`, if it is there). `scales`: of layers that are on their grids."""
    prepared, result = (context.directory / f"{word}_{name}.onnx" for name in ("prepared", "int8"))
    if float_file is None:
        float_file = prepared
        export_onnx(program, float_file)
    exported = onnx.load(float_file)
    with quiet():
        quant_pre_process(float_file, prepared, skip_optimization=True, skip_symbolic_shape=True)
    model = onnx.load(prepared)
    layers = find_layers(model, program)
    modules = dict(program.module.named_modules())
    chosen = [node for node, layer in layers.items() if layer not in step.skip_layers]
    scales_by_node = {node: scales[layer] for node, layer in layers.items() if layer in scales}
    if step.quantize_embeddings:
        quantize_tables(model, [node for node in chosen if isinstance(modules[layers[node]], nn.Embedding)])
    if step.mode == "weight_only":
        store_weights(model, chosen, per_channel=step.per_channel, scales_by_node=scales_by_node)
    elif step.mode == "dynamic":
        join_gelu(model)
        join_attention(model)
        linear = set(find_linear_nodes(model)) & (set(chosen) | (set(find_linear_nodes(model)) - set(layers)))
        quantize_linear_layers(
            model, linear, bits=bits, per_channel=step.per_channel, per_row=step.per_row, scales_by_node=scales_by_node
        )
        if any(node.op_type == "LSTM" and node.name in chosen for node in model.graph.node):
            onnx.save(model, prepared)
            with quiet():
                quantize_dynamic(
                    prepared, result, op_types_to_quantize=["LSTM"], per_channel=step.per_channel,
                    reduce_range=bits == 7, weight_type=QuantType.QInt8,
                    nodes_to_exclude=[node for node in layers if node not in chosen],
                )  # fmt: skip
            model = onnx.load(result)
    else:
        onnx.save(model, prepared)
        quantize_statically(
            program, step, cast(BoundExamples, context.examples), bits, prepared, result, model, layers,
            seed=context.seed, report=context.report,
        )  # fmt: skip
        model = onnx.load(result)
    result.write_bytes(model.SerializeToString(deterministic=True))
    return _Built(program, plain or program, scales, result, model, exported, layers)


def _conclude(
    program: Program,
    step: QuantizeInt8,
    context: Context,
    exported: Path,
    built: _Built,
    bits: int,
) -> Outcome:
    result, quantized, layers = built.path, built.quantized, built.layers
    done = find_quantized(quantized, built.exported, layers)
    kept = [name for name in dict.fromkeys(layers.values()) if name not in done]
    if not done:
        raise StepFailed(
            f"mode {step.mode!r} quantized none of the layers {kept[:NUM_LAYERS_NAMED]}",
            code="nothing_quantized",
            fix="Use mode 'static' for convolutional models, or skip fewer layers."
            if step.mode == "dynamic"
            else "Skip fewer layers, or leave quantize_int8 out.",
        )
    counts = [int(np.prod(each.dims)) for each in quantized.graph.initializer]
    nonzero = [int(np.count_nonzero(numpy_helper.to_array(each))) for each in quantized.graph.initializer]
    cosine = _measure_cosine(program, context, exported, result)
    warnings = []
    if cosine < LOW_COSINE:
        warnings.append(
            f"int8 changed the outputs: their mean cosine with the float model is {cosine:.4f} on example inputs."
            + ("" if step.per_channel else " Try per_channel.")
        )
    if kept:
        more = f" and {len(kept) - NUM_LAYERS_NAMED} more" if len(kept) > NUM_LAYERS_NAMED else ""
        warnings.append(f"Layers that stay in floating point: {', '.join(kept[:NUM_LAYERS_NAMED])}{more}.")
    if step.mode == "weight_only":
        warnings.append(
            "Weight-only: the file is smaller, the arithmetic stays in floating point, so it is not faster."
        )
    if bits == 7:
        warnings.append(
            "This processor has no 8-bit dot product instruction, so weights use 7 bits to keep sums from overflowing."
        )
    return Outcome(
        program=OnnxProgram(result, program.signature, sum(counts), sum(nonzero)),
        facts={
            "mode": step.mode,
            "layers_quantized": len(done),
            "layers_kept_float": len(kept),
            "weight_bits": bits,
            "weight_bytes_before": _weight_bytes(onnx.load(exported)),
            "weight_bytes_after": _weight_bytes(quantized),
            "cosine_with_float": cosine,
        },
        warnings=tuple(warnings),
        sensitivity=measure_int8_effects(
            built.plain,
            done,
            _example_batches(program, context)[0],
            bits=bits,
            per_channel=step.per_channel,
            activations=lambda layer: _round_activations(step, layer),
            rounded=built.source,
            scales=built.scales,
            step=context.index,
        ),
    )


def _round_activations(step: QuantizeInt8, layer: nn.Module) -> Activations:
    if step.mode == "weight_only":
        return "float"
    narrowing = isinstance(layer, nn.Linear) and layer.in_features > layer.out_features
    by_rows = step.mode == "dynamic" and (step.per_row == "all" or (step.per_row == "narrowing" and narrowing))
    return "per_row" if by_rows else "per_tensor"


def _weight_bytes(model: ModelProto) -> int:
    return sum(numpy_helper.to_array(each).nbytes for each in model.graph.initializer)


def _measure_cosine(program: Program, context: Context, exported: Path, result: Path) -> float:
    """Return the worst output's cosine on held-out examples, or on random inputs."""
    batches = [program.example_inputs(program.signature.batch_size or CALIBRATION_BATCH, seed=context.seed)]
    if context.examples is not None:
        held_out = cast(BoundExamples, context.examples).evaluation_batches(CALIBRATION_BATCH)
        batches = [batch[0] for batch in itertools.islice(held_out, NUM_COMPARED_BATCHES)]
    return compare_files(program.signature, exported, result, batches, context.num_threads).cosine


def _measure_error(program: Program, context: Context, exported: Path, result: Path) -> float:
    """Return the worst output's relative squared error on calibration examples, or on random inputs."""
    batches = _example_batches(program, context)
    return compare_files(program.signature, exported, result, batches, context.num_threads).error


def _example_batches(program: Program, context: Context) -> list[tuple[Tensor, ...]]:
    if context.examples is None:
        return [program.example_inputs(program.signature.batch_size or CALIBRATION_BATCH, seed=context.seed)]
    training = cast(BoundExamples, context.examples).training_batches(CALIBRATION_BATCH, seed=context.seed)
    return [batch[0] for batch in itertools.islice(training, NUM_COMPARED_BATCHES)]
