"""Store weights as 8-bit integers and compute with them in ONNX Runtime, on the CPU.

Dynamic: linear (and LSTM) layers; activation ranges are found at run time. Convolutions stay in floating point, because
ONNX Runtime's ConvInteger is slower than its float convolution. Static: ranges are calibrated on training examples, and
convolutions are quantized too.
"""

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
from onnx import ModelProto, numpy_helper
from onnxruntime.quantization import (
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quant_pre_process,
    quantize_dynamic,
    quantize_static,
)
from torch import nn

from app.recipes.facts import Capability
from app.recipes.quantization import QuantizeInt8
from worker.engine.errors import RecipeRefused, StepFailed
from worker.engine.measure.runtimes import open_model
from worker.engine.programs.export_onnx import export_onnx
from worker.engine.programs.program import OnnxProgram, Program
from worker.engine.quantization.calibration import CALIBRATION_BATCH, CalibrationReader, has_exact_integer_products
from worker.engine.quantization.layers import find_layers, find_quantized
from worker.engine.techniques.base import Context, Outcome
from worker.engine.training.examples import BoundExamples

LINEAR = (nn.Linear,)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
DYNAMIC_OPERATORS = ["MatMul", "LSTM"]
"""The quantizer turns Gemm into MatMul and Add by itself."""
STATIC_OPERATORS = ["Conv", "ConvTranspose", "MatMul", "Gemm", "Relu", "Clip"]
IMAGE_OPERATORS = ["Add", "MaxPool", "AveragePool", "GlobalAveragePool", "Concat", "Resize"]
"""Quantized too in purely convolutional models, so that integers flow from layer to layer. In transformers these would
round the residual stream, which costs much accuracy."""
CALIBRATION = {
    "minmax": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}
NUM_LAYERS_NAMED = 20
LOW_COSINE = 0.99


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
    if embeddings:
        notes.append(f"embeddings stay in floating point: {', '.join(embeddings[:NUM_LAYERS_NAMED])}")
    if not linear and not convolutions:
        notes.append("there are no linear, LSTM or convolution layers")
    return Capability(
        kind="quantize_int8",
        applicable=bool(linear or convolutions),
        layers=(*linear, *convolutions),
        missing="; ".join(notes) or None,
    )


def run(program: Program, step: QuantizeInt8, context: Context) -> Outcome:
    """Export to ONNX, quantize the file and compare its outputs with those of the float file."""
    names = {name for name, _ in program.module.named_modules()}
    unknown = sorted(set(step.skip_layers) - names)
    if unknown:
        raise RecipeRefused(f"skip_layers names layers that the model does not have: {unknown}", code="unknown_layer")
    exported, prepared, result = (context.directory / name for name in ("float.onnx", "prepared.onnx", "int8.onnx"))
    export_onnx(program, exported)
    context.report(0.2, "exported to ONNX")
    bits = 8 if has_exact_integer_products() else 7
    with _quiet():
        quant_pre_process(exported, prepared, skip_optimization=True, skip_symbolic_shape=True)
        model = onnx.load(prepared)
        layers = find_layers(model, program)
        skipped = [node for node, layer in layers.items() if layer in step.skip_layers]
        options: dict[str, Any] = {
            "per_channel": step.per_channel, "reduce_range": bits == 7, "weight_type": QuantType.QInt8,
            "nodes_to_exclude": _with_rewritten_names(skipped),
        }  # fmt: skip
        if step.mode == "dynamic":
            quantize_dynamic(prepared, result, op_types_to_quantize=DYNAMIC_OPERATORS, **options)
        else:
            examples = cast(BoundExamples, context.examples)
            reader = CalibrationReader(examples, program, step.num_calibration_examples, context.seed, context.report)
            quantize_static(
                prepared,
                result,
                reader,
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=_choose_static_operators(model),
                activation_type=QuantType.QUInt8,
                calibrate_method=CALIBRATION[step.calibration],
                # Batch by batch: otherwise the quantizer holds the activations of all examples in memory.
                extra_options={"CalibStridedMinMax": 1, "MatMulConstBOnly": True},
                **options,
            )
    context.report(0.8, "quantized")
    quantized = onnx.load(result)
    result.write_bytes(quantized.SerializeToString(deterministic=True))
    return _conclude(program, step, context, exported, result, quantized, layers, bits)


def _conclude(
    program: Program,
    step: QuantizeInt8,
    context: Context,
    exported: Path,
    result: Path,
    quantized: ModelProto,
    layers: dict[str, str],
    bits: int,
) -> Outcome:
    done = find_quantized(quantized, onnx.load(exported), layers)
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
    cosine = _compare(program, context, exported, result)
    warnings = []
    if cosine < LOW_COSINE:
        warnings.append(
            f"int8 changed the outputs: their mean cosine with the float model is {cosine:.4f} on example inputs."
            + ("" if step.per_channel else " Try per_channel.")
        )
    if kept:
        more = f" and {len(kept) - NUM_LAYERS_NAMED} more" if len(kept) > NUM_LAYERS_NAMED else ""
        warnings.append(f"Layers that stay in floating point: {', '.join(kept[:NUM_LAYERS_NAMED])}{more}.")
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
    )


def _with_rewritten_names(nodes: list[str]) -> list[str]:
    # The dynamic quantizer first turns a Gemm into a MatMul of this name.
    return [name for node in nodes for name in (node, f"{node}_MatMul")]


def _choose_static_operators(model: ModelProto) -> list[str]:
    kinds = {node.op_type for node in model.graph.node}
    convolutional = bool(kinds & {"Conv", "ConvTranspose"}) and not kinds & {"Softmax", "LayerNormalization"}
    return STATIC_OPERATORS + (IMAGE_OPERATORS if convolutional else [])


def _weight_bytes(model: ModelProto) -> int:
    return sum(numpy_helper.to_array(each).nbytes for each in model.graph.initializer)


def _compare(program: Program, context: Context, exported: Path, result: Path) -> float:
    """Return the smallest, over the float outputs, of the mean cosine between the float and the integer model."""
    signature = program.signature
    if context.examples is not None:
        tensors, _ = next(iter(cast(BoundExamples, context.examples).evaluation_batches(CALIBRATION_BATCH)))
    else:
        tensors = program.example_inputs(signature.batch_size or CALIBRATION_BATCH, seed=context.seed)
    inputs = tuple(tensor.numpy() for tensor in tensors)
    before, after = (
        open_model(path, "onnxruntime", signature, context.num_threads)(inputs) for path in (exported, result)
    )
    cosines = []
    for left, right in zip(before, after, strict=True):
        if left.dtype.kind != "f" or left.ndim == 0:
            continue
        a, b = (array.astype(np.float64).reshape(len(array), -1) for array in (left, right))
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        cosines.append(float(np.mean((a * b).sum(1) / np.maximum(norms, 1e-12))))
    return min(cosines, default=1.0)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the quantizer's prints off stdout and its advice to preprocess out of the log."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.setLevel(level)
