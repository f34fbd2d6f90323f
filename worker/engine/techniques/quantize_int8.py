"""Store weights as 8-bit integers and compute with them: in ONNX Runtime on the CPU, or in torch on either device.

Dynamic: linear (and LSTM) layers; activation ranges are found at run time, row by row. Convolutions stay in floating
point, because ONNX Runtime's ConvInteger is slower than its float convolution and torch has none. Static: ranges are
calibrated on training examples, and convolutions are quantized too; ONNX Runtime only.
"""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from app.recipes.facts import Capability
from app.recipes.quantization import QuantizeInt8
from worker.engine.errors import RecipeRefused, StepFailed
from worker.engine.programs.capture import evaluating
from worker.engine.programs.program import FileProgram, Program
from worker.engine.quantization.calibration import CALIBRATION_BATCH, has_exact_integer_products
from worker.engine.quantization.fidelity import compare_files
from worker.engine.quantization.int8_built import Built, Int8Builder
from worker.engine.quantization.int8_effects import Activations, measure_int8_effects
from worker.engine.quantization.int8_gptq import round_linear_layers
from worker.engine.quantization.int8_grid import Floats, round_to_int8
from worker.engine.quantization.int8_onnx import OnnxBuilder
from worker.engine.quantization.int8_torch import TorchBuilder, find_multiplied
from worker.engine.quantization.preparation import (
    correct_biases,
    equalize,
    fold_batch_norms,
    measure_largest_inputs,
    smooth,
)
from worker.engine.quantization.static_int8 import calibration_batches
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
    on_cpu = context.target.device == "cpu"
    bits = 8 if step.mode == "weight_only" or not on_cpu or has_exact_integer_products() else 7
    builder = _choose_builder(program, step, context, bits)
    context.report(0.1, "exported")
    best = builder.build(program, "plain", {})
    facts: dict[str, float | int | str | bool | None] = {}
    warnings = []
    preparations = _choose_preparations(step, context, bits)
    error = _measure_error(program, context, builder.float_file, best.path) if preparations else 0.0
    for word, prepare in preparations:
        candidate = best.source.copy()
        scales: dict[str, Floats] = {}
        num_layers = prepare(candidate, scales)
        facts[f"layers_{word}"] = num_layers
        if not num_layers:
            warnings.append(f"No layers could be {word.replace('_', ' ')}.")
            continue
        plain = best.plain if word == "rounded_by_gptq" else None
        built = builder.build(candidate, word, scales, plain)
        now = _measure_error(program, context, builder.float_file, built.path)
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
    outcome = _conclude(program, step, context, builder, best, bits)
    outcome.facts.update(facts)
    outcome.warnings = (*outcome.warnings, *warnings)
    return outcome


def _choose_builder(program: Program, step: QuantizeInt8, context: Context, bits: int) -> Int8Builder:
    if context.target.runtime != "onnxruntime":
        return TorchBuilder(program, step, bits, context.directory, for_cuda=context.target.device == "cuda")
    examples = cast(BoundExamples | None, context.examples)
    return OnnxBuilder(program, step, examples, bits, context.directory, seed=context.seed, report=context.report)


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


def _conclude(
    program: Program,
    step: QuantizeInt8,
    context: Context,
    builder: Int8Builder,
    built: Built,
    bits: int,
) -> Outcome:
    if not built.done:
        raise StepFailed(
            f"mode {step.mode!r} quantized none of the layers {list(built.kept[:NUM_LAYERS_NAMED])}",
            code="nothing_quantized",
            fix="Use mode 'static' with target.runtime 'onnxruntime' for convolutional models, or skip fewer layers."
            if step.mode == "dynamic"
            else "Skip fewer layers, or leave quantize_int8 out.",
        )
    cosine = _measure_cosine(program, context, builder.float_file, built.path)
    warnings = []
    if cosine < LOW_COSINE:
        warnings.append(
            f"int8 changed the outputs: their mean cosine with the float model is {cosine:.4f} on example inputs."
            + ("" if step.per_channel else " Try per_channel.")
        )
    if built.kept:
        more = f" and {len(built.kept) - NUM_LAYERS_NAMED} more" if len(built.kept) > NUM_LAYERS_NAMED else ""
        warnings.append(f"Layers that stay in floating point: {', '.join(built.kept[:NUM_LAYERS_NAMED])}{more}.")
    if step.mode == "weight_only":
        warnings.append(_tell_weight_only(context))
    if bits == 7:
        warnings.append(
            "This processor has no 8-bit dot product instruction, so weights use 7 bits to keep sums from overflowing."
        )
    multiplied = frozenset() if context.target.runtime == "onnxruntime" else find_multiplied(built.plain.module)
    return Outcome(
        program=FileProgram(built.path, program.signature, built.parameters, built.nonzero),
        facts={
            "mode": step.mode,
            "layers_quantized": len(built.done),
            "layers_kept_float": len(built.kept),
            "weight_bits": bits,
            "weight_bytes_before": builder.float_bytes,
            "weight_bytes_after": built.weight_bytes,
            "cosine_with_float": cosine,
        },
        warnings=tuple(warnings),
        sensitivity=measure_int8_effects(
            built.plain,
            built.done,
            _example_batches(program, context)[0],
            bits=lambda layer: 8 if isinstance(layer, nn.Embedding) and id(layer.weight) not in multiplied else bits,
            per_channel=step.per_channel,
            activations=lambda layer: _round_activations(step, layer, context.target.runtime),
            rounded=built.source,
            scales=built.scales,
            step=context.index,
        ),
    )


def _tell_weight_only(context: Context) -> str:
    if context.target.runtime == "onnxruntime":
        return "Weight-only: the file is smaller, the arithmetic stays in floating point, so it is not faster."
    cost = "" if context.target.runtime == "aotinductor" else ", which is slower"
    return f"Weight-only: the file is smaller, and so are the weights in memory; they are decoded at every call{cost}."


def _round_activations(step: QuantizeInt8, layer: nn.Module, runtime: str) -> Activations:
    if step.mode == "weight_only":
        return "float"
    if runtime != "onnxruntime":
        return "per_row_symmetric"
    narrowing = isinstance(layer, nn.Linear) and layer.in_features > layer.out_features
    by_rows = step.mode == "dynamic" and (step.per_row == "all" or (step.per_row == "narrowing" and narrowing))
    return "per_row" if by_rows else "per_tensor"


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
